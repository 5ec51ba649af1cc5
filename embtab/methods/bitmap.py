"""A bitmap that counts: which places are kept, and the how-manieth of those kept each of them is.

64 places share a word, and each word knows how many kept places came before it: 12 bytes for 64 places. Operators only,
so that it is read alike by torch and by NumPy. The structure is Jacobson's, "Space-efficient static trees and graphs",
FOCS 1989, with a single level.
"""

from __future__ import annotations

import numpy as np

from embtab.methods.base import Array, require
from embtab.methods.storage import ArraySpec

WORD = 64


def locate(bits: Array, starts: Array, at: Array) -> Array:
    """int64, like `at`: how many kept places are before a kept place; -1 where the place is not kept.

    Args:
        bits: int64 [words], place p is bit p % 64 of word p // 64.
        starts: int32 [words], kept places before each word.
        at: int64 [...], places within the bitmap.
    """
    word, place = bits[at >> 6], at & 63
    kept = (word >> place) & 1
    before = popcount(word & ((1 << place) - 1))
    return (before + starts[at >> 6] + 1) * kept - 1


def popcount(x: Array) -> Array:
    """Set bits of the 64-bit patterns of int64; the sign bit is masked wherever a right shift drags it along."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56) & 127


def bitmap(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words, int64, and the kept places before each of them, int32, of bool [places]."""
    padded = np.zeros(words(len(kept)) * WORD, dtype=bool)
    padded[: len(kept)] = kept
    bits = np.packbits(padded, bitorder="little").view("<i8").astype(np.int64)
    counts = padded.reshape(-1, WORD).sum(axis=1)
    return bits, (np.cumsum(counts) - counts).astype(np.int32)


def words(places: int) -> int:
    """Words that a bitmap of so many places takes."""
    return -(-places // WORD)


def specs(places: int, prefix: str, part: str) -> dict[str, ArraySpec]:
    """The arrays of a bitmap: `{prefix}bits` and `{prefix}starts`."""
    return {
        f"{prefix}bits": ArraySpec((words(places),), "int64", part=part),
        f"{prefix}starts": ArraySpec((words(places),), "int32", part=part),
    }


def check(bits: np.ndarray, starts: np.ndarray, places: int, kept: int) -> None:
    """Refuses a bitmap that keeps places beyond `places`, other than `kept` of them, or counts them wrong.

    Raises:
        UserError: that says so.
    """
    counts = popcount(np.asarray(bits, dtype=np.int64))
    require(int(counts.sum()) == kept, f"a bitmap keeps {int(counts.sum())} places, not {kept}")
    require(np.array_equal(np.cumsum(counts) - counts, starts), "a bitmap counts its places wrong")
    if places % WORD:
        require(int(bits[-1]) >> places % WORD == 0, f"a bitmap keeps a place beyond its {places}")


def some(places: int, kept: int, generator: np.random.Generator) -> np.ndarray:
    """Bool [places], of which `kept` at random are true; the same for generators in the same state."""
    chosen = np.zeros(places, dtype=bool)
    chosen[generator.permutation(places)[:kept]] = True
    return chosen
