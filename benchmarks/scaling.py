"""Draws docs/scaling.png: what training sends and holds on up to 1024 GPUs, with points of 1, 2 and 4 processes.

python benchmarks/scaling.py            # the arithmetic of embtab/sharding/cost.py, and the points of scaling.json
python benchmarks/scaling.py --measure  # counts them again, on this machine's CPU
"""

import json
import sys
import warnings
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

from embtab.fused import Optimizer
from embtab.sharding.cost import device_bytes, sizes_traffic, slot_traffic
from embtab.sharding.traffic import measured

HERE = Path(__file__).parent
POINTS = HERE / "scaling.json"
FEATURES, BATCH, IDS, WIDTH, ROWS = 26, 64, 1, 16, 4096
KINDS = {"row_wise": "C3", "row_wise_ids": "C5", "column_wise": "C1", "table_wise": "C0", "data_parallel": "C2"}


def predicted(kind: str, world_size: int, batch: int = BATCH, rows: int = ROWS) -> int:
    """Bytes that all processes send in a step of one id for each of 26 features."""
    parts = min(world_size, WIDTH // 4)
    one = slot_traffic(kind, world_size, batch, IDS, WIDTH, rows, parts=parts)
    return FEATURES * one.total + (0 if kind == "data_parallel" else sizes_traffic(world_size).total)


def process(rank: int, world_size: int, folder: str) -> None:
    """One of the processes that are counted."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size)
    found = {kind: measured(kind, FEATURES, BATCH, IDS, WIDTH, ROWS) for kind in KINDS}
    if rank == 0:
        (Path(folder) / f"{world_size}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure() -> None:
    """Counts on 1, 2 and 4 processes, and writes what was found."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2, 4):
            torch.multiprocessing.spawn(process, (world_size, folder), nprocs=world_size)
        found = {size: json.loads((Path(folder) / f"{size}.json").read_text()) for size in (1, 2, 4)}
    for size, kinds in found.items():
        for kind, sent in kinds.items():
            print(f"{size} processes, {kind:13} {sent:12,} bytes a step; predicted {predicted(kind, size):12,}")
    POINTS.write_text(json.dumps(found, indent=1) + "\n")


def draw() -> None:
    """The page's figure."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    worlds = [2**i for i in range(1, 11)]
    for kind, colour in KINDS.items():
        sent = [predicted(kind, world) / world / BATCH for world in worlds]
        left.loglog(worlds, sent, color=colour, label=kind if kind != "data_parallel" else f"{kind}, {ROWS} rows")
    for size, kinds in json.loads(POINTS.read_text()).items():
        for kind, sent in kinds.items():
            if sent:
                left.plot(int(size), sent / int(size) / BATCH, "x", color=KINDS[kind], markersize=9, mew=2)
    left.set(xlabel="GPUs", ylabel="bytes sent by a GPU for each of its samples")
    left.set_title(f"{FEATURES} features of one id, width {WIDTH}, {BATCH} samples a GPU; crosses: measured")
    left.legend()
    ids = [10.0**i for i in range(6, 12)]
    for share, style in ((1.0, "-"), (0.1, "--"), (0.01, ":")):
        for world, colour in ((1, "0.2"), (8, "C4"), (64, "C0"), (1024, "C3")):
            held = [device_bytes("row_wise", world, 1, int(share * each), WIDTH, Optimizer()) for each in ids]
            size = "dense" if share == 1 else f"{share:g} of the rows"
            label = f"{world} GPU{'s' * (world > 1)}, dense" if share == 1 else size if world == 1 else None
            right.loglog(ids, held, style, color=colour, label=label)
    right.axhline(80e9, color="0.6", linewidth=6, alpha=0.4)
    right.text(1.2e6, 1e11, "80 GB")
    right.set(xlabel="ids", ylabel="bytes on each GPU (rows and row-wise Adagrad)", title="Memory, row-wise")
    right.legend(fontsize="small")
    figure.savefig(HERE.parent / "docs" / "scaling.png", dpi=110)


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measure()
    draw()
