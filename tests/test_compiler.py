"""Compiled loops: kept, found, mended and done without, each in a process of its own whose environment is made up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import embtab.compiler as compiler
from embtab.cli import main
from embtab.errors import UserError

PATH = "/usr/bin:/bin:/usr/local/bin"
NOBODY = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"  # a user that passwd lacks
SMALL = "from pathlib import Path\nfrom embtab.compiler import build\nprint(build(Path({!r}), 'a test').answer())\n"
USERS = """
import torch, warnings
import embtab as et
from embtab.models.attention import compiled as attends
from embtab.models.dice import compiled as activates
from embtab.models.autoint import AutoInt
from embtab.models.layers import Dice
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
out = AutoInt(num_dense=2, num_features=3, dim=8)(torch.randn(5, 2), torch.randn(5, 3, 8))
assert out.isfinite().all() and Dice(4)(torch.randn(5, 4)).isfinite().all()
print(attends(torch.zeros(1)), activates(torch.zeros(1, 1), torch.zeros(1)))
plan = et.plan([et.Feature("f", 50)], "hash", "0.5x")
tables = et.EmbeddingBagCollection(plan, "native")
ids = KeyedJaggedTensor(["f"], torch.arange(4), lengths=torch.ones(4, dtype=torch.int64))
tables(ids).values().sum().backward()
print("native trains")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that has these variables only."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with all loops, as `embtab build` makes them."""
    cache = tmp_path_factory.mktemp("warm")
    done = subprocess.run([sys.executable, "-m", "embtab", "build"], capture_output=True, text=True, check=True)
    (cache / "embtab").mkdir()
    printed = [line.split(": ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in printed] == [
        "embtab.lookup.native_loop",
        "embtab.models.attention",
        "embtab.models.dice",
    ]
    for _, path in printed:
        shutil.copy(path, cache / "embtab")
    return cache


def test_a_warm_cache_needs_no_compiler(warm: Path) -> None:
    code = "import warnings; warnings.simplefilter('error', UserWarning)" + USERS
    done = run(code, PATH="", XDG_CACHE_HOME=str(warm))
    assert done.stdout.splitlines() == ["True True", "native trains"], done.stderr


def test_without_a_compiler_and_a_cache_torch_computes_and_native_says_so(tmp_path: Path) -> None:
    done = run(NOBODY + USERS, PATH="")
    assert done.stdout.splitlines() == ["False False"]
    for what in ("attention", "Dice"):
        assert f"{what} is computed by torch, which takes longer: {what}: there is no C++ compiler 'g++'" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "UserError: the native backend: there is no C++ compiler 'g++'; install it, or set CXX to another"
    )


@pytest.mark.parametrize("home", ["none", "missing", "a file", "not writable"])
def test_without_a_place_to_keep_them_loops_are_built_for_one_process(home: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {
        "none": {},
        "missing": {"HOME": "/proc/nonexistent"},  # where root cannot make it either
        "a file": {"XDG_CACHE_HOME": str(tmp_path / "file")},
        "not writable": {"XDG_CACHE_HOME": "/proc/self"},
    }[home]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = run(NOBODY + SMALL.format(str(small)), PATH=PATH, TMPDIR=str(temporary), **environment)
    assert done.stdout == "42\n", done.stderr
    assert "a test is compiled for this process alone, as it cannot be kept: " in done.stderr
    assert "set XDG_CACHE_HOME" in done.stderr
    assert not list(temporary.iterdir())


def test_where_nothing_can_be_written_it_is_one_line(small: Path) -> None:
    code = "import tempfile\ndef no(*a, **k): raise PermissionError(13, 'Permission denied', '/tmp')\n"
    code += "tempfile.mkdtemp = no\n" + SMALL.format(str(small))
    done = run(code, PATH=PATH, XDG_CACHE_HOME="/proc/self")
    assert "UserError: a test could not be built: [Errno 13] Permission denied: '/tmp'" in done.stderr


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "empty"])
def test_a_damaged_library_is_built_again_once(
    damage: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.build(small, "a test")
    (library,) = (tmp_path / "embtab").iterdir()
    whole = library.read_bytes()
    at = whole.rindex(b"answer")
    library.unlink()  # which this process has mapped
    library.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "bit": whole[:at] + b"Answer" + whole[at + 6 :],
            "foreign": Path(sys.executable).read_bytes()[:20_000],
            "empty": b"",
        }[damage]
    )
    code = "import warnings; warnings.simplefilter('error', UserWarning)\n" + SMALL.format(str(small))
    done = run(code, PATH=PATH, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "42\n", done.stderr
    assert [path.read_bytes() for path in (tmp_path / "embtab").iterdir()] == [whole]
    monkeypatch.setenv("PATH", "")
    assert compiler.build(small, "a test").answer() == 42  # found, not built


@pytest.mark.parametrize(
    "what", ["folder of another", "folder open", "library of another", "library open", "link", "pipe"]
)
def test_a_library_that_others_could_have_written_is_never_loaded(
    what: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.build(small, "a test")
    folder = tmp_path / "embtab"
    assert folder.stat().st_mode & 0o777 == 0o700
    (library,) = folder.iterdir()
    whole, planted = library.read_bytes(), tmp_path / "planted"
    source = tmp_path / "trap.cpp"
    source.write_text(f"""
#include <cstdio>
extern "C" int answer() {{ return 13; }}
static int ran = [] {{ return std::fclose(std::fopen("{planted}", "w")); }}();
""")
    trap = tmp_path / "trap.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(trap)], check=True)
    name = library.name.rpartition("-")[0]
    library.unlink()
    path = folder / f"{name}-{compiler._digest(trap.read_bytes())}.so"
    shutil.copy(trap, path)
    if what == "link":
        path.unlink()
        path.symlink_to(trap)
    elif what == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif what.endswith("open"):
        (folder if "folder" in what else path).chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(folder if "folder" in what else path, 12345, 12345)
    else:
        pytest.skip("only root can give a file away")
    done = run(SMALL.format(str(small)), PATH=PATH, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "42\n", done.stderr
    assert not planted.exists()
    if "folder" in what:
        said = "is another user's" if "another" in what else "can be written to by others (chmod go-w mends that)"
        assert f"it cannot be kept: {folder} {said}; set XDG_CACHE_HOME" in done.stderr
    else:
        assert [each.read_bytes() for each in folder.iterdir()] == [whole]


def test_two_libraries_are_two(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's loader knows libraries by the names that it was given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" int answer() { return 43; }\n')
    for _ in range(2):
        assert [compiler.build(each, "a test").answer() for each in (small, other)] == [42, 43]
    assert sorted(path.name[:5] for path in (tmp_path / "embtab").iterdir()) == ["other", "small"]


def test_cxx_may_be_several_words(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "with space" / "wrapper"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/asked\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"'{wrapper}' g++")
    assert compiler.build(small, "a test").answer() == 42
    assert (tmp_path / "asked").read_text() == "g++\n"
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(UserError, match=r"a test: CXX=\"'g\+\+\" is no command: No closing quotation"):
        compiler.build(small, "a test")


def test_loops_for_a_kind_of_processors_are_found_on_others(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.build(small, "a test")
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no C"):
        compiler.build(small, "a test")
    monkeypatch.setenv("PATH", PATH)
    monkeypatch.setenv("EMBTAB_MARCH", "armv8-a" if os.uname().machine == "aarch64" else "x86-64")
    compiler.build(small, "a test")
    monkeypatch.setattr(compiler, "_processor", lambda: "a third")
    monkeypatch.setenv("PATH", "")
    assert compiler.build(small, "a test").answer() == 42


def test_build_says_where_it_cannot_keep_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embtab.lookup import native_loop

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_loop.compiled_loop.cache_clear()
    with pytest.raises(SystemExit) as caught:
        main(["build"])
    assert caught.value.code == 2
    assert "embtab: error: the native backend: there is no C++ compiler 'no-such-compiler'" in capsys.readouterr().err
