"""native.cpp under the address and undefined-behaviour sanitizers: its own tests, in a process that has them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CONTROL = """
from pathlib import Path
from embtab.compiler import build
build(Path({source!r}), "a test").past_the_end(8)
"""


def file_of(compiler: str, library: str) -> str:
    """Where the compiler has it; its name alone where it has not."""
    command = [compiler, f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def sanitized(tmp_path: Path) -> dict[str, str]:
    """An environment in which whatever embtab compiles is instrumented."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    # The C++ library, too: the sanitizer looks for __cxa_throw at the start, before torch has brought it.
    libraries = [file_of(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("g++ comes without libasan")
    wrapper = tmp_path / "g++"
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-aggressive-loop-optimizations"
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} "$@" {flags}\n')
    wrapper.chmod(0o755)
    return os.environ | {
        "CXX": str(wrapper),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much at its end
    }


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=3500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_native_backend_under_sanitizers(sanitized: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "control.cpp"
    source.write_text('extern "C" int past_the_end(int n) { int *a = new int[n]; a[0] = 1; return a[n]; }\n')
    found = run(["-c", CONTROL.format(source=str(source))], sanitized)
    assert "AddressSanitizer: heap-buffer-overflow" in found.stderr  # what the tests below would end in
    files = ["test_native_shapes.py", "test_native.py", "test_native_bounds.py", "test_orders.py"]
    done = run(
        ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "--timeout=1200", "-k", "not processes", *files],
        sanitized,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
