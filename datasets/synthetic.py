"""Criteo-shaped data of any size whose best possible AUC is known.

13 dense columns, 26 categorical ones with the cardinalities of the Criteo Kaggle data times `scale`, ids that follow a
power law, and labels drawn from the planted model of `teacher.py`. Rows are written in the order of their numbers,
which stands for time: training first, then validation, then test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from embtab.datasets.schema import ROW_GROUP_ROWS, Categorical, Dataset, describe_files, open_writer
from embtab.datasets.splits import check_fractions, split_sizes
from embtab.datasets.teacher import Draws, Teacher, draw_rows, labels, logits
from embtab.errors import UserError
from embtab.files import new_folder

# Distinct values of C1 to C26 in the Criteo Kaggle training data: 33,762,577 in all.
CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
DENSE = tuple(f"I{i}" for i in range(1, 14))
ROWS_PER_FILE = 16 * ROW_GROUP_ROWS


def prepare(
    out: Path,
    *,
    rows: int = 1_000_000,
    scale: float = 1.0,
    seed: int = 0,
    multi: int = 0,
    dim: int = 8,
    ctr: float = 0.25,
    signal: float = 1.45,
    valid: float = 0.1,
    test: float = 0.1,
) -> Dataset:
    """Writes a generated dataset folder.

    Memory does not grow with `rows`; it holds one count per id. Any row is a function of its number and the options
    other than `rows`, `valid` and `test`.

    Args:
        out: the folder to make.
        rows: rows of all splits together.
        scale: multiplies the Criteo cardinalities; none falls below 4 (or the original, where that is smaller).
        seed: of everything.
        multi: how many features, from C1 on, have lists of 0 to 5 ids.
        dim: length of the id vectors of the planted pair interactions.
        ctr: expected label.
        signal: standard deviation of the true logit; 1.45 gives a Bayes-optimal AUC near 0.81.
        valid: fraction of the rows for validation.
        test: fraction of the rows for the test.

    Returns:
        The description, whose `bayes` is what the true probabilities reach on the test split.

    Raises:
        UserError: when an option is out of its range or `out` holds something.
    """
    options = {"rows": rows, "scale": scale, "seed": seed, "multi": multi, "dim": dim, "ctr": ctr, "signal": signal}
    options |= {"valid": valid, "test": test}
    if rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    check_fractions(valid, test)
    teacher = make_teacher(scale=scale, seed=seed, multi=multi, dim=dim, ctr=ctr, signal=signal)
    dataset = Dataset("synthetic", teacher.features, teacher.dense, source={"kind": "synthetic", **options})
    counts = {feature.name: np.zeros(feature.num_ids, np.int64) for feature in teacher.features}
    bayes = Ranking()
    with new_folder(Path(out)) as folder, tqdm(total=rows, unit="row", unit_scale=True, desc="synthetic") as bar:
        start = 0
        for split, size in split_sizes(rows, valid, test).items():
            for number, at in enumerate(range(start, start + size, ROWS_PER_FILE)):
                path = folder / split / f"part-{number:05}.parquet"
                stop = min(at + ROWS_PER_FILE, start + size)
                for table, log_odds in _write(path, dataset, teacher, at, stop):
                    if split == "train":
                        _count(table, counts)
                    if split == "test":
                        bayes.add(table["label"].to_numpy(), log_odds)
                    bar.update(len(table))
            start += size
        write_counts(folder / "vocab", counts)
        dataset = replace(dataset, files=describe_files(folder), bayes=bayes.result())
        dataset.save(folder)
    return dataset


def make_teacher(
    *, scale: float = 1.0, seed: int = 0, multi: int = 0, dim: int = 8, ctr: float = 0.25, signal: float = 1.45
) -> Teacher:
    """The planted model that `prepare` uses with the same options.

    Raises:
        UserError: when an option is out of its range.
    """
    if not 0 < scale <= 1000:
        raise UserError(f"scale must lie in (0, 1000], got {scale}")
    if not 0 <= multi <= len(CARDINALITIES):
        raise UserError(f"multi must lie in [0, {len(CARDINALITIES)}], got {multi}")
    if dim < 1:
        raise UserError(f"dim must be at least 1, got {dim}")
    if not 0 < ctr < 1:
        raise UserError(f"ctr must lie between 0 and 1, got {ctr}")
    if not 0 < signal <= 20:
        raise UserError(f"signal must lie in (0, 20], got {signal}")
    features = tuple(
        Categorical(f"C{i + 1}", max(min(ids, 4), round(ids * scale)), multi=i < multi)
        for i, ids in enumerate(CARDINALITIES)
    )
    return Teacher(features, DENSE, seed, dim, ctr, signal)


def generate(teacher: Teacher, start: int, stop: int) -> tuple[pa.Table, NDArray[np.float64]]:
    """The rows [start, stop), equal to the same rows of any other range.

    Returns:
        The table in the schema of the dataset's files, and the true logits, float64 [stop - start].
    """
    numbers = np.arange(start, stop, dtype=np.int64)
    draws = draw_rows(teacher, numbers)
    log_odds = logits(teacher, draws)
    schema = Dataset("synthetic", teacher.features, teacher.dense).arrow_schema()
    columns = {"label": pa.array(labels(teacher, log_odds, numbers))}
    columns |= {name: pa.array(values) for name, values in draws.dense.items()}
    columns |= {f.name: _arrow_ids(draws, f.name, schema.field(f.name).type) for f in teacher.features}
    return pa.table([columns[name] for name in schema.names], schema=schema), log_odds


def _arrow_ids(draws: Draws, name: str, kind: pa.DataType) -> pa.Array:
    if name not in draws.present:
        return pa.array(draws.ids[name][:, 0])
    present = draws.present[name]
    offsets = np.concatenate([[0], present.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, draws.ids[name][present], type=kind)


def _write(
    path: Path, dataset: Dataset, teacher: Teacher, start: int, stop: int
) -> Iterator[tuple[pa.Table, NDArray[np.float64]]]:
    """Writes the rows [start, stop) as one file and hands each row group on as (table, logits)."""
    with open_writer(path, dataset.arrow_schema()) as writer:
        for low in range(start, stop, ROW_GROUP_ROWS):
            table, log_odds = generate(teacher, low, min(low + ROW_GROUP_ROWS, stop))
            writer.write_table(table)
            yield table, log_odds


def _count(table: pa.Table, counts: dict[str, NDArray[np.int64]]) -> None:
    for name, seen in counts.items():
        for chunk in table[name].chunks:
            ids = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
            np.add.at(seen, ids.to_numpy(), 1)


def write_counts(folder: Path, counts: dict[str, NDArray[np.int64]]) -> None:
    """Writes vocabularies of ids that come from no raw values."""
    folder.mkdir()
    schema = pa.schema([pa.field("count", pa.int64(), nullable=False)])
    for name, seen in counts.items():
        pq.write_table(pa.table([seen], schema=schema), folder / f"{name}.parquet", compression="lz4")


_BINS_PER_UNIT, _LARGEST = 2**15, 32  # of the histogram of logits, which takes 32 MB


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(2 * _LARGEST * _BINS_PER_UNIT, np.int64)


@dataclass
class Ranking:
    """AUC and log loss of a stream of labels and logits in constant memory.

    The AUC counts pairs of logits within 2^-15 of each other as ties, about one pair in 10^5, and a tie counts half.
    """

    positives: NDArray[np.int64] = field(default_factory=_no_counts)
    negatives: NDArray[np.int64] = field(default_factory=_no_counts)
    loss: float = 0.0

    def add(self, labels: NDArray[np.float32], log_odds: NDArray[np.float64]) -> None:
        """Counts n rows in: labels [n] (0 or 1) and logits [n]."""
        bins = ((log_odds + _LARGEST) * _BINS_PER_UNIT).astype(np.int64).clip(0, len(self.positives) - 1)
        np.add.at(self.positives, bins[labels == 1], 1)
        np.add.at(self.negatives, bins[labels == 0], 1)
        self.loss += float((np.logaddexp(0, log_odds) - labels * log_odds).sum())

    def result(self) -> dict[str, float] | None:
        """`auc` and `logloss`; None unless both classes occurred."""
        positives, negatives = int(self.positives.sum()), int(self.negatives.sum())
        if not positives or not negatives:
            return None
        below = np.cumsum(self.negatives) - self.negatives / 2
        auc = float(self.positives @ below) / positives / negatives
        return {"auc": auc, "logloss": self.loss / (positives + negatives)}
