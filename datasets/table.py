"""Any CSV or Parquet table, whose columns' roles a YAML file names, to a dataset folder.

Memory stays flat in the number of rows: files are read in pieces, checked, and put down as columns in a staging folder
inside the unfinished output, which is removed at the end, also after an error. polars then counts the values of the
training split and joins their ids on, streaming over that folder. What is held are the vocabularies, and 16 bytes a row
while the splits are cut.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tqdm import tqdm

from embtab.datasets import vocabulary
from embtab.datasets.roles import KEY, Roles
from embtab.datasets.roles_file import read_roles
from embtab.datasets.schema import SPLITS, Categorical, Dataset, describe_files
from embtab.datasets.splits import split_sizes, write_split
from embtab.datasets.table_columns import Stager, check_columns
from embtab.datasets.table_files import TableFile, find_files
from embtab.datasets.table_ids import count_values, raw_num_ids, save_raw_counts
from embtab.errors import DataError, UserError
from embtab.files import new_folder


def prepare(raw: Sequence[Path], out: Path, *, roles: Roles | Path) -> Dataset:
    """Turns a table into a dataset folder.

    Labels become float32; dense columns float32 through their transform; categorical columns int64 ids and lists of
    them list<int64>, by descending count in train (ties in the order of the values), with id 0 for values that are
    rare in train or do not occur there. A null category is the value "", like any other. Columns that share an id space
    share a vocabulary, counted over all of them. Raw and hashed ids are written as they are, and of hashed ones nothing
    is counted. The user becomes a number of its own
    for each value, for metrics grouped by user.

    Rows keep the order of the files within their split. By time, splits are cut at two moments, and rows of one moment
    stay together: nothing in train is later than anything in valid, nor that than anything in test.

    Args:
        raw: files or folders of them; Parquet, or CSV, plain or gzip.
        out: the folder to make; it must not exist, or be empty.
        roles: of the columns, or a YAML file of them; see `roles_file`.

    Raises:
        UserError: for a mistake in the roles, or an output folder that is not empty.
        DataError: for a bad file, naming file, column and row. No output is left behind.
    """
    given = roles if isinstance(roles, Roles) else read_roles(roles)
    files = find_files(raw, given.csv)
    check_columns(files, given)
    numbers = _splits_of_files(files, given)
    with new_folder(out) as folder:
        staging = folder / "staging"
        stager = _stage(files, numbers, given, staging)
        rows = pl.scan_parquet(sorted(staging.iterdir()), glob=False)
        distinct = {space: each.count for space, each in stager.distinct.items()}
        dataset = _write(folder, rows, given, distinct, _source(files, given, stager))
        shutil.rmtree(staging)
        dataset = replace(dataset, files=describe_files(folder))
        dataset.save(folder)
    return dataset


def _splits_of_files(files: Sequence[TableFile], roles: Roles) -> list[int]:
    """The split of each file, 0 to 2, where the roles share out files; else 0."""
    if roles.split.by != "files":
        return [0] * len(files)
    numbers, unused = [], {pattern for patterns in roles.split.names.values() for pattern in patterns}
    for file in files:
        found = {
            (SPLITS.index(split), pattern)
            for split, patterns in roles.split.names.items()
            for pattern in patterns
            if fnmatch(file.name, pattern)
        }
        if len({number for number, _ in found}) > 1:
            raise DataError(f"{file.path}: two splits name it; change the patterns of the split")
        numbers.append(next(iter(found))[0] if found else 0)
        unused -= {pattern for _, pattern in found}
    if unused:
        names = ", ".join(file.name for file in files[:10])
        raise UserError(f"split by files: no file is named {sorted(unused)[0]!r}; there are {names}")
    return numbers


def _stage(files: Sequence[TableFile], numbers: Sequence[int], roles: Roles, staging: Path) -> Stager:
    staging.mkdir()
    stager = Stager(roles)
    total = sum(file.path.stat().st_size for file in files)
    pieces = 0
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True) as bar:
        for file, number in zip(files, numbers, strict=True):
            for piece in file.pieces(list(roles.columns), roles.csv, bar):
                table = stager.staged(piece, number)
                table.write_parquet(staging / f"{pieces:08}.parquet", compression="lz4", statistics=False)
                pieces += 1
    return stager


def _source(files: Sequence[TableFile], roles: Roles, stager: Stager) -> dict[str, Any]:
    return {
        "kind": "table",
        "files": [file.name for file in files],
        "rows": stager.rows,
        "nulls": stager.nulls,
        "unused": [column for column in files[0].columns if column not in roles.columns],
        "options": json.loads(json.dumps(asdict(roles))),  # as it will be read again
    }


def _write(
    folder: Path, rows: pl.LazyFrame, roles: Roles, distinct: Mapping[str, int], source: dict[str, Any]
) -> Dataset:
    """Counts, encodes and writes staged rows."""
    sizes, parts = _parts(rows, roles)
    train = parts["train"]
    with tqdm(roles.features, desc="counting", unit="column") as bar:
        vocabularies = count_values(train, bar)
    vocabulary.save(vocabularies, folder)
    raw = raw_num_ids(rows, roles)
    for name, size in raw.items():
        save_raw_counts(train.select(vocabulary.exactly(name)), size, folder)
    hashed = {each.column: each.num_ids or distinct[each.space] for each in roles.features if each.hashed}
    num_ids = {name: table.height for name, table in vocabularies.items()} | raw | hashed
    dataset = Dataset(
        name=roles.name,
        features=_categoricals(roles, num_ids),
        dense=tuple(dense.column for dense in roles.dense),
        label=roles.label,
        user=roles.user_number,
        source=source,
    )
    if roles.user_number is not None:
        vocabularies[roles.user_number] = vocabulary.fit(rows.select(vocabulary.exactly(roles.user_number)))
    with tqdm(total=sum(sizes.values()), desc="encoding", unit="row", unit_scale=True) as bar:
        for split, part in parts.items():
            write_split(folder, split, dataset, _stream(vocabulary.encode(part, vocabularies), bar))
    return dataset


def _categoricals(roles: Roles, num_ids: Mapping[str, int]) -> tuple[Categorical, ...]:
    shared = {feature.of for feature in roles.features}
    columns = [
        Categorical(
            feature.column,
            num_ids[feature.column],
            feature.pooling,
            feature.space if feature.of is not None or feature.column in shared else None,
            feature.is_list,
            feature.hashed,
        )
        for feature in roles.features
    ]
    return (*columns, *(Categorical(name, num_ids[name]) for name in roles.derived))


def _stream(rows: pl.LazyFrame, bar: tqdm) -> Iterator[pl.DataFrame]:
    for batch in rows.collect_batches(engine="streaming"):
        bar.update(batch.height)
        yield batch


def _parts(rows: pl.LazyFrame, roles: Roles) -> tuple[dict[str, int], dict[str, pl.LazyFrame]]:
    """The number of rows of each split, and the rows; a split without rows is left out.

    Raises:
        DataError: when nothing is left for training, or all rows of a split have the moment of an earlier one's.
    """
    keys = rows.select(KEY).collect(engine="streaming")[KEY].to_numpy()
    first_valid, first_test = _cuts(keys, roles)
    num_valid, num_test = int(((keys >= first_valid) & (keys < first_test)).sum()), int((keys >= first_test).sum())
    sizes = dict(zip(SPLITS, (len(keys) - num_valid - num_test, num_valid, num_test), strict=True))
    if not sizes["train"]:
        raise DataError("no row falls into train; give the split other shares, values or files")
    key = pl.col(KEY)
    wanted = (key < first_valid, (key >= first_valid) & (key < first_test), key >= first_test)
    parts = {split: rows.filter(where) for split, where in zip(SPLITS, wanted, strict=True) if sizes[split]}
    return {split: size for split, size in sizes.items() if size}, parts


def _cuts(keys: NDArray[np.float64], roles: Roles) -> tuple[float, float]:
    """The first keys of valid and of test."""
    way = roles.split
    if way.by in ("column", "files"):
        return 1.0, 2.0
    sizes = split_sizes(len(keys), way.valid, way.test)
    begin = sizes["train"], sizes["train"] + sizes.get("valid", 0)
    first_valid, first_test = np.append(np.sort(keys), np.inf)[list(begin)]
    if first_valid == keys.min() or (begin[0] < begin[1] and first_valid == first_test):
        shares = f"valid {way.valid} and test {way.test}"
        raise DataError(f"{shares}: too many rows are of one moment to cut the time there; give other shares")
    return float(first_valid), float(first_test)
