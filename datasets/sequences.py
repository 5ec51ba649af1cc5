"""Behaviour sequences: for each target item the events before it, with negatives that the user never touched.

Two ways to split, both in time order:

- leave-one-out: a user's last event is the test, the one before it validation, earlier ones train. Each event of valid
  and test comes with many negatives, so that it can be ranked among them (HR@k, NDCG@k).
- time: all users' events are cut at two moments. Needs a format with times.

A row's history holds the user's events before the target and nothing later, whatever split they fall in. Negatives are
items that the user never touched, as far as the split knows: a training negative may be an item of her test, since to
spare it would tell which items the test holds. Ids are by descending count among the training events; id 0 stands for
what they do not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from embtab.datasets import vocabulary
from embtab.datasets.events import Events, read_events
from embtab.datasets.histories import Ids, before, features_of, pieces, table_of, write_tables
from embtab.datasets.negatives import SAMPLERS, Negatives
from embtab.datasets.schema import SPLITS, Categorical, Dataset, describe_files
from embtab.datasets.splits import check_fractions
from embtab.errors import DataError, UserError
from embtab.files import new_folder

WAYS = ("leave-one-out", "time")
USER = "user_id"  # the user's number; in the feature `user`, all users that train does not hold are one


def prepare(
    raw: Path,
    out: Path,
    *,
    kind: str = "auto",
    split: str = "leave-one-out",
    max_history: int = 200,
    targets: int = 20,
    negatives: int = 1,
    eval_negatives: int = 99,
    sampler: str = "uniform",
    min_events: int = 3,
    valid: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Turns a behaviour log into a dataset folder.

    Features: `user` and what is known of users; `item`, `category` (where the format has one) and `position`, which
    describe the target; `history_item`, `history_category`, `history_position`, lists with pooling "none" that share
    the id space of their target (`items`, `categories`, `positions`), oldest event first. A position counts the events
    back from the target, which itself is at 0. `user_id` is the user's number, for metrics grouped by user.

    Args:
        raw: the log; see datasets/events.py for the formats.
        out: the folder to make; it must not exist, or be empty.
        kind: the format; "auto" tells it from the file's name.
        split: "leave-one-out" or "time".
        max_history: the most recent events kept of a history.
        targets: training targets per user, the most recent ones.
        negatives: per target of the training split.
        eval_negatives: per target of the other splits; a log's published negatives of the test take their place.
        sampler: "uniform" or "popularity".
        min_events: users with fewer events are left out.
        valid: fraction of the events, with split "time".
        test: the same.
        seed: of the negatives.

    Raises:
        UserError: for a bad option value, or an output folder that is not empty.
        DataError: for a missing or bad file, naming file and line. No output is left behind.
    """
    options = {"split": split, "max_history": max_history, "targets": targets, "negatives": negatives}
    options |= {"eval_negatives": eval_negatives, "min_events": min_events}
    _check_options(options, sampler, seed)
    check_fractions(valid, test)
    options |= {"sampler": sampler, "seed": seed} | ({"valid": valid, "test": test} if split == "time" else {})
    with new_folder(Path(out)) as folder:
        events = read_events(Path(raw), kind)
        if split == "time" and not events.has_times:
            raise UserError(f"{raw}: has no times, only an order; use split leave-one-out")
        log = _Log.of(events, min_events, raw)
        dropped = {**events.dropped, f"users with fewer than {min_events} events": log.dropped}
        source = {"kind": "sequences", "events": len(log.users), "options": options, "dropped": dropped}
        try:
            part = _left_out(log) if split == "leave-one-out" else _cut_in_time(log, valid, test)
            return _Preparation(events, log, part, options, source).write(folder)
        except UserError as error:
            raise DataError(f"{raw}: {error}") from error


def _check_options(options: dict[str, Any], sampler: str, seed: int) -> None:
    if options["split"] not in WAYS:
        raise UserError(f"split must be one of {', '.join(WAYS)}; got {options['split']!r}")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    least = {"max_history": 1, "targets": 1, "negatives": 1, "eval_negatives": 1, "min_events": 3}
    for name, value in least.items():
        if options[name] < value:
            raise UserError(f"{name} must be {value} or more, got {options[name]}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")


@dataclass(frozen=True)
class _Log:
    """Events as numbers: user and item [E], place in the user's history [E], its length [U], names and times."""

    users: Ids
    items: Ids
    place: Ids
    lengths: Ids
    user_names: list[str]
    item_names: list[str]
    times: Ids | None
    dropped: int

    @classmethod
    def of(cls, events: Events, min_events: int, raw: Path) -> _Log:
        rows = events.rows.filter(pl.len().over("user") >= min_events)
        if rows.is_empty():
            raise DataError(f"{raw}: no user has {min_events} events or more; lower min_events or give more data")
        user_names = rows["user"].unique(maintain_order=True)
        item_names = rows["item"].unique().sort()
        users = rows["user"].cast(pl.Enum(user_names)).to_physical().cast(pl.Int64).to_numpy()
        items = rows["item"].cast(pl.Enum(item_names)).to_physical().cast(pl.Int64).to_numpy()
        lengths = np.bincount(users)
        place = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        times = rows["time"].to_numpy() if events.has_times else None
        dropped = events.rows["user"].n_unique() - len(user_names)
        return cls(users, items, place, lengths, user_names.to_list(), item_names.to_list(), times, dropped)


def _left_out(log: _Log) -> NDArray[np.int8]:
    """The split of each event, as its number in SPLITS: the last event of a user is 2, the one before it 1."""
    from_end = log.lengths[log.users] - 1 - log.place
    part: NDArray[np.int8] = np.maximum(2 - from_end, 0).astype(np.int8)
    return part


def _cut_in_time(log: _Log, valid: float, test: float) -> NDArray[np.int8]:
    """The same, by the moment of the event; events of one moment stay together."""
    assert log.times is not None
    ordered = np.sort(log.times)
    last = len(ordered) - 1
    first_valid = ordered[min(round(len(ordered) * (1 - valid - test)), last)]
    first_test = ordered[min(round(len(ordered) * (1 - test)), last)] if test else ordered[-1] + 1
    if first_valid == ordered[0]:
        raise DataError(f"valid {valid} and test {test} leave no moment for training; the events are too few")
    part: NDArray[np.int8] = (log.times >= first_valid).astype(np.int8) + (log.times >= first_test)
    return part


@dataclass(frozen=True)
class _Preparation:
    """What `prepare` knows once the log is read and every event has its split."""

    events: Events
    log: _Log
    part: NDArray[np.int8]
    options: dict[str, Any]
    source: dict[str, Any]

    def write(self, folder: Path) -> Dataset:
        chosen = [self._targets(number) for number in range(len(SPLITS))]
        if not len(chosen[0]):
            raise DataError("no event is left for training; use more data, or a lower valid and test")
        values, of_item, of_user = self._encode(chosen[0])
        sizes = {name: len(texts) for name, texts in values.items()}
        users = tuple(Categorical(name, sizes[name]) for name in of_user)
        features = users + features_of({name: sizes[name] for name in (*of_item, "position")})
        dataset = Dataset(self.events.name, features, user=USER, source=self.source)
        counts = {feature.name: np.zeros(feature.num_ids, np.int64) for feature in features}
        rng = np.random.default_rng(self.options["seed"])
        with tqdm(total=sum(map(len, chosen)), unit="target", unit_scale=True, desc="sequences") as bar:
            for split, targets in zip(SPLITS, chosen, strict=True):
                if len(targets):
                    candidates = self._candidates(split, targets, rng)
                    tables = self._tables(dataset, targets, candidates, of_item, of_user, bar)
                    write_tables(folder, split, dataset, tables, counts if split == "train" else None)
        values |= {f"history_{name}": values[name] for name in (*of_item, "position")}
        named = {name: pl.DataFrame({"value": values[name], "count": seen}) for name, seen in counts.items()}
        vocabulary.save(named, folder)
        dataset = replace(dataset, files=describe_files(folder))
        dataset.save(folder)
        return dataset

    def _tables(
        self,
        dataset: Dataset,
        targets: Ids,
        candidates: Ids,
        of_item: dict[str, Ids],
        of_user: dict[str, Ids],
        bar: tqdm,
    ) -> Iterator[pa.Table]:
        """The rows of the targets, each followed by its negatives."""
        log, repeats = self.log, candidates.shape[1]
        lengths = np.minimum(log.place[targets], self.options["max_history"])
        for low, high in pieces(lengths * repeats, repeats):
            users = np.repeat(log.users[targets[low:high]], repeats)
            columns = {name: ids[users] for name, ids in of_user.items()} | {USER: users}
            columns |= {name: ids[candidates[low:high].ravel()] for name, ids in of_item.items()}
            columns["label"] = np.tile(np.arange(repeats) == 0, high - low).astype(np.float32)
            columns["position"] = np.zeros(len(users), np.int64)
            stops, counts = np.repeat(targets[low:high], repeats), np.repeat(lengths[low:high], repeats)
            events, ages = before(stops, counts)
            lists = {f"history_{name}": ids[log.items[events]] for name, ids in of_item.items()}
            yield table_of(dataset, columns, lists | {"history_position": ages}, counts)
            bar.update(high - low)

    def _targets(self, number: int) -> Ids:
        """The events of a split that have an event before them; in train, the last few of each user."""
        log, events = self.log, np.flatnonzero((self.part == number) & (self.log.place > 0))
        if number == 0:
            trained = np.bincount(log.users[self.part == 0], minlength=len(log.lengths))
            events = events[log.place[events] >= trained[log.users[events]] - self.options["targets"]]
        return events

    def _candidates(self, split: str, targets: Ids, rng: np.random.Generator) -> Ids:
        """int64 [T, 1 + n]: items of each target, the positive first; number I stands for an unknown item."""
        known = self.part <= SPLITS.index(split)
        users, positive = self.log.users[targets], self.log.items[targets][:, None]
        if split == "test" and self.events.negatives and self.options["split"] == "leave-one-out":
            return np.concatenate([positive, self._published(users)], axis=1)
        count = self.options["negatives" if split == "train" else "eval_negatives"]
        items, sampler = self.log.items, self.options["sampler"]
        negatives = Negatives(self.log.users[known], items[known], len(self.log.item_names), sampler)
        return np.concatenate([positive, negatives.draw(users, count, rng)], axis=1)

    def _published(self, users: Ids) -> Ids:
        number = {name: i for i, name in enumerate(self.log.item_names)}
        rows = []
        for user in users:
            name = self.log.user_names[user]
            given = self.events.negatives.get(name, [])
            rows.append([number.get(item, len(number)) for item in given])
            if not given or len(given) != len(rows[0]):
                raise DataError(f"user {name} has {len(given)} published negatives, not as many as the first user")
        return np.array(rows, dtype=np.int64)

    def _encode(self, train: Ids) -> tuple[dict[str, pl.Series], dict[str, Ids], dict[str, Ids]]:
        """The values of each column's ids, and the ids of the columns of each item (and of an unknown one) and user."""
        log = self.log
        users = np.bincount(log.users[train], minlength=len(log.user_names))
        items = np.bincount(log.items[self.part == 0], minlength=len(log.item_names))
        of_user = {name: _encoded(texts, users) for name, texts in self._sides().items()}
        of_item = {"item": _encoded(log.item_names, items)}
        if self.events.categories is not None:
            texts = [self.events.categories.get(item, "") for item in log.item_names]
            of_item["category"] = _encoded(texts, items)
        values = {name: texts for name, (texts, _) in (of_user | of_item).items()}
        values["position"] = pl.Series([str(age) for age in range(self.options["max_history"] + 1)])
        with_unknown = {name: np.append(ids, 0) for name, (_, ids) in of_item.items()}
        return values, with_unknown, {name: ids for name, (_, ids) in of_user.items()}

    def _sides(self) -> dict[str, list[str]]:
        """The user's name, and what else is known of users, in the order of their numbers."""
        known = pl.DataFrame({"user": self.log.user_names})
        if self.events.sides is not None:
            known = known.join(self.events.sides, on="user", how="left", maintain_order="left").fill_null("")
        return {name: known[name].to_list() for name in known.columns}


def _encoded(texts: Sequence[str], counts: Ids) -> tuple[pl.Series, Ids]:
    """The values by id (null for id 0), in the order of descending counts, and the id of each text."""
    table = pl.DataFrame({"value": texts, "count": counts}).group_by("value").sum().filter(pl.col("count") > 0)
    table = table.sort(["count", "value"], descending=[True, False])
    position = pl.Series(texts).cast(pl.Enum(table["value"]), strict=False).to_physical()
    ids: Ids = (position.cast(pl.Int64) + 1).fill_null(0).to_numpy().copy()
    return pl.concat([pl.Series("value", [None], dtype=pl.String), table["value"]]), ids
