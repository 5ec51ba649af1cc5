"""Training steps of AutoInt and DIN beside FuxiCTR's own (github.com/reczoo/FuxiCTR), in turn, in one process.

    pip install fuxictr==2.3.10                    # beside embtab; it wants polars below 2 for its own CSV reader only
    git clone https://github.com/reczoo/FuxiCTR    # its models are not in the package
    OMP_NUM_THREADS=1 python benchmarks/beside_fuxictr.py FuxiCTR autoint dense hash unified qr dense+bf16
    OMP_NUM_THREADS=1 python benchmarks/beside_fuxictr.py FuxiCTR autoint dense hash dense+bf16 --cap 0 --rounds 4
    OMP_NUM_THREADS=1 python benchmarks/beside_fuxictr.py FuxiCTR din dense qr --bag 50 [--bag 200] [--fill 0]

The same sizes, batches and batch norm: AutoInt+ of 3 layers, 2 heads, 32 wide, DNN 400-400, 13 numbers and Criteo's 26
features; DIN with a unit of 64 and a head of 512-128-64 over a million items and their categories. FuxiCTR trains dense
tables by Adam over every row, ours by the optimizer inside backward: this compares speed, not what is learned.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from embtab.bench.memory import most_resident
from embtab.bench.steps import CATEGORIES, ITEMS, autoint_arms, autoint_batches, din_arms, din_batches
from embtab.bench.timing import Arm, Stopwatch, Times, alternate
from embtab.bench.workload import Case
from embtab.models.events import padded

SETTINGS = {
    "gpu": -1,
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "task": "binary_classification",
    "metrics": ["AUC"],
    "verbose": 0,
    "model_root": tempfile.gettempdir(),
    "learning_rate": 1e-3,
    "embedding_regularizer": 0,
    "net_regularizer": 0,
    "net_dropout": 0,
    "batch_norm": False,
    "monitor": "AUC",
    "monitor_mode": "max",
    "model_id": "beside",
}


def model_class(checkout: Path, name: str) -> Any:
    """A model of the zoo."""
    spec = importlib.util.spec_from_file_location(name, checkout / "model_zoo" / name / "src" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def feature_map(features: dict[str, dict[str, Any]], dim: int) -> Any:
    """FuxiCTR's description of the columns."""
    from fuxictr.features import FeatureMap

    found = FeatureMap("beside", tempfile.gettempdir())
    found.features = OrderedDict((name, {"source": "", **about}) for name, about in features.items())
    found.labels, found.default_emb_dim = ["label"], dim
    found.num_fields = found.get_num_fields()
    found.total_features = sum(about.get("vocab_size", 1) for about in features.values())
    found.set_column_index()
    return found


def fuxictr_autoint(checkout: Path, case: Case) -> Arm:
    """Its AutoInt on our batches."""
    columns: dict[str, dict[str, Any]] = {f"I{i}": {"type": "numeric"} for i in range(1, 14)}
    columns |= {f.name: {"type": "categorical", "vocab_size": f.num_ids} for f in case.features}
    sizes = {"dnn_hidden_units": [400, 400], "dnn_activations": "relu", "num_heads": 2, "attention_layers": 3}
    model = model_class(checkout, "AutoInt")(
        feature_map(columns, case.dim),
        embedding_dim=case.dim,
        attention_dim=32,
        use_residual=True,
        layer_norm=False,
        use_scale=False,
        use_wide=False,
        **sizes,
        **SETTINGS,
    )
    batches = []
    for batch in autoint_batches(case, torch.device("cpu")):
        ids = batch.sparse.to_dict()
        given = {f"I{i + 1}": batch.dense[:, i] for i in range(13)}
        batches.append({**given, **{name: ids[name].values() for name in ids}, "label": batch.label})
    return training(model, batches)


def fuxictr_din(checkout: Path, case: Case, fill: float) -> Arm:
    """Its DIN on our batches, histories padded with id 0."""

    def history(shared: str, size: int) -> dict[str, Any]:
        return {
            "type": "sequence",
            "vocab_size": size,
            "padding_idx": 0,
            "max_len": case.bag,
            "share_embedding": shared,
        }

    columns = {
        "item_id": {"type": "categorical", "vocab_size": ITEMS + 1, "padding_idx": 0},
        "category_id": {"type": "categorical", "vocab_size": CATEGORIES + 1, "padding_idx": 0},
        "item_history": history("item_id", ITEMS + 1),
        "category_history": history("category_id", CATEGORIES + 1),
    }
    model = model_class(checkout, "DIN")(
        feature_map(columns, case.dim),
        embedding_dim=case.dim,
        dnn_hidden_units=[512, 128, 64],
        dnn_activations="ReLU",
        attention_hidden_units=[64],
        attention_hidden_activations="Dice",
        din_target_field=[("item_id", "category_id")],
        din_sequence_field=[("item_history", "category_history")],
        **SETTINGS,
    )
    batches = []
    for batch in din_batches(case, fill, torch.device("cpu")):
        ids = batch.sparse.to_dict()
        given = {f"{name}_id": ids[name].values() + 1 for name in ("item", "category")}
        for name, ours in (("item", "items"), ("category", "categories")):
            rows = padded((ids[ours].values() + 1).double(), ids[ours].lengths(), 0).long()
            given[f"{name}_history"] = torch.nn.functional.pad(rows, (0, case.bag - rows.shape[1]))
        batches.append({**given, "label": batch.label})
    return training(model, batches)


def training(model: Any, batches: list[dict[str, torch.Tensor]]) -> Arm:
    """Its own training step."""
    model._max_gradient_norm = 10.0
    model.train()

    def turn(i: int, watch: Stopwatch) -> None:
        model.train_step(batches[i % len(batches)])
        watch.lap()

    return turn


def main() -> None:
    """Prints milliseconds of a step and the ratio of speeds."""
    parser = argparse.ArgumentParser(description="AutoInt and DIN beside FuxiCTR's")
    parser.add_argument("checkout", type=Path, help="of FuxiCTR")
    parser.add_argument("model", choices=["autoint", "din"])
    parser.add_argument("arms", nargs="*", default=["dense"], help="as of `embtab bench`")
    parser.add_argument("--bag", type=int, default=50, help="events of a history (default %(default)s)")
    parser.add_argument("--fill", type=float, default=1.0, help="the shortest history, of the longest (default 1)")
    parser.add_argument("--cap", type=int, default=100_000, help="of Criteo's cardinalities; 0: none")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    optimizer, cpu = "rowwise_adagrad", torch.device("cpu")
    if given.model == "autoint":
        case = Case(cap=given.cap or None)
        theirs = fuxictr_autoint(given.checkout, case)
        ours = autoint_arms(given.arms, case, "0.1x", optimizer, cpu)
    else:
        case = Case(dim=32, batch=1024, bag=given.bag)
        theirs = fuxictr_din(given.checkout, case, given.fill)
        ours = din_arms(given.arms, case, "0.1x", optimizer, cpu, given.fill)
    seconds = alternate({"FuxiCTR": theirs, **ours}, given.rounds, cpu, warmup=1, title="steps")
    baseline = seconds["FuxiCTR"].sum(axis=1)
    for name, each in seconds.items():
        times = Times(each.sum(axis=1), baseline)
        print(f"{name:12s} {1e3 * times.median:9.1f} ms   {1 / times.ratio:6.2f} times its speed")
    print(f"the process took {(most_resident() or 0) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
