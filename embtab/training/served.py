"""Tests and predictions read the rows that serving will read; training goes on from its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from embtab.tables.base import Collection


class ServedRows(L.Callback):
    """Rounds every table to its plan's precision while the Trainer tests or predicts, and puts the trained rows back.

    `RankingTask` brings it along. Tables in fp32 are served as they are; the others are copied meanwhile. On many
    processes each rounds, and copies, the rows that it holds.
    """

    def __init__(self) -> None:
        self._trained: list[tuple[Collection, str, list[Tensor]]] = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rounds the tables.

        Raises:
            UserError: when a table holds an entry that cannot be stored in its precision; it names the table.
        """
        self._round(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rounds the tables.

        Raises:
            UserError: when a table holds an entry that cannot be stored in its precision; it names the table.
        """
        self._round(pl_module)

    def on_test_end(self, *_: Any) -> None:
        """Puts the trained rows back."""
        self._restore()

    def on_predict_end(self, *_: Any) -> None:
        """Puts the trained rows back."""
        self._restore()

    def on_exception(self, *_: Any) -> None:
        """Puts the trained rows back, where a test or a prediction was interrupted."""
        self._restore()

    @torch.no_grad()
    def _round(self, module: L.LightningModule) -> None:
        for collection, name in _rounded(module):
            self._trained.append((collection, name, [part.clone() for part in collection.lookup.parts(name)]))
        for each in module.modules():
            if isinstance(each, Collection):
                each.round_to_served()

    @torch.no_grad()
    def _restore(self) -> None:
        for collection, name, trained in self._trained:
            for part, rows in zip(collection.lookup.parts(name), trained, strict=True):
                part.copy_(rows)
        self._trained = []


def _rounded(module: L.LightningModule) -> Iterator[tuple[Collection, str]]:
    """The tables whose rows are not served as they are trained."""
    for each in module.modules():
        if isinstance(each, Collection):
            yield from ((each, name) for name, table in each.plan.tables.items() if table.precision != "fp32")
