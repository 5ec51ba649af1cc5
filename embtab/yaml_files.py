"""YAML files of anyone: short, shallow, and no longer when their aliases are written out than they look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from embtab.errors import UserError

MAX_CHARACTERS, MAX_DEPTH, MAX_NODES = 1_000_000, 40, 100_000


def check_yaml(text: str) -> None:
    """Counts what a loader would make of a text, before one does.

    Raises:
        yaml.YAMLError: where that is too much, where something contains itself, or for what is no YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"has {len(text)} characters; a configuration has at most {MAX_CHARACTERS}")
    nodes: dict[str, int] = {}  # below an anchor that has ended, itself included
    open_: list[tuple[str | None, int]] = []  # anchors of the collections that have not, and the count before each
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise yaml.YAMLError(f"line {line}: {event.anchor!r:.40} contains itself")
            count += nodes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, count - 1))
            elif event.anchor is not None:
                nodes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                nodes[anchor] = count - before
        if len(open_) > MAX_DEPTH:
            raise yaml.YAMLError(f"line {line}: is nested more than {MAX_DEPTH} deep")
        if count > MAX_NODES:
            raise yaml.YAMLError(f"line {line}: has more than {MAX_NODES} entries, aliases written out")


def load_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The plain data of a text.

    Raises:
        yaml.YAMLError: for what `check_yaml` or the loader refuses.
    """
    check_yaml(text)
    try:
        return yaml.load(text, Loader=loader)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # of dates and numbers that cannot be
        raise yaml.YAMLError(f"{error}") from None


def read_yaml(file: str | Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The plain data of a file.

    Raises:
        UserError: when it cannot be read, or is refused as by `load_yaml`.
    """
    try:
        return load_yaml(Path(file).read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
