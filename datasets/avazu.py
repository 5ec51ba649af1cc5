"""Avazu click logs (Kaggle, 2014) to a dataset folder: 21 categorical columns, and the hour as two more.

The raw format is CSV with a header, plain or gzip: id, click, hour (YYMMDDHH), C1, banner_pos, ..., C21. The file
without clicks (the challenge's test file) has no labels and is of no use here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embtab.datasets import table
from embtab.datasets.roles import Ids, Roles, Split, Time
from embtab.datasets.schema import Dataset

CATEGORIES = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)


def prepare(raw: Sequence[Path], out: Path, *, min_count: int = 2, valid: float = 0.1, test: float = 0.1) -> Dataset:
    """Turns raw Avazu files into a dataset folder.

    The features are CATEGORIES, `hour_hour` (0 to 23) and `hour_weekday` (0 is Monday). The splits follow time: whole
    hours, so their shares are as near to the asked ones as hours allow. The row's `id` is not used.

    Args:
        raw: files, plain or gzip, or folders of them.
        out: the folder to make; it must not exist, or be empty.
        min_count: values that occur less often in train share id 0.
        valid: share of the rows that becomes the validation split.
        test: share of the rows that becomes the test split.

    Raises:
        UserError: for a bad option value, or an output folder that is not empty.
        DataError: for a bad file, naming file, line and column. No output is left behind.
    """
    roles = Roles(
        label="click",
        features=tuple(Ids(name, "categorical", min_count=min_count) for name in CATEGORIES),
        split=Split("time", valid, test),
        time=Time("hour", format="%y%m%d%H", derive=("hour", "weekday")),
        name="avazu",
    )
    return table.prepare(raw, out, roles=roles)
