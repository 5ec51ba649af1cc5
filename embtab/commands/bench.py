"""embtab bench: how fast, and how close to what the memory allows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from embtab.errors import UserError


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab bench."""
    parser.description = (
        "Measures this machine's copy and random-row rates, then what is asked for; arms take turns (A B C A B C), "
        "and ratios are medians of the rounds' ratios to the baseline."
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="lookups (default), autoint, din (steps), loader, serving, search (of histories); several",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["torchrec", "dense", "hash", "unified", "qr"],
        help="torchrec (FusedEmbeddingBagCollection), nn.EmbeddingBag (sparse gradients), or a method, with options as "
        "in qr:op=sum, a backend as in dense@native, and +compiled for rows by torch.compile; for lookups also a "
        "number of threads, as in dense@native/2 (default %(default)s)",
    )
    parser.add_argument("--baseline", default="torchrec", help="of the ratios (default %(default)s)")
    parser.add_argument("--budget", default="0.1x", help="of methods that compress (default %(default)s)")
    parser.add_argument("--table-optimizer", default="rowwise_adagrad", help="(default %(default)s)")
    parser.add_argument("--dim", type=int, default=[16], nargs="+", metavar="N", help="widths of a vector (default 16)")
    parser.add_argument(
        "--batch", type=int, default=[4096], nargs="+", metavar="N", help="rows of a batch (default 4096)"
    )
    parser.add_argument(
        "--bag", type=int, default=[1], nargs="+", metavar="N", help="ids in a bag, events in a history (default 1)"
    )
    parser.add_argument("--skew", default=["zipf"], nargs="+", help="zipf, uniform (default zipf)")
    parser.add_argument(
        "--cap", type=int, default=100_000, help="cut Criteo's cardinalities at; 0: not (default %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=[1.0], nargs="+", metavar="N", help="times Criteo's cardinalities"
    )
    parser.add_argument("--fill", type=float, default=1.0, help="shortest history of din, of the longest (default 1)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a dataset folder for loader; else one is generated")
    parser.add_argument("--rounds", type=int, default=15, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--cold", action="store_true", help="time requests (serving) after other arms' instead of own")
    parser.add_argument("--memory", action="store_true", help="also peak memory, each arm in a process of its own")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results.csv, and cost.png where lookups are measured")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    import torch

    from embtab.bench.report import as_text, plot, write_csv
    from embtab.bench.run import run
    from embtab.bench.search import plot_search
    from embtab.bench.settings import Settings

    numbers = [arguments.rounds, arguments.threads, *arguments.dim, *arguments.batch, *arguments.bag]
    if min(numbers) < 1 or arguments.cap < 0 or min(arguments.scale) <= 0 or not 0 <= arguments.fill <= 1:
        raise UserError("sizes, rounds, threads and scales must be above zero, --cap zero or more, --fill in [0, 1]")
    if set(arguments.skew) - {"zipf", "uniform"}:
        raise UserError(f"--skew must be zipf or uniform, got {' '.join(arguments.skew)}")
    if arguments.device not in ("cpu", "cuda") or (arguments.device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {arguments.device}: not here")
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        what=arguments.what or ["lookups"],
        arms=arguments.arms,
        baseline=arguments.baseline,
        budget=arguments.budget,
        optimizer=arguments.table_optimizer,
        dims=arguments.dim,
        batches=arguments.batch,
        bags=arguments.bag,
        skews=arguments.skew,
        cap=arguments.cap or None,
        scales=arguments.scale,
        rounds=arguments.rounds,
        fill=arguments.fill,
        data=arguments.data,
        cold=arguments.cold,
        memory=arguments.memory,
        device=torch.device(arguments.device),
    )
    results = run(settings)
    print(as_text(results))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(results, arguments.out / "results.csv")
        if any(each.what == "lookups" for each in results):
            plot(results, arguments.out / "cost.png")
        if any(each.what == "search" for each in results):
            plot_search(results, arguments.out / "search.png")
        print(f"{arguments.out}/results.csv", file=sys.stderr)
