"""One hash for everything: exact in torch, NumPy, ONNX Runtime and 64-bit C or Java.

The splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) on the 64-bit pattern of `id + seed`; its top 31 bits are
reduced to rows by multiply-shift (Lemire, 2019), which never overflows for fewer than 2^31 rows. Everything is written
with operators on int64, so the same source runs on torch tensors and NumPy arrays: int64 products wrap, and right
shifts are masked because they would drag the sign along.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

Array = Any  # a torch.Tensor or a numpy.ndarray of int64

MAX_ROWS = 2**31 - 1


def _signed(pattern: int) -> int:
    """The int64 with the bits of `pattern`."""
    return pattern - 2**64 if pattern >= 2**63 else pattern


_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def mix64(x: Array) -> Array:
    """The splitmix64 finaliser: a bijection of int64 in which every input bit moves every output bit."""
    x = _stirred(x)
    return x ^ ((x >> 31) & (2**33 - 1))


def _stirred(x: Array) -> Array:
    """The finaliser before its last step, which leaves the top 31 bits as they are."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MULTIPLIER_1
    return (x ^ ((x >> 27) & (2**37 - 1))) * _MULTIPLIER_2


def hash_rows(ids: Array, seed: Array, num_rows: Array) -> Array:
    """Rows in [0, num_rows) for ids, uniform and independent between seeds.

    Args:
        ids: int64 of any shape; every int64 is allowed.
        seed: int64 that broadcasts against ids; see `seed_of`.
        num_rows: int64 in [1, 2^31) that broadcasts against ids.
    """
    top31 = (_stirred(ids + seed) >> 33) & (2**31 - 1)
    return ((top31 * num_rows) >> 31) & (2**33 - 1)  # the mask says to exporters that no sign is shifted in


def expected_collisions(num_ids: int, combinations: int) -> float:
    """How many of `num_ids` ids share their place with another one, in expectation.

    Args:
        num_ids: ids, each thrown independently.
        combinations: equally likely places: rows, or the product of the rows of independent hashes.
    """
    if num_ids < 2:
        return 0.0
    if combinations == 1:
        return float(num_ids)
    return -num_ids * math.expm1((num_ids - 1) * math.log1p(-1 / combinations))


def seed_of(space: str, part: int, user_seed: int) -> int:
    """The int64 seed of one part (chunk) of one id space.

    It depends on the space's name, never on its position, so adding or reordering features moves no other row.
    """
    digest = hashlib.sha256(f"{space}\x1f{part}\x1f{user_seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
