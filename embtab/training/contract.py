"""What a Trainer may do with tables that train themselves inside backward: looked at once, before the first batch.

Such *fused* tables (the fbgemm and native backends) take a step in every backward pass, whatever the Trainer does with
gradients, optimizers and processes afterwards. Each setting that would silently train something else is refused here,
with what to write instead.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from embtab.errors import UserError
from embtab.fused import fused_optimizers
from embtab.tables.base import Collection
from embtab.training.strategies import NAMES

_OUTSIDE = 'or train the tables by an optimizer outside, with backend="torch"'


class TableContract(L.Callback):
    """Checks the Trainer and its module before the first batch.

    `RankingTask` and `SequenceTask` bring it along. A LightningModule of your own that holds embtab's collections gets
    it by `Trainer(callbacks=[embtab.TableContract()])`.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks at everything that is known before training.

        Raises:
            UserError: as `check`.
        """
        check(trainer, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the schedules, which are made by now.

        Raises:
            UserError: when a schedule drives the other parameters and not the tables.
        """
        scheduled = {
            id(group) for each in trainer.lr_scheduler_configs for group in each.scheduler.optimizer.param_groups
        }
        if scheduled and any(id(each.param_groups[0]) not in scheduled for each in fused_optimizers(pl_module)):
            raise UserError(
                "a learning-rate schedule drives the other parameters and not the tables that train inside backward; "
                "schedule embtab.with_tables(optimizer, module) instead of the optimizer"
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at what a callback may have set for this epoch.

        Raises:
            UserError: when gradients of fused tables would be accumulated.
        """
        if any(fused(each) for each in pl_module.modules()) and not _only_measures(trainer):
            _check_accumulation(trainer)


def fused(module: nn.Module) -> bool:
    """Whether a module is a collection whose tables train themselves inside backward."""
    return isinstance(module, Collection) and module.lookup.fused is not None


def check(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuses what would train or compute something else than it says.

    Args:
        trainer: about to fit, validate, test or predict.
        module: holds collections of embtab, at any depth.

    Raises:
        UserError: for the first setting that does not go with a collection; it names the setting and the way out.
    """
    collections = {name: each for name, each in module.named_modules() if isinstance(each, Collection)}
    themselves = {name: each for name, each in collections.items() if fused(each)}
    fitting = trainer.state.fn == TrainerFn.FITTING
    parallel = isinstance(trainer.strategy, ParallelStrategy) or trainer.world_size > 1
    if fitting and parallel and getattr(trainer.strategy, "strategy_name", None) not in NAMES:
        for name, each in collections.items():
            _check_strategy(trainer, name, each)
    if not themselves:
        return
    _check_precision(trainer)
    if fitting:
        _check_accumulation(trainer)
        _check_clipping(trainer, module)


def _check_strategy(trainer: L.Trainer, name: str, collection: Collection) -> None:
    if collection.per_process:
        return
    kind = type(trainer.strategy).__name__
    if fused(collection):
        raise UserError(
            f'{kind} would train other tables ({name}) on each process; spread them by Trainer(strategy="torchrec"), '
            f"{_OUTSIDE}"
        )
    for space, encoding in collection.plan.encodings.items():
        if encoding.adaptive:
            raise UserError(
                f"{kind} would let method {encoding.method!r} of {space!r} reorganise its tables by what each process "
                'sees; use backend="fbgemm" with Trainer(strategy="torchrec")'
            )


def _only_measures(trainer: L.Trainer) -> bool:
    """Whether this is the further epoch of stochastic weight averaging, which has no backward passes."""
    averages = any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return averages and trainer.accumulate_grad_batches == trainer.fit_loop.max_batches


def _check_precision(trainer: L.Trainer) -> None:
    plugin = trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None:
        raise UserError(
            f"precision {trainer.precision!r} scales the loss, and tables that train inside backward would step by the "
            f'scaled gradient; use precision="bf16-mixed" or "32-true", {_OUTSIDE}'
        )
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise UserError(
            f"precision {trainer.precision!r}: tables that train inside backward are float32; use "
            f'precision="32-true" or "bf16-mixed", {_OUTSIDE}'
        )


def _check_accumulation(trainer: L.Trainer) -> None:
    schedules = [each.scheduling for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    most = max([trainer.accumulate_grad_batches, *(steps for each in schedules for steps in each.values())])
    if most > 1:
        raise UserError(
            f"accumulate_grad_batches={most}: tables that train inside backward would take {most} steps for one; make "
            f"batch_size {most} times as large, {_OUTSIDE}"
        )


def _check_clipping(trainer: L.Trainer, module: L.LightningModule) -> None:
    taken_over = is_overridden("configure_gradient_clipping", module, L.LightningModule)
    if not trainer.gradient_clip_val or taken_over:
        return
    if any(each.settings.max_gradient is None for each in fused_optimizers(module)):
        raise UserError(
            f"gradient_clip_val={trainer.gradient_clip_val} does not reach tables that train inside backward; say how "
            "they are clipped by Optimizer(max_gradient=...), table_max_gradient in a configuration (.inf to clip the "
            f"other parameters alone), {_OUTSIDE}"
        )
