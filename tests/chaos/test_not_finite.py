"""NaN and infinity while training: a line that names step and cause, and the last good state stays."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos import Place, said_of
from contents import last_of
from long_commands import COMMANDS, prepared

from embtab.training.checkpoint import read_checkpoint
from embtab.training.culprit import not_finite


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("finite"))


def spoilt(place: Place, column: str, value: float, row: int) -> Place:
    """The same with one value of the training split replaced."""
    root = place.root / f"{column}-{value}"
    if not root.exists():
        shutil.copytree(place.root / "data", root / "data")
        (root / "temporary").mkdir()
        (part,) = (root / "data/train").glob("*.parquet")
        table = pq.read_table(part)
        values = table[column].to_numpy().copy()
        values[row] = value
        at = table.schema.get_field_index(column)
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, pa.float32())), part)
        for name in ("fit", "compare", "search"):
            text = (place.root / f"{name}.yaml").read_text()
            (root / f"{name}.yaml").write_text(text.replace(str(place.root / "data"), str(root / "data")))
    return Place(root)


def stops(place: Place, name: str, out: Path, *more: str) -> str:
    return said_of([*COMMANDS[name].argv(place, out), *more], place)


def kept(out: Path) -> int:
    """The step of the last checkpoint, which is finite."""
    checkpoint = read_checkpoint(last_of(out))
    assert not_finite(checkpoint["state_dict"]) is None
    return checkpoint["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_a_fit(place: Place, tmp_path: Path, value: float) -> None:
    line = stops(spoilt(place, "I3", value, 1000), "fit", tmp_path, "--save_every", "1")
    assert "dense column 'I3' is not finite in row " in line
    assert f"at step {kept(tmp_path)} (epoch 0)" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "search"])
def test_a_value_that_is_not_finite_stops_a_sweep(place: Place, tmp_path: Path, name: str) -> None:
    line = stops(spoilt(place, "I3", float("nan"), 2500), name, tmp_path)
    assert "at step " in line
    assert "dense column 'I3' is not finite in row " in line
    assert not list(tmp_path.rglob("*.part.pt"))


@pytest.mark.slow
def test_tables_that_overflow_make_no_checkpoint(place: Place, tmp_path: Path) -> None:
    line = stops(place, "fit", tmp_path, "--model.table_lr", "1e38", "--save_every", "1")
    assert "feature 'C" in line or "tables." in line
    assert not last_of(tmp_path).exists() or kept(tmp_path)
