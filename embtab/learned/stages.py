"""Stages: what is done is written down and never done twice, so a search that was killed goes on where it was.

    FOLDER/STAGE.pt        what a stage gave, once it is done
    FOLDER/STAGE.part.pt   where it stands, while it is not

Every file is written beside and renamed. They hold tensors and plain types alone, and are read as such.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embtab.files import replaced_file
from embtab.torch_files import load_plain

State = dict[str, Any]
Save = Callable[[State], None]


class Stages:
    """The stages of one search, in a folder.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, State] = {}

    def run(self, name: str, work: Callable[[Save, State | None], State]) -> State:
        """What a stage gives: from its file where it was done before, else from `work`.

        Args:
            name: of the stage.
            work: (save, resumed) -> what the stage gives. It may call `save` with where it stands as often as it likes;
                `resumed` is what it last saved before it was stopped, or None. Given the same, it must give the same.

        Raises:
            UserError: when a file of an earlier run is damaged.
        """
        done, part = self.folder / f"{name}.pt", self.folder / f"{name}.part.pt"
        if not done.exists():
            write(done, work(lambda state: write(part, state), read(part) if part.exists() else None))
        part.unlink(missing_ok=True)
        self.done[name] = read(done)
        return self.done[name]


def write(path: Path, state: State) -> None:
    """Replaces a file by a state in one step."""
    with replaced_file(path) as beside, beside.open("wb") as file:
        torch.save(state, file)


def read(path: Path) -> State:
    """A state, from its file; nothing in it is executed.

    Raises:
        UserError: when it is damaged.
    """
    state: State = load_plain(path, f"{path}: damaged; remove it, and the stage is done again")
    return state
