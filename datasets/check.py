"""Says what is wrong with a prepared dataset folder, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from embtab.datasets.parquet import RowGroup, column_differences, first_null, read_footer
from embtab.datasets.schema import SPLITS, Categorical, Dataset, PartFile
from embtab.errors import DataError, UserError
from embtab.features import id_spaces, read_counts, read_features, vocabulary_path
from embtab.text import printable


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: path of the file or folder.
        row_group: number of the row group in the file, from 0.
        column: name of the column.
        row: the first row it is wrong in, from 0, counted within the row group.
        message: what is wrong, and how to mend it where that is known.
        warning: whether the data can be used all the same.
    """

    file: str
    row_group: int | None
    column: str | None
    row: int | None
    message: str
    warning: bool = False

    def __str__(self) -> str:
        place = self.file
        place += "" if self.row_group is None else f", row group {self.row_group}"
        place += "" if self.column is None else f", column {self.column!r}"
        place += "" if self.row is None else f", row {self.row}"
        return printable(f"{'warning: ' if self.warning else ''}{place}: {self.message}")


def check(folder: str | Path) -> list[Problem]:
    """Compares every file of a prepared folder with its description, and every value with what its column allows.

    Reads one row group at a time. A column's first wrong value in a file is reported, not the ones after it.

    Returns:
        The problems found; an empty list for good data.
    """
    folder = Path(folder)
    try:
        dataset = Dataset.load(folder)
        id_spaces(read_features(folder, counts=False))
    except UserError as error:
        return [_problem(folder / "dataset.json", error)]
    vocabularies = {each.name: _vocabulary(folder, each) for each in dataset.features if not each.hashed}
    described = {name: counts for name, counts in vocabularies.items() if isinstance(counts, np.ndarray)}
    seen = _Seen({name: np.zeros_like(counts) for name, counts in described.items()})
    problems = list(_unlisted(folder, dataset))
    with tqdm(total=sum(part.rows for part in dataset.files), unit="row", unit_scale=True, desc="check") as bar:
        for split in SPLITS:
            problems += _check_split(folder, dataset, split, seen, bar)
    for name, found in vocabularies.items():
        if isinstance(found, Problem):
            problems.append(found)
        elif seen.complete and name not in seen.wrong:
            problems += _compare_counts(vocabulary_path(folder, name), found, seen.counts[name])
    return problems


@dataclass
class _Seen:
    """What went by.

    Attributes:
        counts: occurrences of each id in the training split, per feature that has a vocabulary.
        complete: whether every training file could be opened.
        wrong: columns of the training split with a wrong value, whose counts therefore mean nothing.
        labels: the labels of the current split.
    """

    counts: dict[str, NDArray[np.int64]]
    complete: bool = True
    wrong: set[str | None] = field(default_factory=set)
    labels: set[float] = field(default_factory=set)


def _problem(path: Path, error: UserError, column: str | None = None) -> Problem:
    place = str(path) if column is None else f"{path}, column {column!r}"
    return Problem(str(path), None, column, None, str(error).removeprefix(f"{place}: "))


def _unlisted(folder: Path, dataset: Dataset) -> Iterator[Problem]:
    listed = {folder / part.path for part in dataset.files}
    vocabularies = {vocabulary_path(folder, each.name) for each in dataset.features if not each.hashed}
    for path in sorted(set(folder.rglob("*.parquet")) - listed - vocabularies):
        yield Problem(str(path), None, None, None, "is not listed in dataset.json; remove it or prepare the data again")


def _check_split(folder: Path, dataset: Dataset, split: str, seen: _Seen, bar: tqdm) -> Iterator[Problem]:
    if not dataset.rows(split):
        yield Problem(str(folder / split), None, None, None, "the split has no rows", warning=split != "train")
        return
    seen.labels = set()
    for part in dataset.parts(split):
        yield from _check_part(folder / part.path, part, dataset, split, seen, bar)
    if len(seen.labels) == 1:
        message = f"every label of the split is {seen.labels.pop():g}; ranking metrics are undefined on it"
        yield Problem(str(folder / split), None, dataset.label, None, message, warning=True)


def _check_part(path: Path, part: PartFile, dataset: Dataset, split: str, seen: _Seen, bar: tqdm) -> Iterator[Problem]:
    try:
        metadata = read_footer(path)
    except DataError as error:
        seen.complete = seen.complete and split != "train"
        yield _problem(path, error)
        return
    if metadata.num_rows != part.rows:
        message = f"has {metadata.num_rows} rows but dataset.json says {part.rows}; prepare the data again"
        yield Problem(str(path), None, None, None, message)
    elif _checksum(path) != part.sha256:
        yield Problem(str(path), None, None, None, "changed since it was prepared: its checksum differs")
    differences = dict(column_differences(metadata.schema.to_arrow_schema(), dataset.arrow_schema()))
    for column, message in differences.items():
        yield Problem(str(path), None, column, None, message)
    wrong: set[str | None] = set(differences)
    for index in range(metadata.num_row_groups):
        group = RowGroup(path, index, metadata.row_group(index).num_rows, metadata)
        columns = [name for name in dataset.arrow_schema().names if name not in wrong]
        for problem in _check_group(group, columns, dataset, split, seen):
            wrong.add(problem.column)
            yield problem
        bar.update(group.rows)
    if split == "train":
        seen.wrong |= wrong


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_group(
    group: RowGroup, columns: Iterable[str], dataset: Dataset, split: str, seen: _Seen
) -> Iterator[Problem]:
    features = {feature.name: feature for feature in dataset.features}
    with pq.ParquetFile(group.path, metadata=group.metadata) as file:
        for name in columns:
            try:
                column = file.read_row_group(group.index, columns=[name])[name]
            except (pa.ArrowException, OSError) as error:
                message = f"cannot be decoded: {(str(error) or type(error).__name__).splitlines()[0]}"
                yield Problem(str(group.path), group.index, name, None, message)
                continue
            if name in features:
                defect = _wrong_id(column, features[name], seen.counts.get(name) if split == "train" else None)
            elif name == dataset.label:
                defect = _wrong_label(column, seen.labels)
            else:
                defect = _wrong_number(column)
            if defect is not None:
                yield Problem(str(group.path), group.index, name, *defect)


Defect = tuple[int, str]  # the first row that is wrong, and what is wrong with it


def _null(column: pa.ChunkedArray) -> Defect | None:
    row = first_null(column)
    return None if row is None else (row, "is null; fill it when preparing the data")


def _wrong_id(column: pa.ChunkedArray, feature: Categorical, counts: NDArray[np.int64] | None) -> Defect | None:
    null = _null(column)
    if null:
        return null
    start = 0
    for chunk in column.chunks:
        ids = (chunk.flatten() if feature.multi else chunk).to_numpy()
        outside = (ids < 0) | (ids >= feature.num_ids)
        if outside.any() and not feature.hashed:
            at = int(outside.argmax())
            row = start + (_row_of(chunk, at) if feature.multi else at)
            return row, f"id {ids[at]} lies outside [0, {feature.num_ids})"
        if counts is not None:
            np.add.at(counts, ids, 1)
        start += len(chunk)
    return None


def _row_of(lists: pa.ListArray, position: int) -> int:
    """The list that holds the value at `position` of the flattened lists."""
    offsets = lists.offsets.to_numpy()
    return int(np.searchsorted(offsets[1:] - offsets[0], position, side="right"))


def _wrong_label(column: pa.ChunkedArray, seen: set[float]) -> Defect | None:
    null = _null(column)
    if null:
        return null
    labels = column.to_numpy()
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row = int(wrong.argmax())
        return row, f"label {labels[row]:g} is neither 0 nor 1"
    seen.update(np.unique(labels).tolist())
    return None


def _wrong_number(column: pa.ChunkedArray) -> Defect | None:
    null = _null(column)
    if null:
        return null
    start = 0
    for chunk in column.chunks:
        is_list = pa.types.is_list(chunk.type)
        values = (chunk.flatten() if is_list else chunk).to_numpy()
        wrong = ~np.isfinite(values)
        if wrong.any():
            at = int(wrong.argmax())
            return start + (_row_of(chunk, at) if is_list else at), f"value {values[at]:g} is not finite"
        start += len(chunk)
    return None


def _vocabulary(folder: Path, feature: Categorical) -> NDArray[np.int64] | Problem:
    """How often each id occurs in the training split, as the vocabulary says, or why it says nothing."""
    path = vocabulary_path(folder, feature.name)
    if not path.exists():
        message = "does not exist, so nothing knows how often ids occur; prepare the data again"
        return Problem(str(path), None, "count", None, message, warning=True)
    try:
        return read_counts(path, feature.num_ids)
    except DataError as error:
        return _problem(path, error, "count")


def _compare_counts(path: Path, described: NDArray[np.int64], seen: NDArray[np.int64]) -> Iterator[Problem]:
    differing = np.flatnonzero(described != seen)
    if differing.size:
        at = int(differing[0])
        message = (
            f"id {at} occurs {seen[at]} times in the training split but its count is {described[at]}"
            f" ({differing.size} of {len(seen)} ids differ)"
        )
        yield Problem(str(path), None, "count", None, message)
