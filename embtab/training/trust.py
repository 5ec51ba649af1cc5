"""What a configuration file may load: classes of known packages only, since importing a module runs it.

A file that names another package is refused until the user names that package in the environment, as in
EMBTAB_ALLOW=my_models,my_callbacks. Options on the command line are the user's own words and are not held to this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from embtab.errors import UserError

TRUSTED = ("embtab", "lightning", "torch", "torchrec")
VARIABLE = "EMBTAB_ALLOW"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_config(path: Path) -> None:
    """Refuses a configuration that names a class or function of a package that is not trusted.

    A string counts as such a name wherever it stands, because a class may be written without `class_path`; files and
    folders are no packages that can be imported, and pass. A file that cannot be read is left to its reader.

    Raises:
        UserError: with the name, the file, and how to allow it.
    """
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    allowed = {*TRUSTED, *os.environ.get(VARIABLE, "").replace(" ", "").split(",")}
    for text in _strings(described):
        package = text.split(".")[0]
        if _DOTTED.fullmatch(text) and package not in allowed and find_spec(package) is not None:
            raise UserError(
                f"{path}: {text} would be imported from {package!r}, which is none of {', '.join(TRUSTED)}; "
                f"if you trust it, set {VARIABLE}={package}"
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _strings(key)
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
