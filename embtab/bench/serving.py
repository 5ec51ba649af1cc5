"""Requests answered: tables and a small ranker, as trained, as an ONNX program, and by quantised kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.bench.lookups import make_tables
from embtab.bench.timing import Arm, Stopwatch
from embtab.bench.workload import Case, numeric
from embtab.bundle import save
from embtab.errors import UserError
from embtab.reader import Bundle
from embtab.serving.exported import kind_of
from embtab.serving.quantised import QuantisedTables
from embtab.serving.ranker import Ranker
from embtab.tables import EmbeddingBagCollection

FORMS = ("onnx", "onnx+int8", "aoti", "aoti+int8", "quantised")
PLAIN = "nn.Embedding"
BEFORE = 20  # requests at most that an arm answers before the one that is timed: a server's caches hold its program
Inputs = dict[str, np.ndarray]


class SmallRanker(nn.Module):
    """An MLP of 128-64 units over the vectors and 13 numbers, called as AutoInt is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
        )

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """Probabilities [B] from numbers [B, 13] and vectors [B, F, D]."""
        ranked: Tensor = self.mlp(torch.cat([dense, embeddings.flatten(1)], dim=1))
        return ranked.squeeze(1)


class PlainRanker(nn.Module):
    """A ranker as one writes it without embtab: one table of all ids, whose rows are read unchecked."""

    def __init__(self, case: Case, model: SmallRanker) -> None:
        super().__init__()
        sizes = [feature.num_ids for feature in case.features]
        self.table = nn.Embedding(sum(sizes), case.dim)
        self.register_buffer("first", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        self.model = model

    def inputs(self) -> list[str]:
        """As of `Ranker`."""
        return ["dense", "ids"]

    def outputs(self) -> list[str]:
        """As of `Ranker`."""
        return ["logits"]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities [B] from numbers [B, 13] and ids [B, F]."""
        return {"logits": self.model(inputs["dense"], self.table(inputs["ids"] + self.get_buffer("first")))}


def serving_arms(
    names: Sequence[str], case: Case, budget: str, optimizer: str, device: torch.device, cold: bool = False
) -> dict[str, Arm]:
    """The whole ranker, by each kind of tables.

    Args:
        names: of tables, as `make_tables` takes them ("hash@native"), in evaluation mode; or of a method, or
            "nn.Embedding" for plain torch, followed by "@onnx" (an ONNX program under ONNX Runtime, one thread) or
            "@aoti" (compiled by AOTInductor), and "+int8" for rows in int8; or a method followed by "@quantised" (rows
            in int8 in fbgemm's inference kernels).
        case: of one request; bags of one id for the forms of serving.
        budget: of methods that compress, in the precision that is served.
        optimizer: which the tables were trained by.
        device: where requests are answered; those forms are for CPUs.
        cold: nothing is answered before a request that is timed, so that the caches hold other arms' work.

    Raises:
        UserError: for another form, or one that does not take the case.
    """
    batches, dense = case.batches(8, device), [x for x, _ in numeric(case, 8, device)]
    torch.manual_seed(0)
    model = SmallRanker(13 + case.dim * len(case.features)).to(device).eval()

    before = 0 if cold else min(BEFORE, max(1, 4096 // case.batch))

    def trained(name: str) -> Arm:
        tables = make_tables(name, case, budget, optimizer, device)
        tables.module.eval()

        def answer(i: int) -> None:
            with torch.no_grad():
                model(dense[i], tables.forward(batches[i]))

        return _server(answer, before)

    def served(name: str, form: str) -> Arm:
        if form not in FORMS or case.bag != 1 or device.type != "cpu":
            raise UserError(f"arm {name}@{form}: forms are {', '.join(FORMS)}, for bags of one id on a CPU")
        answer = _program(name, form, model, case, budget, optimizer)
        given = [_inputs(ids, x) for ids, x in zip(batches, dense, strict=True)]
        return _server(lambda i: answer(given[i]), before)

    backends = ("native", "fbgemm")
    asked = {name: name.partition("@")[::2] for name in names}
    return {name: served(*of) if of[1] and of[1] not in backends else trained(name) for name, of in asked.items()}


def _server(answer: Callable[[int], object], before: int) -> Arm:
    """Answers one of eight requests after the other, and times the last."""

    def turn(i: int, watch: Stopwatch) -> None:
        for request in range(i, i + before):
            answer(request % 8)
        watch.restart()
        answer((i + before) % 8)
        watch.lap()

    return turn


def _program(
    name: str, form: str, model: SmallRanker, case: Case, budget: str, optimizer: str
) -> Callable[[Inputs], object]:
    """What answers a request from its inputs by name."""
    kind, _, precision = ("quantised", "", "int8") if form == "quantised" else form.partition("+")
    with tempfile.TemporaryDirectory() as scratch:
        if name == PLAIN and form != "quantised" and not precision:
            return _exported(PlainRanker(case, model).eval(), kind, case, Path(scratch))  # type: ignore[arg-type]
        tables = make_tables(name, case, budget, optimizer, torch.device("cpu"), precision or None)
        if not isinstance(tables.module, EmbeddingBagCollection):
            raise UserError(f"arm {name}@{form}: only a method of embtab is served so")
        save(tables.module, Path(scratch) / "bundle")
        bundle = Bundle(Path(scratch) / "bundle")
        ranker = Ranker(bundle, model, num_dense=13, stacked=True)
        if form != "quantised":
            return _exported(ranker, kind, case, Path(scratch))
        ranker.tables = QuantisedTables(bundle, stacked=True)

    @torch.no_grad()
    def answer(inputs: Inputs) -> Tensor:
        return ranker({key: torch.from_numpy(array) for key, array in inputs.items()})["logits"]

    return answer


def _exported(ranker: Ranker, form: str, case: Case, scratch: Path) -> Callable[[Inputs], object]:
    """The ranker as a program."""
    kind, cpu = kind_of(form), torch.device("cpu")
    rows = replace(case, batch=3)  # whatever a request has: its length is left open
    example = _inputs(rows.batches(1, cpu)[0], numeric(rows, 1, cpu)[0][0])
    kind.write(ranker, {key: torch.from_numpy(array) for key, array in example.items()}, scratch / kind.FILE)
    return kind.load(scratch / kind.FILE)


def _inputs(ids: KeyedJaggedTensor, dense: Tensor) -> dict[str, np.ndarray]:
    """A request as a program takes it."""
    columns = [ids[key].values() for key in ids.keys()]  # noqa: SIM118 (no dict)
    return {"dense": dense.numpy(), "ids": torch.stack(columns, dim=1).numpy()}
