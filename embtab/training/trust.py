"""What a configuration file may load: classes of certain kinds from certain places, since to import is to run.

Held to it is what was parsed, wherever in a file it stood, or in a file that this one names: the parser imports nothing
from elsewhere, and what it found is looked through before anything is made of it. A package of the user's own is
refused until the user names it in the environment, as in EMBTAB_ALLOW=my_models,my_callbacks. A class that is typed on
the command line is the user's own word: its package is allowed.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.fabric.loggers import Logger
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from embtab.errors import UserError
from embtab.yaml_files import check_yaml

VARIABLE = "EMBTAB_ALLOW"
PLACES = (
    *("embtab", "torch.nn", "torch.optim", "torchrec.models"),
    *("lightning.pytorch.accelerators", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"),
    *("lightning.pytorch.plugins", "lightning.pytorch.profilers", "lightning.pytorch.strategies"),
    *("lightning.fabric.accelerators", "lightning.fabric.loggers"),
    *("lightning.fabric.plugins", "lightning.fabric.strategies"),
)
KINDS = (
    *(Accelerator, Callback, CheckpointIO, ClusterEnvironment, FabricStrategy, LayerSync, Logger, LRScheduler),
    *(nn.Module, Optimizer, Precision, Profiler, Strategy),
)
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")


def allowed(argv: Sequence[str] = ()) -> tuple[str, ...]:
    """What the user trusts beside PLACES, packages or names within them: of the environment and of the command line.

    Raises:
        UserError: when the environment holds something else.
    """
    asked = [name for name in os.environ.get(VARIABLE, "").replace(" ", "").split(",") if name]
    for name in asked:
        if not _NAME.fullmatch(name) or name.split(".")[0] == "jsonargparse":
            raise UserError(
                f"{VARIABLE}: {name!r} is no package that could be allowed; name some as in my_models,others"
            )
    return (*asked, *_typed(argv))


def _typed(argv: Sequence[str]) -> Iterator[str]:
    """The names of classes on the command line, and their packages unless those are Python's, torch's and the like."""
    known = {*sys.stdlib_module_names, "jsonargparse", *(place.split(".")[0] for place in PLACES)}
    for word in argv:
        for name in re.split(r"[^\w./-]+", word):
            if "." in name and _NAME.fullmatch(name) and not Path(name).exists():
                package = name.split(".")[0]
                if package != "jsonargparse":
                    yield name if package in known else package


@contextmanager
def held_to(trusted: Sequence[str]) -> Iterator[None]:
    """Within the block the parser reads local, modest files alone, and imports from PLACES and what is trusted.

    Raises:
        UserError: when a file names anything else.
    """
    files = {"config_read_mode_urls_enabled": False, "config_read_mode_fsspec_enabled": False}
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*PLACES, *trusted], **files)
    loads = get_loader("yaml")

    def checked(text: str) -> Any:
        check_yaml(text)
        return loads(text)

    set_loader("yaml", checked, (yaml.YAMLError,))
    try:
        yield
    except Exception as error:
        denied = _DENIED.search(str(error))
        if denied is None or isinstance(error, UserError):
            raise
        raise _refusal(denied[1]) from None
    finally:
        set_loader("yaml", loads, (yaml.YAMLError,))
        set_parsing_settings(import_path_denylist=[name for name in trusted if not _within(name, PLACES)])


def check_parsed(value: Any, trusted: Sequence[str]) -> None:
    """Looks through settings before anything is made of them.

    Args:
        value: as the parser gives them: classes still by name (`class_path`), functions as they are.
        trusted: what `allowed` gives.

    Raises:
        UserError: for a class of another kind or place, and for any function.
    """
    if isinstance(value, Namespace | Mapping):
        fields = vars(value) if isinstance(value, Namespace) else value
        if "class_path" in fields:
            imported(fields["class_path"], trusted)
        for each in (*fields.keys(), *fields.values()):
            check_parsed(each, trusted)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            check_parsed(each, trusted)
    elif inspect.isclass(value) or inspect.isroutine(value):
        _check(value, f"{value.__module__}.{value.__qualname__}", trusted)


def imported(name: Any, trusted: Sequence[str]) -> Any:
    """The class of a name.

    Raises:
        UserError: when it may not be imported, is not there, or is of another kind or place.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "." not in name:
        raise UserError(f"{name!r} is no class; write one as package.module.Class")
    if not _within(name, (*PLACES, *trusted)):
        raise _refusal(name)
    module, _, last = name.rpartition(".")
    try:
        found = getattr(import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name} is not there: {error}") from None
    _check(found, name, trusted)
    return found


def _check(found: Any, name: str, trusted: Sequence[str]) -> None:
    if _within(name, trusted):
        return
    if not inspect.isclass(found) or not issubclass(found, KINDS):
        raise UserError(
            f"{name} is no callback, logger, profiler, strategy, plugin, optimizer, schedule or module, and a file may "
            f"name no others; type it on the command line, or set {VARIABLE}={name} if you trust the file"
        )
    if not _within(f"{found.__module__}.{found.__qualname__}", PLACES):
        raise _refusal(f"{found.__module__}.{found.__qualname__}")


def _within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _refusal(name: str) -> UserError:
    package = name.split(".")[0]
    place = name if any(each.split(".")[0] == package for each in PLACES) else package
    return UserError(
        f"{name} would be imported, and a configuration may name classes of {', '.join(PLACES[:4])} and lightning's "
        f"callbacks, loggers, plugins, profilers and strategies alone; if you trust it, set {VARIABLE}={place}"
    )
