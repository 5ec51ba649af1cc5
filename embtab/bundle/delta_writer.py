"""Writes deltas: the rows of a later training that differ from those of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from embtab import __version__
from embtab.bundle.writer import save
from embtab.errors import UserError
from embtab.files import hidden, new_folder
from embtab.reader import Bundle, golden
from embtab.reader.delta import CHANGES, FORMAT, VERSION, changes, described
from embtab.reader.manifest import write_signed
from embtab.tables.base import Collection


def save_delta(
    tables: Collection,
    path: str | Path,
    since: Sequence[str | Path],
    *,
    quality: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes what changed as a delta: all of it or, when anything fails, nothing.

    Rows are stored in the precision of the bundle, and compared as they are stored: a row that training moved by less
    than its precision shows is no change.

    Args:
        tables: the tables as they are now.
        path: the folder to make.
        since: the bundle, and the deltas that were made since, in order.
        quality: what was measured, such as {"auc": 0.8}.
        provenance: where the tables come from.

    Returns:
        How many rows of each tensor changed.

    Raises:
        UserError: when the tables are of another plan than the bundle, or nothing changed.
    """
    base, *deltas = since
    old = Bundle(base, deltas=deltas)
    precisions = {table["precision"] for table in old.plan["tables"]}
    out = Path(path)
    with new_folder(out) as folder, hidden(out.with_name(f"{out.name}.whole")) as beside:
        whole = beside / "bundle"
        save(tables, whole, precision=precisions.pop() if len(precisions) == 1 else None)
        new = Bundle(whole, verify=False)
        if described(old.config) != described(new.config):
            raise UserError(f"{base}: its plan is not that of the tables now; a delta cannot say that, export a bundle")
        content, counts = changes(old.tensors, new.tensors)
        if not counts:
            raise UserError(f"{base}: nothing changed since; there is no delta to write")
        save_file(content, folder / CHANGES)
        shutil.copyfile(whole / golden.FILE, folder / golden.FILE)
        write_signed(
            folder,
            {
                "format": FORMAT,
                "version": VERSION,
                "producer": f"embtab {__version__}",
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "base": old.digest,
                "changed": counts,
                "golden": new.config["golden"],
                "provenance": dict(provenance or {}),
                "quality": dict(quality or {}),
            },
        )
    return counts
