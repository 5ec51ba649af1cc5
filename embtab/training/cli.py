"""`embtab fit | validate | test | predict`: LightningCLI with embtab's task and data, errors of one line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from embtab.datasets.drift import drift_line
from embtab.errors import UserError
from embtab.files import clear, held
from embtab.training.best import Best, Last
from embtab.training.checkpoint import WholeFiles, read_checkpoint
from embtab.training.data import DataModule
from embtab.training.devices import placed
from embtab.training.mistakes import one_line, said_of_settings
from embtab.training.predictions import Predictions
from embtab.training.progress import Progress
from embtab.training.sequence_task import FitSequenceTask
from embtab.training.strategies import register
from embtab.training.task import FitTask
from embtab.training.trust import allowed, check_parsed, held_to
from embtab.yaml_files import read_yaml

TASKS = {"features": FitTask, "sequences": FitSequenceTask}
_COUNTS_OR_SHARES = ("overfit_batches", *(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")))
_COMMANDS = ("fit", "validate", "test", "predict")
_DEFAULTS = {
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "fit"}},
}


def main(argv: Sequence[str]) -> None:
    """Runs one of the commands; `argv` starts with its name.

    Raises:
        UserError: with one line that says which setting, option or file is wrong.
    """
    _quieten()
    register()
    trusted = allowed(argv)
    try:
        with held_to(trusted):
            FitCLI(list(argv), trusted)
    except UserError:
        raise
    except Exception as error:
        said = said_of_settings(error)
        if said is None:
            raise
        raise UserError(said) from error


class FitCLI(LightningCLI):
    """Reads configuration files and options, then runs the command.

    Args:
        argv: the command and its options.
        trusted: packages whose classes files may name, beside those that anyone may.
    """

    def __init__(self, argv: list[str], trusted: Sequence[str] = ()):
        self.trusted = trusted
        strict = {"exit_on_error": False}
        super().__init__(
            TASKS.get(_task_of(argv), FitTask),  # another name is refused by the parser
            DataModule,
            trainer_defaults=_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={**strict, **{command: dict(strict) for command in _COMMANDS}},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=argv,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and those arguments of the Trainer's methods that are not the user's to set."""
        return {command: skipped | {"weights_only"} for command, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One path for data and task; how often a run can be resumed from."""
        parser.link_arguments("data.path", "model.data")
        parser.add_argument(
            "--task",
            type=Literal["features", "sequences"],
            default="features",
            help="A vector per feature, or behaviour sequences: what `model` holds the settings of.",
        )
        parser.add_argument(
            "--split",
            type=Literal["train", "valid", "test"],
            default="test",
            help="What predict writes the probabilities of.",
        )
        parser.link_arguments("split", "data.predict_split")
        parser.add_argument(
            "--other_data",
            type=bool,
            default=False,
            help="Take a checkpoint that was trained on other data, whose ids mean the same values.",
        )
        parser.add_argument(
            "--save_every",
            type=PositiveInt | None,
            default=None,
            help="Write last.ckpt every this many training steps too, not only at the end of an epoch.",
        )
        for action in parser._actions:  # jsonargparse may try float first, and so read 1 batch as 1.0, all of them
            if action.dest.removeprefix("trainer.") in _COUNTS_OR_SHARES:
                action._typehint = int | float | None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and checks what is named and the checkpoint before anything is built."""
        super().parse_arguments(parser, args)
        check_parsed(self.config, self.trusted)
        command = self.config["subcommand"]
        path = self.config[command].get("ckpt_path")
        if path is not None:
            read_checkpoint(path)
        elif command != "fit":
            raise UserError(f"{command} needs a trained model: --ckpt_path runs/.../checkpoints/NAME.ckpt")

    def _parse_ckpt_path(self) -> None:
        """Lightning would take settings, and classes, from a checkpoint; they come from the configuration alone."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured Trainer with our progress and checkpoints added to its callbacks."""
        self.trainer_defaults = {**_DEFAULTS, "callbacks": self._callbacks()}
        try:
            settings = self._get(self.config_init, "trainer")
            trainer = super().instantiate_trainer(**{**placed(settings, self.model), **kwargs})
        except (ValueError, TypeError, RuntimeError) as error:  # the last for callbacks that share a key
            raise UserError(f"trainer: {one_line(error)}") from error
        self.model.other_data = self._get(self.config_init, "other_data")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        return trainer

    def _callbacks(self) -> list[Callback]:
        trainer = self._get(self.config_init, "trainer")
        added: list[Callback] = [] if trainer["enable_progress_bar"] is False else [Progress()]
        if self.subcommand != "fit" or trainer["enable_checkpointing"] is False or trainer["fast_dev_run"]:
            return added
        if trainer["limit_val_batches"] != 0:
            added.append(Best())
        added.append(Last(every_n_epochs=1, save_on_train_epoch_end=True))
        steps = self._get(self.config_init, "save_every")
        if steps is not None:
            added.append(Last(every_n_train_steps=steps))
        return added

    def fit(self, **kwargs: Any) -> None:
        """Trains; with --ckpt_path exactly from where that run had come."""
        self._describe()
        self._say_drift("valid")
        self._check_that_something_is_left(kwargs.get("ckpt_path"))
        with self._run_folder():
            self.trainer.fit(weights_only=True, **kwargs)
        folder = self.trainer.log_dir  # which every process has to ask for
        if self.trainer.is_global_zero and folder is not None:
            print(f"run: {folder}", file=sys.stderr)

    def _describe(self) -> None:
        """What is trained: bytes and methods of every table."""
        if not self.trainer.is_global_zero:
            return
        for name, collection in self.model.collections().items():
            head = "" if name == "tables" else f"{name}:\n"
            print(f"{head}{collection.plan.describe()}", file=sys.stderr)

    def _say_drift(self, split: str) -> None:
        """How many ids of a split training never saw, which explains a good part of how its metrics turn out."""
        if self.trainer.is_global_zero and self.datamodule.dataset.rows(split):
            print(drift_line(self.datamodule.path, split), file=sys.stderr)

    @contextmanager
    def _run_folder(self) -> Iterator[None]:
        """Keeps the run's folder for this process: two that start at once would both find the same one free. What
        killed runs left half written beside it goes.

        Raises:
            UserError: when another process writes there.
        """
        folder, writes = self.trainer.log_dir, self.trainer.loggers or self.trainer.checkpoint_callbacks
        if folder is None or not writes or not self.trainer.is_global_zero:
            yield
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        with held(Path(folder).resolve(), wait=False) as mine:
            if not mine:
                raise UserError(f"{folder}: another run writes here; start this one again")
            for run in Path(folder).parent.glob("*/checkpoints") if self.trainer.loggers else ():
                clear(run)
            yield

    def _check_that_something_is_left(self, path: str | None) -> None:
        """The Trainer would end at once without a word; it counts an epoch that max_steps cut short as done.

        Raises:
            UserError: when the checkpoint holds weights alone, or has as many epochs or steps behind it as the run may
                take.
        """
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        if "optimizer_states" not in checkpoint:
            raise UserError(f"{path}: holds weights alone (save_weights_only), from which no run can go on")
        clear(Path(path).parent)
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        for name, done, most in (
            ("max_epochs", epochs, self.trainer.max_epochs),
            ("max_steps", checkpoint["global_step"], self.trainer.max_steps),
        ):
            if most is not None and 0 <= most <= done:
                raise UserError(f"{path}: nothing is left to train, {name} is {most} and {done} are done; raise {name}")

    def validate(self, **kwargs: Any) -> None:
        """Measures a checkpoint on the validation split."""
        self._say_drift("valid")
        self.trainer.validate(weights_only=True, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Measures a checkpoint on the test split."""
        self._say_drift("test")
        self.trainer.test(weights_only=True, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Writes a probability for each row of a split to predictions.parquet, in the split's order, beside the row's
        number and its user.
        """
        if self.datamodule.predict_split != "train":
            self._say_drift(self.datamodule.predict_split)
        written = Predictions(self.datamodule)
        self.trainer.callbacks.append(written)
        self.trainer.predict(weights_only=True, **{**kwargs, "return_predictions": False})
        if written.path is not None:
            print(f"predictions: {written.path}", file=sys.stderr)


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration as config.yaml into the run's folder, and over no file that was read."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes it, where the run has a folder of its own: without a logger its files go to the working folder."""
        folder = trainer.log_dir
        if not trainer.loggers or folder is None:
            return
        target = Path(folder).resolve() / self.config_filename
        if all(Path(each).resolve() != target for each in self.config.get("config") or []):
            super().setup(trainer, pl_module, stage)


def _task_of(argv: Sequence[str]) -> str:
    """The `task` that the options and configuration files name; the parser needs to know before it can read them."""
    found = "features"
    for option, value in _options(argv):
        if option == "--task":
            found = value
        elif option in ("--config", "-c"):
            found = _named_task(Path(value)) or found
    return found


def _options(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Each option with its value, whether they are one word or two; other words with what follows them."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return [(word.partition("=")[0], word.partition("=")[2] if "=" in word else after) for word, after in pairs]


def _named_task(path: Path) -> str | None:
    """The `task` of a configuration file; None where it has none, or where the parser will refuse the file."""
    try:
        described = read_yaml(path)
    except UserError:
        return None
    task = described.get("task") if isinstance(described, dict) else None
    return task if isinstance(task, str) else None


def _quieten() -> None:
    """Lightning's tips and hints that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__`")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    warnings.filterwarnings("ignore", message="The number of training batches")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
