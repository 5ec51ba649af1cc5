"""Generated long histories with planted interests: which events matter to a target is known, and so is the best AUC.

Every item belongs to one interest and has a taste vector; a category holds several interests, so that category alone
does not find what matters. A user has a few interests, and in each of them a taste that her events follow. The true
logit of a target t is `signal` times the standardised mean of <taste_t, taste_e> over the *relevant* events e: those
of the target's own interest. So a model must find the relevant events (attention) and, apart from that, know what
they say about the target (representation).

Users of different splits are different people. The column `relevance` (1 for a relevant event, else 0) is not read into
batches; it is there to measure searches by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from embtab.datasets.histories import Ids, before, features_of, pieces, table_of, write_tables
from embtab.datasets.schema import Dataset, describe_files
from embtab.datasets.splits import check_fractions, split_sizes
from embtab.datasets.synthetic import Ranking, write_counts
from embtab.datasets.teacher import sigmoid
from embtab.errors import UserError
from embtab.files import new_folder

RELEVANCE = "relevance"
USER = "user_id"
_TASTE = 4  # width of a taste vector
_CHOICE = 4  # items among which a user takes the one that is most to her taste


def prepare(
    out: Path,
    *,
    users: int = 5_000,
    targets: int = 4,
    min_length: int = 150,
    max_length: int = 250,
    items: int = 5_000,
    interests: int = 50,
    per_category: int = 5,
    per_user: int = 6,
    signal: float = 1.5,
    valid: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Writes a generated dataset folder with the columns of `sequences.prepare` (but no user feature).

    Args:
        out: the folder to make.
        users: all splits together.
        targets: rows of each user; they share her history.
        min_length: of a history.
        max_length: of a history; lengths are uniform between the two.
        items: number of items.
        interests: number of interests; every interest has about `items / interests` items.
        per_category: interests that share a category.
        per_user: interests of a user.
        signal: standard deviation of the true logit.
        valid: fraction of the users for validation.
        test: fraction of the users for the test.
        seed: of everything.

    Returns:
        The description, whose `bayes` is what the true probabilities reach on the test split.

    Raises:
        UserError: when an option is out of its range or `out` holds something.
    """
    options = {"users": users, "targets": targets, "min_length": min_length, "max_length": max_length, "items": items}
    options |= {"interests": interests, "per_category": per_category, "per_user": per_user}
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if max_length < min_length or items < interests or interests < per_user:
        raise UserError("max_length must not be below min_length, nor items below interests, nor those below per_user")
    if not 0 < signal <= 20:
        raise UserError(f"signal must lie in (0, 20], got {signal}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    check_fractions(valid, test)
    world = World.drawn(items, interests, per_category, np.random.default_rng((seed, 0)))
    sizes = {"item": items, "category": int(world.category.max()) + 1, "position": max_length + 1}
    source = {"kind": "long-histories", "signal": signal, "seed": seed, "valid": valid, "test": test, **options}
    dataset = Dataset("long-histories", features_of(sizes), user=USER, unread=(RELEVANCE,), source=source)
    counts = {feature.name: np.zeros(feature.num_ids, np.int64) for feature in dataset.features}
    # The scale of the true logit comes from users of their own, so that no split depends on another.
    scale = signal / _spread(world, per_user, (min_length, max_length), np.random.default_rng((seed, 1)))
    with new_folder(Path(out)) as folder, tqdm(total=users, unit="user", unit_scale=True, desc="histories") as bar:
        start = 0
        bayes = Ranking()
        for number, (split, size) in enumerate(split_sizes(users, valid, test).items()):
            rng = np.random.default_rng((seed, 2, number))
            tables = _tables(world, dataset, start, size, scale, rng, bayes if split == "test" else None, bar)
            write_tables(folder, split, dataset, tables, counts if split == "train" else None)
            start += size
        write_counts(folder / "vocab", counts)
        dataset = replace(dataset, files=describe_files(folder), bayes=bayes.result())
        dataset.save(folder)
    return dataset


@dataclass(frozen=True)
class World:
    """What is true of items: interest and category int64 [I], taste float [I, T]; items ordered by interest.

    Attributes:
        first: int64 [number of interests + 1], where the items of each interest begin.
    """

    interest: Ids
    category: Ids
    taste: NDArray[np.float64]
    first: Ids

    @classmethod
    def drawn(cls, items: int, interests: int, per_category: int, rng: np.random.Generator) -> World:
        """A world with random tastes of length 1 on average, and categories of random interests."""
        first = np.arange(interests + 1) * items // interests
        interest = np.repeat(np.arange(interests), np.diff(first))
        category = rng.permutation(interests) // per_category
        return cls(interest, category[interest], rng.normal(size=(items, _TASTE)) / np.sqrt(_TASTE), first)

    def any_item(self, interests: Ids, rng: np.random.Generator) -> Ids:
        """A uniform item of each interest named."""
        size = self.first[interests + 1] - self.first[interests]
        drawn: Ids = self.first[interests] + rng.integers(0, size)
        return drawn

    def affinity(self, targets: Ids, events: Ids, owner: Ids) -> NDArray[np.float64]:
        """[n]: the mean of <taste_t, taste_e> over the relevant events; 0 where there is none.

        Args:
            targets: int64 [n], items.
            events: int64 [N], items of all histories.
            owner: int64 [N], the target that each event belongs to.
        """
        relevant = self.interest[events] == self.interest[targets][owner]
        owner, events = owner[relevant], events[relevant]
        agreement = np.einsum("nt,nt->n", self.taste[targets[owner]], self.taste[events])
        sums = np.bincount(owner, agreement, minlength=len(targets))
        means: NDArray[np.float64] = sums / np.maximum(np.bincount(owner, minlength=len(targets)), 1)
        return means


def draw_user(world: World, per_user: int, length: int, targets: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """The items of one user's history [length], and her target items [targets], drawn from her interests."""
    mine = rng.choice(len(world.first) - 1, per_user, replace=False)
    share = rng.dirichlet(np.full(per_user, 2.0))
    taste = rng.normal(size=(per_user, _TASTE))
    which = rng.choice(per_user, length, p=share)
    offers = world.any_item(np.repeat(mine[which], _CHOICE), rng).reshape(length, _CHOICE)
    liked = np.einsum("lct,lt->lc", world.taste[offers], taste[which]).argmax(1)
    asked = world.any_item(mine[rng.choice(per_user, targets, p=share)], rng)
    return offers[np.arange(length), liked], asked


def _spread(world: World, per_user: int, lengths: tuple[int, int], rng: np.random.Generator) -> float:
    """The standard deviation of the affinity over drawn users."""
    found = []
    for _ in range(500):
        history, targets = draw_user(world, per_user, int(rng.integers(lengths[0], lengths[1] + 1)), 4, rng)
        owner = np.repeat(np.arange(4), len(history))
        found.append(world.affinity(targets, np.tile(history, 4), owner))
    return float(np.std(found))


def _tables(
    world: World,
    dataset: Dataset,
    start: int,
    users: int,
    scale: float,
    rng: np.random.Generator,
    bayes: Ranking | None,
    bar: tqdm,
) -> Iterator[pa.Table]:
    """The rows of users start, start + 1, ...; counts their true logits in where `bayes` is given."""
    options = dataset.source
    repeats = options["targets"]
    lengths = rng.integers(options["min_length"], options["max_length"] + 1, users)
    for low, high in pieces(lengths * repeats, repeats):
        drawn = [draw_user(world, options["per_user"], int(n), repeats, rng) for n in lengths[low:high]]
        targets = np.concatenate([asked for _, asked in drawn])
        events = np.concatenate([np.tile(history, repeats) for history, _ in drawn])
        counts = np.repeat(lengths[low:high], repeats)
        owner = np.repeat(np.arange(len(targets)), counts)
        logits = scale * world.affinity(targets, events, owner)
        labels = (rng.random(len(targets)) < sigmoid(logits)).astype(np.float32)
        if bayes is not None:
            bayes.add(labels, logits)
        columns = {"label": labels, "item": targets, "category": world.category[targets]}
        columns |= {"position": np.zeros(len(targets), np.int64)}
        columns |= {USER: np.repeat(np.arange(start + low, start + high), repeats)}
        relevance = (world.interest[events] == world.interest[targets][owner]).astype(np.float32)
        lists = {"history_item": events, "history_category": world.category[events], RELEVANCE: relevance}
        lists |= {"history_position": before(np.cumsum(counts), counts)[1]}
        yield table_of(dataset, columns, lists, counts)
        bar.update(high - low)
