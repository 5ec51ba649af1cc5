"""What is installed: one package, `embtab`, that shadows nobody else's `models` or `datasets`."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_embtab_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("embtab", "models", "datasets", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"embtab", wheel.name.split("-py3")[0] + ".dist-info"}
    packed = {name for name in names if name.endswith(".py")}
    homes = {"embtab": "embtab", "models": "embtab/models", "datasets": "embtab/datasets"}
    on_disk = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packed == on_disk
    assert "embtab/py.typed" in names
