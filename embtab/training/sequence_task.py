"""Sequence models under Lightning: from batches of behaviour sequences to logits, searching before looking up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embtab.datasets.histories import SPACES
from embtab.datasets.reader import Batch
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.features import Feature, read_features
from embtab.fused import Optimizer
from embtab.models.dare import DARE
from embtab.models.din import DIN
from embtab.models.events import Events
from embtab.planning import plan
from embtab.tables import EmbeddingCollection
from embtab.training.layout import Layout, Vectors
from embtab.training.regularise import id_counts, minibatch_l2
from embtab.training.schedule import Schedule
from embtab.training.task import RankingTask


class SequenceTask(RankingTask):
    """Trains a sequence model with its tables, or with one collection for attention and another for representation.

    A model that searches (`DARE`) does so before vectors are looked up for training: all of a history is looked up in
    the attention tables without gradients, and only the events found are looked up again. So the tables of the
    representation, and every backward pass, see no more than `top_k` events of a history.

    Args:
        tables: the representation; also the attention, unless that has tables of its own.
        model: called as (dense, others, events), see embtab.models.events; with `attention` as a fourth argument where
            that is given.
        lr: Adam's learning rate for the dense parameters.
        weight_decay: Adam's weight decay for them.
        attention: tables of the event features for the search, of any dimension and method.
        l2: strength of DIN's mini-batch aware regularisation of all tables; see `minibatch_l2`.
        schedule: of all learning rates; constant if None.

    Raises:
        UserError: when the features have no history, the collections disagree about it, or the model cannot use it.
    """

    def __init__(
        self,
        tables: EmbeddingCollection,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        attention: EmbeddingCollection | None = None,
        l2: float = 0.0,
        schedule: Schedule | None = None,
    ):
        super().__init__(tables, model, lr, weight_decay, schedule)
        if attention is not None and not isinstance(model, DARE):
            raise UserError(f"{type(model).__name__} has no use for attention tables of its own; DARE has")
        if not l2 >= 0:
            raise UserError(f"l2 must be 0 or more, got {l2}")
        self.layout = Layout.of(tables.plan.features)
        self.attention = attention
        self.l2 = l2
        self._check(model)
        self.counts = {name: id_counts(each.plan.features) for name, each in self.collections().items()} if l2 else {}
        if attention is not None:
            self.about["attention_plan"] = attention.plan.to_dict()

    def _check(self, model: nn.Module) -> None:
        if self.attention is not None:
            other = Layout.of(self.attention.plan.features)
            if (other.targets, other.histories) != (self.layout.targets, self.layout.histories):
                raise UserError("attention and representation must have the same target and history features")
        space = {feature.name: feature.space for feature in self.tables.plan.features}  # type: ignore[union-attr]
        has_position = space[self.layout.targets[-1]] == SPACES["position"]
        if isinstance(model, DARE) and model.has_position != has_position:
            raise UserError(f"the data has {'a' if has_position else 'no'} position: set has_position={has_position}")

    @property
    def _is_auxiliary(self) -> bool:
        return isinstance(self.model, DARE) and self.model.whole is not None

    def collections(self) -> dict[str, EmbeddingCollection]:
        """The tables by name: "tables", and "attention" where it has its own."""
        found = {"tables": self.tables, "attention": self.attention}
        return {name: each for name, each in found.items() if isinstance(each, EmbeddingCollection)}

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B] of a click."""
        logits, _, _ = self._ranked(batch)
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """The mean binary cross entropy in nats and, where asked for, that of the auxiliary head and the regularisation
        of the rows looked up.
        """
        logits, sparse, vectors = self._ranked(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.label)
        if self._is_auxiliary:
            further = self.model.auxiliary_logits(*(self.layout.gathered(each) for each in vectors.values()))  # type: ignore[operator]
            loss = loss + nn.functional.binary_cross_entropy_with_logits(further, batch.label)
        for name, collection in self.collections().items() if self.l2 else ():
            features = collection.plan.features
            loss = loss + self.l2 * minibatch_l2(vectors[name], sparse, features, self.counts[name])
        return loss

    def scores(self, batch: Batch) -> Tensor:
        """Float [N]: how much the model's attention gives to each event of whole histories, without gradients.

        Raises:
            UserError: when the model has no attention.
        """
        if not isinstance(self.model, DIN | DARE):
            raise UserError(f"{type(self.model).__name__} gives no scores to events")
        with torch.no_grad():
            return self.model.scores(self._attention_of_all(batch.sparse))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint was made with the same plans.

        Raises:
            UserError: when it was not, or is not a checkpoint of this task.
        """
        super().on_load_checkpoint(checkpoint)
        if checkpoint["embtab"]["about"].get("attention_plan") != self.about.get("attention_plan"):
            raise UserError("the checkpoint was made with other attention tables; use its own configuration")

    def _ranked(self, batch: Batch) -> tuple[Tensor, KeyedJaggedTensor, dict[str, Vectors]]:
        """Logits; the events that were looked up for them; and the vectors that came, by collection."""
        sparse = self._searched(batch.sparse)
        vectors = {name: each(sparse) for name, each in self.collections().items()}
        events, others = self.layout.gathered(vectors["tables"]), self.layout.pooled(vectors["tables"])
        attention = [self.layout.gathered(vectors["attention"])] if "attention" in vectors else []
        return self.model(batch.dense, others, events, *attention), sparse, vectors

    def _searched(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The batch with only the events that the model's search finds."""
        longest = self.layout.longest(sparse)
        if self.training and self._is_auxiliary:
            return sparse
        if not isinstance(self.model, DARE) or not 0 < self.model.top_k < longest:
            return sparse
        with torch.no_grad():
            return self.layout.narrowed(sparse, self.model.search(self._attention_of_all(sparse)))

    def _attention_of_all(self, sparse: KeyedJaggedTensor) -> Events:
        """Attention vectors of whole histories; adaptive tables do not count these look-ups."""
        collection = self.collections()["tables" if self.attention is None else "attention"]
        was_training = collection.training
        collection.eval()
        vectors = collection(sparse)
        collection.train(was_training)
        return self.layout.gathered(vectors)


class FitSequenceTask(SequenceTask):
    """A `SequenceTask` made from a prepared dataset and plain settings, for configuration files (`task: sequences`).

    Args:
        data: the prepared dataset's folder; its features are planned.
        method: how tables are compressed: a name of `embtab.METHODS`, or what else `embtab.plan` takes.
        budget: serving bytes, such as "8MB" or "0.1x" (of the dense tables); no limit if null.
        dim: width of every embedding.
        seed: of the hashes.
        precision: of the served rows: fp32, fp16, int8 or int4; null for fp32, and for what method "auto" chooses.
        attention: settings of tables of their own for the attention: method, budget, dim, seed, precision, init_std.
            One set of tables serves both if null.
        leave_out: features that are not used, such as the user.
        backend: "fbgemm" trains tables inside backward by `table_optimizer`, and so does "native", compiled here and
            quicker on CPUs; "torch" trains them by Adam at `lr`.
        table_optimizer: "rowwise_adagrad", "adagrad" or "sgd"; not for the torch backend.
        table_lr: its learning rate.
        table_weight_decay: L2 penalty on the rows of a batch.
        table_max_gradient: largest entry of the gradient of a looked-up sum; no limit if null.
        init_std: standard deviation of the entries of fresh vectors.
        lr: Adam's learning rate for the model and the tables' dense parts.
        weight_decay: Adam's weight decay.
        l2: strength of the mini-batch aware regularisation of the tables.
        schedule: of all learning rates, such as {name: cosine, warmup_steps: 1000}; constant if null.
        model: made from (number of dense columns, number of other features, fields of an event, dim).

    Raises:
        UserError: for settings that fit neither each other nor the data.
    """

    def __init__(
        self,
        data: str,
        method: str | dict[str, Any] = "dense",
        budget: int | str | None = None,
        dim: int = 16,
        seed: int = 0,
        precision: str | None = None,
        attention: dict[str, Any] | None = None,
        leave_out: list[str] | None = None,
        backend: str = "fbgemm",
        table_optimizer: str = "rowwise_adagrad",
        table_lr: float = 0.05,
        table_weight_decay: float = 0.0,
        table_max_gradient: float | None = None,
        init_std: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        schedule: Schedule | None = None,
        model: Callable[[int, int, int, int], nn.Module] = DIN,
    ):
        dataset = Dataset.load(data)
        features = used_features(data, leave_out or [])
        layout = Layout.of(features)
        settings = Optimizer(
            table_optimizer, table_lr, weight_decay=table_weight_decay, max_gradient=table_max_gradient
        )
        optimizer = settings if backend != "torch" else None

        def tables(used: Sequence[Feature], init_std: float, **settings: Any) -> EmbeddingCollection:
            return EmbeddingCollection(plan(used, **settings), backend, optimizer, init_std)

        representation = tables(
            features, init_std, method=method, budget=budget, dim=dim, seed=seed, precision=precision
        )
        searching = None
        if attention is not None:
            known = ("method", "budget", "dim", "seed", "precision", "init_std")
            unknown = [name for name in attention if name not in known]
            if unknown:
                raise UserError(f"attention has no setting {unknown[0]!r}; it has {', '.join(known)}")
            events = [feature for feature in features if feature.name in layout.events]
            searching = tables(events, **{"dim": dim, "seed": seed, "init_std": init_std, **attention})
        made = model(len(dataset.dense), len(layout.others), len(layout.targets), dim)
        super().__init__(representation, made, lr, weight_decay, searching, l2, schedule)
        self.about |= {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "dense": list(dataset.dense)}


def used_features(data: str, leave_out: Sequence[str]) -> list[Feature]:
    """A dataset's features but for those left out.

    Raises:
        UserError: when one of these is not there.
    """
    features = read_features(data)
    unknown = set(leave_out) - {feature.name for feature in features}
    if unknown:
        raise UserError(f"leave_out names a feature {min(unknown)!r} that the data does not have")
    return [feature for feature in features if feature.name not in leave_out]
