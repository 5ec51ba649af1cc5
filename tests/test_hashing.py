"""The hash is a contract with every bundle ever written: its values may never change."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embtab.hashing import MAX_ROWS, hash_rows, mix64, seed_of
from embtab.reader.decoders import hash_rows as hash_rows_unsigned

EXTREMES = [0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63)]
GOLDEN_SEEDS = {"C1": -3587407675255231606, "item": -1888469649977780597}
GOLDEN_ROWS = [777267, 637667, 761970, 815623, 745024, 269979, 746574]
int64s = st.integers(-(2**63), 2**63 - 1)


def exact(id_: int, seed: int, num_rows: int) -> int:
    """The definition in Python's unbounded integers."""
    mask = 2**64 - 1
    z = (id_ + seed) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return ((z >> 33) * num_rows) >> 31


def test_published_splitmix64_sequence() -> None:
    """The generator seeded with 1234567 (the widely used test vector): state k is seed + k * golden gamma."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * gamma) % 2**64 for k in range(1, 5)], dtype=np.uint64).view(np.int64)
    assert mix64(states).view(np.uint64).tolist() == expected


def test_golden_values() -> None:
    assert seed_of("C1", 0, 0) == GOLDEN_SEEDS["C1"]
    assert seed_of("item", 1, 7) == GOLDEN_SEEDS["item"]
    rows = hash_rows(torch.tensor(EXTREMES), seed_of("C1", 0, 0), 1_000_003)
    assert rows.tolist() == GOLDEN_ROWS


@given(st.lists(int64s, min_size=1), int64s, st.integers(1, MAX_ROWS))
def test_torch_numpy_unsigned_and_unbounded_agree(ids: list[int], seed: int, num_rows: int) -> None:
    array = np.array(ids, dtype=np.int64)
    expected = [exact(i, seed, num_rows) for i in ids]
    with np.errstate(over="ignore"):
        assert hash_rows(array, np.int64(seed), np.int64(num_rows)).tolist() == expected
    assert hash_rows(torch.from_numpy(array), seed, num_rows).tolist() == expected
    assert hash_rows_unsigned(array, seed, num_rows).tolist() == expected
    assert all(0 <= row < num_rows for row in expected)


def test_mix64_is_a_bijection_on_a_sample() -> None:
    ids = np.arange(-500_000, 500_000)
    assert len(np.unique(mix64(ids))) == len(ids)


def test_rows_are_uniform() -> None:
    """Chi-square over 64 rows for consecutive ids: the statistic of 63 degrees of freedom stays below its 1e-6 tail."""
    counts = np.bincount(hash_rows(np.arange(100_000), seed_of("a", 0, 0), 64), minlength=64)
    expected = 100_000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 140


@pytest.mark.parametrize("other", [("b", 0, 0), ("a", 1, 0), ("a", 0, 1)])
def test_seeds_of_names_chunks_and_users_are_independent(other: tuple[str, int, int]) -> None:
    ids, num_rows = np.arange(200_000), 1000
    same = hash_rows(ids, seed_of("a", 0, 0), num_rows) == hash_rows(ids, seed_of(*other), num_rows)
    assert abs(same.mean() - 1 / num_rows) < 5 * np.sqrt(1 / num_rows / len(ids))


def test_joint_collisions_of_two_chunks() -> None:
    """2000 ids, 64 rows, two chunks: N (N - 1) / 2 / 64^2 = 488 pairs collide in both."""
    ids = np.arange(2000)
    pairs = hash_rows(ids, seed_of("a", 0, 0), 64) * 64 + hash_rows(ids, seed_of("a", 1, 0), 64)
    counts = np.bincount(pairs)
    assert abs((counts * (counts - 1) // 2).sum() - 488) < 5 * np.sqrt(488)
