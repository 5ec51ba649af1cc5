"""What a prepared dataset folder holds, and the one place that writes and describes it.

    DIR/dataset.json             the description below; written last, so a folder without it is not a dataset
    DIR/{train,valid,test}/*.parquet
    DIR/vocab/NAME.parquet       row i describes id i of feature NAME: `count` (training occurrences), and `value`
                                 (the raw value as a string) where the ids come from raw values; none for hashed ids

Columns of the Parquet files: the label (float32, 0 or 1), dense columns (float32), features (int64, or list<int64>
where `multi` is true), and the unread columns. Each file carries the roles of its columns as JSON under the schema
metadata key `embtab`.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from embtab.errors import DataError, shown
from embtab.features import read_description
from embtab.files import write_text

SPLITS = ("train", "valid", "test")
_PART = re.compile(rf"(?:{'|'.join(SPLITS)})/[^/\0]+\.parquet")
ROW_GROUP_ROWS = 65_536  # larger groups read several times slower; smaller ones waste footer space


@dataclass(frozen=True)
class Categorical:
    """A categorical column: int64 ids in [0, num_ids), or lists of them where `multi` is true.

    With `hashed` any int64 is an id, and `num_ids` is about how many different ones there are.
    """

    name: str
    num_ids: int
    pooling: str = "sum"
    id_space: str | None = None
    multi: bool = False
    hashed: bool = False


@dataclass(frozen=True)
class PartFile:
    """One Parquet file of the dataset, with what is needed to notice that it changed."""

    path: str
    rows: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The description of a prepared dataset folder (`dataset.json`)."""

    name: str
    features: tuple[Categorical, ...]
    dense: tuple[str, ...] = ()
    label: str = "label"
    user: str | None = None
    """An int64 column that names the user of a row, for metrics grouped by user; it is not a model input."""
    unread: tuple[str, ...] = ()
    """list<float32> columns that batches do not hold: truths about generated data, for measurements."""
    files: tuple[PartFile, ...] = ()
    bayes: dict[str, float] | None = None
    """What the best possible ranker reaches on the test split (`auc`, `logloss`), where the data is generated."""
    source: dict[str, Any] = field(default_factory=dict)
    """How the folder was made: options, seeds, counts of rows that were dropped and why."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when any row of any split changes."""
        text = json.dumps([[f.path, f.rows, f.sha256] for f in self.files] + [self.name])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def rows(self, split: str) -> int:
        """The number of rows of a split; 0 for a split the dataset does not have."""
        return sum(f.rows for f in self.files if f.path.startswith(f"{split}/"))

    def parts(self, split: str) -> list[PartFile]:
        """The files of a split, in reading order."""
        return sorted((f for f in self.files if f.path.startswith(f"{split}/")), key=lambda f: f.path)

    def arrow_schema(self) -> pa.Schema:
        """The schema every Parquet file of the dataset has, roles in its metadata included."""
        fields = [pa.field(self.label, pa.float32(), nullable=False)]
        fields += [pa.field(name, pa.float32(), nullable=False) for name in self.dense]
        for column in self.features:
            kind = pa.list_(pa.field("element", pa.int64(), nullable=False)) if column.multi else pa.int64()
            fields.append(pa.field(column.name, kind, nullable=False))
        if self.user is not None and self.user not in {f.name for f in fields}:
            fields.append(pa.field(self.user, pa.int64(), nullable=False))
        numbers = pa.list_(pa.field("element", pa.float32(), nullable=False))
        fields += [pa.field(name, numbers, nullable=False) for name in self.unread]
        roles = {
            "format": "embtab-dataset",
            "version": 1,
            "name": self.name,
            "label": self.label,
            "user": self.user,
            "dense": list(self.dense),
            "features": [asdict(column) for column in self.features],
        }
        return pa.schema(fields, metadata={"embtab": json.dumps(roles)})

    def save(self, folder: Path) -> None:
        """Writes `dataset.json` in one step; call it after every other file of the folder is complete."""
        described = {"format": "embtab-dataset", "version": 1, **asdict(self)}
        write_text(folder / "dataset.json", json.dumps(described, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Reads the description of a prepared folder.

        Raises:
            DataError: when it is absent, unreadable, of a newer version, or a field is missing or makes no sense.
        """
        folder = Path(folder)
        described = read_description(folder)
        described.pop("format")
        version = described.pop("version", None)
        if version != 1:
            raise DataError(f"{folder}/dataset.json: version {version!r} is not known to this embtab (it reads 1)")
        try:
            for name, kind in (("features", Categorical), ("files", PartFile)):
                described[name] = tuple(_typed(kind, entry) for entry in described[name])
            described = {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}
            dataset = _typed(cls, described)
            _check(dataset)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}/dataset.json: {error}; prepare the data again") from error
        return dataset


T = TypeVar("T")


def _typed(kind: type[T], given: dict[str, Any]) -> T:
    """An entry of the description.

    Raises:
        TypeError: when it has an unknown field, lacks one, or one is of another type.
    """
    if not isinstance(given, dict):
        raise TypeError(f"expected an entry, got {shown(given)}")
    for name, wanted in typing.get_type_hints(kind).items():
        accepted = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
        if name in given and type(given[name]) not in [typing.get_origin(each) or each for each in accepted]:
            raise TypeError(f"{name} cannot be {shown(given[name])}")
    return kind(**given)


def _check(dataset: Dataset) -> None:
    """What no single field shows.

    Raises:
        ValueError: for a column or file that is named twice or not by text, or is in no split.
    """
    lists = (*(column.name for column in dataset.features if column.multi), *dataset.unread)
    plain = [dataset.label, *dataset.dense, *(column.name for column in dataset.features if not column.multi)]
    paths = [part.path for part in dataset.files]
    for names in ([*plain, *lists], paths):
        for name in names:
            if not isinstance(name, str) or not name or names.count(name) > 1:
                raise ValueError(f"{shown(name)} is no name, or is listed twice")
    for column in dataset.features:
        if "/" in column.name or "\0" in column.name:
            raise ValueError(f"feature {shown(column.name)} cannot be the name of a file, which its vocabulary has")
    for path in paths:
        if not _PART.fullmatch(path):
            raise ValueError(f"file {shown(path)} is no SPLIT/NAME.parquet ({', '.join(SPLITS)})")
    if dataset.user in (dataset.label, *dataset.dense, *lists):
        raise ValueError(f"the user column {dataset.user!r} must hold one whole number a row")


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the settings every dataset file has; write tables with `row_group_size=ROW_GROUP_ROWS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=False, write_statistics=True)


def describe_files(folder: Path) -> tuple[PartFile, ...]:
    """Lists the Parquet files of the splits below `folder` with their rows, sizes and checksums."""
    return tuple(_describe(folder, path) for path in _part_paths(folder))


def _part_paths(folder: Path) -> Iterator[Path]:
    for split in SPLITS:
        yield from sorted((folder / split).glob("*.parquet"))


def _describe(folder: Path, path: Path) -> PartFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = pq.read_metadata(path).num_rows
    return PartFile(path.relative_to(folder).as_posix(), rows, path.stat().st_size, digest)
