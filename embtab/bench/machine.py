"""What the memory allows: how fast bytes are copied, and how fast rows are read from random places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from embtab.bench.timing import seconds_of


@dataclass(frozen=True)
class Machine:
    """Measured limits.

    Args:
        copy: bytes read plus bytes written a second.
        rows: rows a second from random places of a table that no cache holds, by their width in float32 numbers.
        table: bytes of that table.
        threads: torch's threads.
        device: in words.
    """

    copy: float
    rows: dict[int, float]
    table: int
    threads: int
    device: str

    def __str__(self) -> str:
        rows = ", ".join(
            f"{rate / 1e6:.1f} M/s of {width} numbers ({rate * width * 4 / 1e9:.1f} GB/s)"
            for width, rate in self.rows.items()
        )
        return (
            f"{self.device}, {self.threads} thread(s): copy {self.copy / 1e9:.1f} GB/s (read + written); "
            f"random rows of {self.table / 2**20:.0f} MiB: {rows}"
        )


def measure(widths: list[int], device: torch.device, nbytes: int) -> Machine:
    """Measures this machine.

    Args:
        widths: of rows.
        device: whose memory.
        nbytes: of the arrays; more than the caches hold.
    """
    source = torch.ones(nbytes // 4, device=device)
    copy = copied(source)
    rows = {width: random_rows(source, width) for width in dict.fromkeys(widths)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return Machine(copy, rows, nbytes, torch.get_num_threads(), name)


def copied(source: torch.Tensor) -> float:
    """Bytes a second, read and written, of a copy within the memory."""
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), source.device)


def random_rows(memory: torch.Tensor, width: int, count: int = 1 << 18) -> float:
    """Rows a second from uniformly random places, by the fastest of torch's and NumPy's gathers.

    Args:
        memory: float32, flat.
        width: of a row.
        count: rows a call; fresh ones each call.
    """
    device = memory.device
    table = memory[: len(memory) // width * width].view(-1, width)
    drawn = iter(torch.randint(len(table), (64, count), device=device))
    out = torch.empty(count, width, device=device)
    bags = torch.arange(count + 1, device=device)
    calls: list[Callable[[], object]] = [
        lambda: torch.index_select(table, 0, next(drawn), out=out),
        lambda: F.embedding_bag(next(drawn), table, bags, mode="sum", include_last_offset=True),
    ]
    if device.type == "cpu":
        calls.append(lambda: np.take(table.numpy(), next(drawn).numpy(), axis=0, out=out.numpy(), mode="clip"))
    with torch.no_grad():
        return count / min(seconds_of(call, device) for call in calls)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
