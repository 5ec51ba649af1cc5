"""What a step of sharded training sends, and what a device holds: arithmetic, for machines one does not have.

    W processes   B bags a process   n ids a bag   w width of a row (in fbgemm's padding)   R rows of a table

Bytes that all processes together send to others in one step, forward and backward, for one slot (a part of a feature);
ids and lengths are int64, rows float32:

                    ids               lengths         vectors there     gradients back
    table_wise      8 B n (W-1)       8 B (W-1)       4 B w (W-1)       4 B w (W-1)
    row_wise        8 B n (W-1)       8 B W (W-1)     4 B w W (W-1)     4 B w W (W-1)
    row_wise_ids    8 B n (W-1)       8 W (W-1)       4 B n w (W-1)     4 B n w (W-1)
    column_wise, P  8 B n P (W-1)     8 B P (W-1)     4 B w (W-1)       4 B w (W-1)
    data_parallel   0                 0               0                 8 R w (W-1)

A bag whose rows lie on several devices is summed there first and then across them, so row_wise sends a vector per bag
and device; with row_wise_ids the rows of the ids are sent, and summed where the bag is. Where a model asks for every id
(an `EmbeddingCollection`, or a method that is not linear) there are no sums: with n B for B and one length per slot,
row_wise then costs what row_wise_ids does.
Reductions are counted as rings: each of W processes sends (W-1)/W of what is scattered or gathered, twice that for an
all-reduce. Every torchrec collection also sends 24 W (W-1) bytes of sizes (32 with weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from embtab.errors import UserError
from embtab.fused import Optimizer
from embtab.lookup.base import padded
from embtab.sharding.placement import KINDS, row_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that all processes together send to others in a step.

    Args:
        ids: ids, lengths and sizes.
        vectors: rows and their sums, forward.
        gradients: of these, backward.
    """

    ids: int = 0
    vectors: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.ids + self.vectors + self.gradients


def slot_traffic(
    kind: str, world_size: int, batch: int, ids: int, width: int, rows: int, *, pooled: bool = True, parts: int = 1
) -> Traffic:
    """What one slot costs, where ids are evenly spread over the rows.

    Args:
        kind: one of `placement.KINDS`.
        world_size: W.
        batch: B, bags a process.
        ids: n, ids a bag.
        width: of the table's rows.
        rows: R.
        pooled: whether bags are summed by the lookup.
        parts: P, devices that share the columns of a column-wise table.

    Raises:
        UserError: for an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of sharding {kind!r}; there are {', '.join(KINDS)}")
    others, row = world_size - 1, 4 * padded(width)
    if kind == "data_parallel":
        return Traffic(gradients=2 * 4 * width * rows * others)
    pooled = pooled and kind != "row_wise_ids"
    copies = parts if kind == "column_wise" else 1
    spread = world_size if kind in ("row_wise", "row_wise_ids") else 1
    lengths = 8 * (batch if pooled else 1) * copies * spread * others
    vectors = row * (batch * spread if pooled else batch * ids) * others
    return Traffic(8 * batch * ids * copies * others + lengths, vectors, vectors)


def sizes_traffic(world_size: int, collections: int = 1, weighted: bool = False) -> Traffic:
    """What telling each other how much will come costs, for some torchrec collections."""
    return Traffic(ids=collections * (32 if weighted else 24) * world_size * (world_size - 1))


def device_bytes(kind: str, world_size: int, tables: int, rows: int, width: int, optimizer: Optimizer) -> int:
    """Training bytes (rows, and what the optimizer remembers) of the fullest device, for equal tables spread evenly.

    Args:
        kind: one of `placement.KINDS`.
        world_size: devices.
        tables: how many.
        rows: of each.
        width: of their rows.
        optimizer: of the tables.
    """
    each = row_bytes(padded(width), optimizer)
    if kind == "data_parallel":
        return tables * rows * each
    if kind in ("row_wise", "row_wise_ids"):
        return tables * -(-rows // world_size) * each
    if kind == "table_wise":
        return -(-tables // world_size) * rows * each
    return -(-tables * rows * each // world_size)
