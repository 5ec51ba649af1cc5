"""Quotient-remainder tables beside DLRM's own (github.com/facebookresearch/dlrm), in turn, in one process.

    git clone https://github.com/facebookresearch/dlrm
    OMP_NUM_THREADS=1 python benchmarks/beside_dlrm.py dlrm [--bag 10] [--arms qr qr@native]

Forward, backward and update of Criteo's 26 features, batches of 4096. Theirs as dlrm_s_pytorch.py makes them: a
QREmbeddingBag of 4 collisions where a feature has more than 200 ids, else nn.EmbeddingBag, trained by sparse SGD. Ours:
SGD inside backward, within the bytes that theirs take. With bags of several ids theirs multiplies sums where it should
sum products: this compares speed.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from embtab.bench.lookups import LR, lookup_arms
from embtab.bench.timing import Arm, Stopwatch, Times, alternate
from embtab.bench.workload import Case

COLLISIONS, THRESHOLD = 4, 200  # DLRM's defaults


def bags_of(checkout: Path, case: Case) -> nn.ModuleList:
    """DLRM's tables, one a feature."""
    spec = importlib.util.spec_from_file_location("qr_embedding_bag", checkout / "tricks" / "qr_embedding_bag.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compressed, settings = module.QREmbeddingBag, {"mode": "sum", "sparse": True}
    return nn.ModuleList(
        compressed(n, case.dim, COLLISIONS, operation="mult", **settings)
        if n > THRESHOLD
        else nn.EmbeddingBag(n, case.dim, **settings)
        for n in case.cardinalities
    )


def training(bags: nn.ModuleList, case: Case) -> Arm:
    """Their step, with the phases of ours."""
    batches = [[batch[f.name] for f in case.features] for batch in case.batches(6, torch.device("cpu"))]
    gradient = 1e-3 * torch.randn(case.batch, len(case.features) * case.dim)
    optimizer = torch.optim.SGD(bags.parameters(), LR)

    def forward(i: int) -> Tensor:
        columns = zip(bags, batches[i % len(batches)], strict=True)
        return torch.cat([bag(ids.values(), ids.offsets()[:-1]) for bag, ids in columns], dim=1)

    def turn(i: int, watch: Stopwatch) -> None:
        vectors = forward(i)
        watch.lap()
        optimizer.zero_grad()
        vectors.backward(gradient)
        optimizer.step()
        watch.lap()

    return turn


def main() -> None:
    """Prints milliseconds and the ratio to DLRM's."""
    parser = argparse.ArgumentParser(description="quotient-remainder tables beside DLRM's")
    parser.add_argument("checkout", type=Path, help="of dlrm")
    parser.add_argument("--arms", nargs="*", default=["qr", "qr@native"], help="as of `embtab bench`")
    parser.add_argument("--bag", type=int, default=1)
    parser.add_argument("--cap", type=int, default=100_000, help="of Criteo's cardinalities; 0: none")
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case, cpu = Case(bag=given.bag, cap=given.cap or None), torch.device("cpu")
    bags = bags_of(given.checkout, case)
    size = sum(parameter.nbytes for parameter in bags.parameters())
    ours = lookup_arms(given.arms, case, str(size), "sgd", cpu)
    seconds = alternate({"DLRM": training(bags, case), **ours}, given.rounds, cpu, title="steps")
    baseline = seconds["DLRM"].sum(axis=1)
    print(f"bags of {given.bag}, {size / 1e6:.1f} MB")
    for name, each in seconds.items():
        times = Times(each.sum(axis=1), baseline)
        print(f"{name:12s} {1e3 * times.median:9.2f} ms   {times.ratio:6.2f} of its time")


if __name__ == "__main__":
    main()
