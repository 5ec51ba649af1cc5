"""A configuration loads classes of known packages, and of others only when the user has named them."""

import sys
from pathlib import Path

import pytest
import yaml

from embtab import cli
from embtab.errors import UserError
from embtab.training.trust import check_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def written(folder: Path, described: object) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump(described))
    return folder / "config.yaml"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that leaves a trace when it is imported."""
    (tmp_path / "evil_package.py").write_text(
        f"import pathlib, torch\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n"
        "class Model(torch.nn.Linear): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "trace"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_configurations_pass(path: Path) -> None:
    check_config(path)


@pytest.mark.parametrize(
    "described",
    [
        {"model": {"model": {"class_path": "evil_package.Model", "init_args": {}}}},
        {"trainer": {"callbacks": [{"class_path": "evil_package.Model"}]}},
        {"trainer": {"logger": "evil_package.Model"}},
        {"trainer": {"strategy": {"evil_package.Model": {}}}},
    ],
)
def test_fit_refuses_other_packages_before_they_run(described: dict, tmp_path: Path, evil: Path) -> None:
    path = written(tmp_path, {"data": {"path": "data"}} | described)
    for words in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["fit", *words])
        assert stopped.value.code == 2
    assert not evil.exists()
    assert "evil_package" not in sys.modules


def test_the_user_may_allow_a_package(tmp_path: Path, evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"model": {"model": {"class_path": "evil_package.Model"}}})
    with pytest.raises(UserError, match=r"evil_package.Model would be imported .* set EMBTAB_ALLOW=evil_package"):
        check_config(path)
    monkeypatch.setenv("EMBTAB_ALLOW", "other, evil_package")
    check_config(path)


def test_files_sizes_and_names_are_not_mistaken_for_classes(tmp_path: Path) -> None:
    described = {"data": {"path": "reports.v2"}, "trainer": {"default_root_dir": "runs.old"}, "budget": "0.1x", "n": 3}
    check_config(written(tmp_path, described))
    check_config(tmp_path / "not-there.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    check_config(tmp_path / "broken.yaml")  # for its reader to refuse
