"""Broken installations of many kinds, made up, are explained in words."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from embtab.cli import main
from embtab.commands import examine as doctor
from embtab.commands.examine import Finding, explained, loads, packages, threads

WANTED = ["torch==2.13.*", "polars>=2", "onnx<2,>=1.19", "pytest>=8 ; extra == 'dev'"]


def judged(installed: dict[str, str]) -> dict[str, str]:
    def there(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return {finding.name: f"{finding.state}: {finding.text}" for finding in packages(lambda _: WANTED, there)}


def test_versions_are_held_to_what_is_required() -> None:
    good = judged({"torch": "2.13.1+cpu", "polars": "2.0", "onnx": "1.20.0"})
    assert good == {"torch": "ok: 2.13.1+cpu", "polars": "ok: 2.0", "onnx": "ok: 1.20.0"}
    bad = judged({"torch": "2.1.3", "onnx": "2.0.0"})
    assert bad["torch"].startswith(
        "broken: 2.1.3 is installed, embtab needs ==2.13.*: torch, torchrec and fbgemm-gpu are"
    )
    assert bad["polars"] == "broken: is not installed; embtab needs polars>=2: pip install 'polars>=2'"
    assert bad["onnx"] == "broken: 2.0.0 is installed, embtab needs <2,>=1.19: pip install 'onnx<2,>=1.19'"


def test_a_package_that_is_not_installed_says_so() -> None:
    def none(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    assert [finding.state for finding in packages(none)] == ["broken"]


@pytest.mark.parametrize(
    ("code", "said", "meant"),
    [
        (
            "raise OSError('libtorch_cuda.so: cannot open shared object file')",
            "libtorch_cuda.so",
            "install fbgemm-gpu-cpu",
        ),
        ("raise ImportError('libnvidia-ml.so.1: cannot open')", "libnvidia-ml", "without NVIDIA's driver"),
        ("raise ImportError('undefined symbol: _ZN2at4_ops')", "undefined symbol", "built for another torch"),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11", "crashed while loading"),
        ("import a_module_that_is_not_there", "No module named", "not installed in this environment"),
        ("import sys; sys.exit(3)", "exit code 3", "try the import alone"),
    ],
)
def test_libraries_that_do_not_load(
    code: str, said: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_library.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = loads("made_up_library")
    assert finding.state == "broken"
    assert said in finding.text
    assert meant in finding.text
    assert meant in explained(finding.text)


def test_kernels_are_compared_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.computes().state == "ok"
    off = doctor.KERNEL.replace("allclose(*made", "allclose(made[0] + 1, made[1]")
    monkeypatch.setattr(doctor, "KERNEL", off)
    wrong = doctor.computes()
    assert wrong.state == "broken"
    assert "fbgemm and torch give different vectors; until that is mended, backend='torch'" in wrong.text


def test_a_driver_that_torch_cannot_use_is_a_warning(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    assert doctor.gpu(driver).state == "ok"
    driver.write_text("NVRM version: 1")
    finding = doctor.gpu(driver)
    assert finding.state == "warning" or "usable" in finding.text


def test_threads() -> None:
    assert threads({}, 4).state == "ok"
    assert threads({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, 4).state == "ok"
    assert threads({"OMP_NUM_THREADS": "8"}, 4).text == "OMP_NUM_THREADS=8 on 4 cores: set 1 to 4"
    assert threads({"OMP_NUM_THREADS": "x"}, 4).state == "warning"
    assert threads({"OMP_WAIT_POLICY": "active"}, 4).state == "warning"


def test_the_command_prints_a_line_each_and_its_exit_code_says_whether_all_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("one", "ok", "fine"), Finding("two", "warning", "slow")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    main(["doctor"])
    assert capsys.readouterr().out == "ok       one: fine\nwarning  two: slow\n"
    found.append(Finding("three", "broken", "gone"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    assert "BROKEN   three: gone" in capsys.readouterr().out
