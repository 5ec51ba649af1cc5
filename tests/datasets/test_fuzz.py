"""Spoilt files of every kind: each is refused in one line that names it, or every row of it comes out right."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import films, logs, tables
from fuzzing.mutations import mutate_file, mutate_json, pick
from fuzzing.prepared import SIZES, mutate_prepared, verify_batches, verify_checked, write_prepared
from fuzzing.raw import Kind

from embtab.cli import main
from embtab.datasets.reader import ParquetBatches
from embtab.errors import DataError, UserError
from embtab.training.data import DataModule

KINDS = [*tables.KINDS, *films.KINDS, *logs.KINDS]
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
FEW, MANY = 7, 170  # files of each of the 12 kinds; of roles; 3 and 2 times as many prepared folders


def assert_clear(message: str, folder: Path) -> None:
    assert "\n" not in message
    assert len(message) < 1000
    assert str(folder) in message, message


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str | None:
    """What the command line says at its end; None where it did what it was asked for."""
    try:
        main(arguments)
    except SystemExit as stopped:
        assert stopped.code == 2
        before, error, message = capsys.readouterr().err.rpartition("embtab: error: ")
        assert error, before
        assert "Traceback" not in before
        return message.removesuffix("\n")
    capsys.readouterr()
    return None


def try_raw(kind: Kind, number: int, root: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng([zlib.crc32(kind.name.encode()), number])
    folder, out = root / "raw", root / "out"
    folder.mkdir(parents=True)
    kind.write(folder, rng)
    how = mutate_file(pick(rng, sorted(folder.iterdir())), rng) if number else "nothing"
    before = sorted(root.rglob("*"))
    message = refusal(kind.arguments(folder, out), capsys)
    if message is None:
        kind.verify(folder, out)
        return
    assert number
    assert sorted(root.rglob("*")) == before
    assert_clear(message, folder)
    spoilt, named = re.search("in line ([0-9]+)", how), re.search(r"line ([0-9]+)[:,]", message)
    if spoilt and named and not re.search("already|one line only", message):  # of two lines the later one is named
        assert spoilt[1] == named[1], f"{how}, but said of {message}"


def try_prepared(number: int, folder: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng([len(SIZES), number])
    write_prepared(folder, rng)
    if number:
        mutate_prepared(folder, rng)
    for split in SIZES:
        try:
            batches = list(ParquetBatches(folder, split, 7, prefetch=int(rng.integers(2))))
        except DataError as error:
            assert number
            assert_clear(str(error), folder)
        else:
            verify_batches(folder, split, batches)
    try:
        DataModule(str(folder))
    except UserError as error:
        assert_clear(str(error), folder)
    if refusal(["check-data", str(folder)], capsys) is None:
        verify_checked(folder)


def try_roles(number: int, root: Path, capsys: pytest.CaptureFixture) -> None:
    """What other roles make of a table is not known here; they are refused in one line, or taken."""
    rng = np.random.default_rng([len(tables.ROLES), number])
    folder = root / "raw"
    folder.mkdir(parents=True)
    tables.write_csv(folder, rng)
    (root / "roles.yaml").write_text(json.dumps(tables.ROLES))
    how = mutate_json(root / "roles.yaml", rng)
    (kind,) = (kind for kind in KINDS if kind.name == "table of CSV")
    message = refusal(kind.arguments(folder, root / "out"), capsys)
    if message is not None and "no row falls into train" not in message:
        assert_clear(message, root)
        assert not (root / "out").exists(), how


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_few_raw_files(tmp_path, capsys, kind):
    for number in range(FEW):
        try_raw(kind, number, tmp_path / str(number), capsys)


def test_few_prepared_folders(tmp_path, capsys):
    for number in range(3 * FEW):
        try_prepared(number, tmp_path / str(number), capsys)


def test_few_roles(tmp_path, capsys):
    for number in range(FEW):
        try_roles(number, tmp_path / str(number), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_raw_files(tmp_path, capsys, kind):
    for number in range(MANY):
        try_raw(kind, number, tmp_path / str(number), capsys)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_many_prepared_folders(tmp_path, capsys, part):
    for number in range(part * MANY, (part + 1) * MANY):
        try_prepared(number, tmp_path / str(number), capsys)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
def test_many_roles(tmp_path, capsys):
    for number in range(MANY):
        try_roles(number, tmp_path / str(number), capsys)
        shutil.rmtree(tmp_path / str(number))
