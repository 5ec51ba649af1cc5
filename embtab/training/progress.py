"""Progress on stderr: a bar with samples/s on a terminal, one plain line per logging interval elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from embtab.datasets.reader import Batch


class Progress(ProgressBar):
    """Shows where training and evaluation stand, and how many samples a second they take.

    A terminal gets a bar for each epoch; a file or pipe gets one line every `log_every_n_steps` training steps, and
    nothing that needs a terminal. The training speed of each epoch is also logged, as train/samples_per_s.

    Args:
        terminal: whether stderr is one; found out if None.
    """

    def __init__(self, terminal: bool | None = None):
        super().__init__()
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.enabled = True
        self._bar: tqdm | None = None
        self._pace = Pace()
        self._epoch_pace = Pace()
        self._told = 0

    def disable(self) -> None:
        """Stays silent (on all ranks but the first)."""
        self.enabled = False

    def enable(self) -> None:
        """Speaks again."""
        self.enabled = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts measuring anew."""
        self._pace, self._epoch_pace = Pace(), Pace()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Opens the epoch's bar at its first batch, which after a resume is not batch 0."""
        if self._bar is None:
            self._open(f"epoch {trainer.current_epoch}", trainer.num_training_batches, batch_idx, leave=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Moves the bar, or writes a line after a step of the optimizer."""
        self._pace.add(len(batch))
        self._epoch_pace.add(len(batch))
        # Lightning has divided it where gradients are accumulated.
        loss = _number(outputs["loss"] if isinstance(outputs, dict) else outputs) * trainer.accumulate_grad_batches
        self._move(loss=f"{loss:.4f}", speed=f"{self._epoch_pace.per_second:,.0f} samples/s")
        step = trainer.global_step
        if not self.terminal and step != self._told and step % trainer.log_every_n_steps == 0:
            self._told = step
            self._line(
                f"epoch {trainer.current_epoch}  batch {batch_idx + 1}/{trainer.num_training_batches}  "
                f"loss {loss:.4f}  {self._pace.per_second:,.0f} samples/s"
            )
            self._pace = Pace()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar and logs the epoch's speed."""
        self._close()
        pl_module.log("train/samples_per_s", self._epoch_pace.per_second)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the training clocks and opens the validation's bar."""
        self._pace.pause()
        self._epoch_pace.pause()
        self._close()
        self._open("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._move()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the metrics and lets the training clocks run on."""
        self._close()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self._line(f"epoch {trainer.current_epoch}  " + "  ".join(f"{k} {v:.5f}" for k, v in found.items()))
        self._pace.resume()
        self._epoch_pace.resume()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the test's bar."""
        self._open("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._move()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the prediction's bar."""
        self._open("predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._move()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message starts on a line of its own."""
        self._close()

    def _open(self, title: str, total: float, start: int = 0, leave: bool = False) -> None:
        if self.enabled and self.terminal:
            known = None if total == float("inf") else int(total)
            self._bar = tqdm(desc=title, total=known, initial=start, leave=leave, dynamic_ncols=True, unit="batch")

    def _move(self, **shown: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown.values()), refresh=False)
            self._bar.update()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, text: str) -> None:
        if self.enabled:
            print(text, file=sys.stderr, flush=True)


class Pace:
    """Samples per second of the time that is not paused."""

    def __init__(self) -> None:
        self.samples = 0
        self._begun = time.perf_counter()
        self._paused_at: float | None = None

    def add(self, samples: int) -> None:
        """Counts samples."""
        self.samples += samples

    def pause(self) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Lets the clock run on."""
        if self._paused_at is not None:
            self._begun += time.perf_counter() - self._paused_at
            self._paused_at = None

    @property
    def per_second(self) -> float:
        """Samples per second so far; a pause counts for nothing."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return self.samples / max(now - self._begun, 1e-9)


def _number(loss: Tensor | float) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)
