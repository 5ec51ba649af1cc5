"""What is stored: physical tables and further arrays, and the bytes of each."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """How a number of a served row is stored; training is in float32 whatever the precision."""

    name: str
    bits: int
    row_overhead: int
    """Bytes beside the numbers of a row: a float16 scale and a float16 offset for the integer forms."""

    def row_bytes(self, width: int) -> int:
        """Serving bytes of a row of `width` numbers."""
        return -(-width * self.bits // 8) + self.row_overhead


PRECISIONS = {
    "fp32": Precision("fp32", 32, 0),
    "fp16": Precision("fp16", 16, 0),
    "int8": Precision("int8", 8, 4),
    "int4": Precision("int4", 4, 4),
}


@dataclass(frozen=True)
class Table:
    """A physical table: a matrix of `num_rows` x `width`. A lookup backend knows nothing but these."""

    name: str
    num_rows: int
    width: int
    precision: str = "fp32"

    @property
    def shared(self) -> bool:
        """Whether id spaces share it; the names of such tables start with "@"."""
        return self.name.startswith("@")

    @property
    def shape(self) -> str:
        """For people: "1000 x 16 fp32"."""
        return f"{self.num_rows} x {self.width} {self.precision}"

    @property
    def nbytes(self) -> int:
        """Serving bytes: the matrix as a bundle stores it, without any padding a training kernel may want."""
        return self.num_rows * PRECISIONS[self.precision].row_bytes(self.width)


BYTES = {"float32": 4, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class ArraySpec:
    """An array of an encoding beside its tables: a projection, a row map, codes. It counts in full.

    Args:
        shape: of the array.
        dtype: "float32" for what is trained; an integer type of BYTES for what is looked up.
        std: standard deviation of the first values of a trained array.
        mean: their mean.
        part: what a report calls these bytes.
        serving: False for what only training needs (counters): saved in checkpoints, but no serving bytes.
        relative: whether `std` is in units of the standard deviation asked for composed vectors.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    std: float = 0.0
    mean: float = 0.0
    part: str = "projections"
    serving: bool = True
    relative: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the array, wherever they count."""
        return math.prod(self.shape) * BYTES[self.dtype]
