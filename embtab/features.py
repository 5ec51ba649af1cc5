"""A feature: one categorical column and what a planner must know about it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from embtab.errors import DataError, UserError, shown

POOLINGS = ("sum", "mean", "none")


@dataclass(frozen=True)
class Feature:
    """One categorical feature of a model.

    Args:
        name: column name; hash seeds derive from it (or from `id_space`), so renaming changes hashed rows.
        num_ids: cardinality; ids lie in [0, num_ids). Methods that hash take any int64 all the same.
        pooling: how the vectors of a bag become one: "sum", "mean", or "none" for sequences.
        counts: int64 [num_ids], how often each id occurs in the training data; None when unknown.
        id_space: a name shared by features whose ids mean the same things (a target item and the items of a
            history). They use one table and one hash seed, and must have equal `num_ids` and `hashed`.
        hashed: whether any int64 is an id: raw 64-bit numbers, without a vocabulary. `num_ids` then says about how many
            different ones there are; it shares out bytes and bounds nothing. Only methods that hash hold such ids.

    Raises:
        UserError: for an empty name, a cardinality that is not positive or not below 2^63, an unknown pooling, or
            counts that are no counts, of a wrong shape, or of hashed ids.
    """

    name: str
    num_ids: int
    pooling: str = "sum"
    counts: np.ndarray | None = field(default=None, compare=False, repr=False)
    id_space: str | None = None
    hashed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"a feature needs a name; got {shown(self.name)}")
        if not isinstance(self.id_space, str | None):
            raise UserError(f"feature {shown(self.name)}: id_space must be a name, got {shown(self.id_space)}")
        if not is_whole(self.num_ids) or not 1 <= self.num_ids < 2**63:
            raise UserError(
                f"feature {shown(self.name)}: num_ids must be a positive whole number below 2^63, "
                f"got {shown(self.num_ids)}"
            )
        if self.pooling not in POOLINGS:
            raise UserError(
                f"feature {shown(self.name)}: pooling must be one of {', '.join(POOLINGS)}, got {shown(self.pooling)}"
            )
        object.__setattr__(self, "num_ids", int(self.num_ids))
        if not isinstance(self.hashed, bool):
            raise UserError(f"feature {shown(self.name)}: hashed must be true or false, got {shown(self.hashed)}")
        if self.hashed and self.counts is not None:
            raise UserError(f"feature {shown(self.name)}: hashed ids are any int64, so they cannot have counts by id")
        if self.counts is not None:
            counts = self._whole_counts()
            if counts.shape != (self.num_ids,):
                raise UserError(
                    f"feature {shown(self.name)}: counts must have shape ({self.num_ids},), got {counts.shape}"
                )
            object.__setattr__(self, "counts", counts)

    def _whole_counts(self) -> np.ndarray:
        """The counts as int64.

        Raises:
            UserError: for one that is no count.
        """
        given = np.asarray(self.counts)
        if given.dtype.kind not in "iufb":
            raise UserError(f"feature {self.name!r}: counts must be whole numbers, got {given.dtype}")
        with np.errstate(invalid="ignore"):
            counts = given.astype(np.int64)
        wrong = (given < 0) | (counts != given)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"feature {self.name!r}: the count of id {at} is {given.flat[at]}; counts must be whole numbers, zero "
                "or more"
            )
        return counts

    @property
    def space(self) -> str:
        """The id space the feature belongs to; its own name unless it shares one."""
        return self.id_space or self.name


def is_whole(number: object) -> bool:
    """Whether it is an integer, of Python or NumPy."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def read_features(path: str | Path, counts: bool = True) -> list[Feature]:
    """The features of a prepared dataset folder, in column order.

    Args:
        path: a folder made by `embtab prepare`.
        counts: also read how often each id occurs in the training split, where the folder says so.

    Raises:
        DataError: when the folder holds no readable description, or a vocabulary of it cannot be read.
    """
    folder = Path(path)
    described = read_description(folder)
    features = []
    try:
        for entry in described["features"]:
            options = {name: entry[name] for name in ("pooling", "id_space", "hashed") if name in entry}
            features.append(Feature(entry["name"], entry["num_ids"], **options))
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise DataError(f"{folder / 'dataset.json'}: {error}; prepare the data again") from error
    paths = {feature.name: vocabulary_path(folder, feature.name) for feature in features}
    return [
        replace(feature, counts=read_counts(paths[feature.name], feature.num_ids))
        if counts and not feature.hashed and paths[feature.name].exists()
        else feature
        for feature in features
    ]


def vocabulary_path(folder: Path, feature: str) -> Path:
    """Where a prepared dataset keeps what is known of a feature's ids.

    Raises:
        DataError: when the feature's name would lead elsewhere.
    """
    if "/" in feature or "\0" in feature:
        raise DataError(f"{folder}: feature {shown(feature)}: a name with / is no file name; rename the column")
    return folder / "vocab" / f"{feature}.parquet"


def read_counts(path: Path, num_ids: int) -> np.ndarray:
    """How often each id occurs in the training data, int64 [num_ids], from a vocabulary of a prepared dataset.

    Raises:
        DataError: when the file cannot be read, or does not hold a count of each id.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{path}, column 'count'"
    try:
        with pq.ParquetFile(path) as file:
            counts = file.read(["count"])["count"]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{where}: cannot be read: {' '.join(str(error).split())}") from error
    if counts.type != pa.int64() or counts.null_count:
        raise DataError(f"{where}: must be int64 without nulls")
    if len(counts) != num_ids:
        raise DataError(f"{where}: has {len(counts)} rows but dataset.json says {num_ids} ids")
    found = counts.to_numpy()
    if (found < 0).any():
        raise DataError(f"{where}, row {(found < 0).argmax()}: is negative")
    return found


def read_description(folder: Path) -> dict:
    """The parsed `dataset.json` of a prepared dataset folder.

    Raises:
        DataError: when it is absent, unreadable or not a dataset description.
    """
    file = folder / "dataset.json"
    if not file.exists():
        raise DataError(f"{folder}: not a prepared dataset (no dataset.json); make one with `embtab prepare`")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not isinstance(described, dict) or described.get("format") != "embtab-dataset":
        raise DataError(f"{file}: not an embtab dataset description; prepare the data again")
    return described


def id_spaces(features: Iterable[Feature]) -> list[Feature]:
    """One feature per id space, named after the space, with the counts of its members added up.

    Raises:
        UserError: when they are no features, names repeat, or members of one space differ in cardinality or in what an
            id is.
    """
    spaces: dict[str, Feature] = {}
    names: set[str] = set()
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise UserError(f"features must be a list of embtab.Feature, got {type(features).__name__}; write [feature]")
    for feature in features:
        if not isinstance(feature, Feature):
            raise UserError(f"features must be a list of embtab.Feature, and one of them is {shown(feature)}")
        if feature.name in names:
            raise UserError(f"feature {shown(feature.name)} is listed twice; names must be unique")
        names.add(feature.name)
        known = spaces.get(feature.space)
        if known is None:
            spaces[feature.space] = Feature(
                feature.space, feature.num_ids, counts=feature.counts, hashed=feature.hashed
            )
            continue
        if known.num_ids != feature.num_ids:
            raise UserError(
                f"feature {shown(feature.name)} has {feature.num_ids} ids but its id space {shown(feature.space)} has "
                f"{known.num_ids}; features that share a space need equal num_ids"
            )
        if known.hashed != feature.hashed:
            raise UserError(
                f"feature {shown(feature.name)}: hashed must be that of its id space {shown(feature.space)}"
            )
        both = None if known.counts is None or feature.counts is None else known.counts + feature.counts
        spaces[feature.space] = replace(known, counts=both)
    return list(spaces.values())
