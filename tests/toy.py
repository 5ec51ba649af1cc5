"""A small prepared dataset that several tests train on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer

ROWS = {"train": 2_000, "valid": 1_000, "test": 1_000}


def write_toy(folder: Path, user: str | None = "who", rows: dict[str, int] = ROWS) -> Path:
    """A dataset whose label follows from hidden values of its ids: a good ranker reaches an AUC of about 0.9."""
    random = np.random.default_rng(0)
    features = (Categorical("item", 40), Categorical("tags", 20, pooling="mean", multi=True))
    dataset = Dataset("toy", features, dense=("x",), user=user)
    schema = dataset.arrow_schema()
    of_item, of_tag = random.normal(0, 2, 40), random.normal(0, 2, 20)
    for split, count in rows.items():
        item = random.integers(0, 40, count)
        tags = [random.integers(0, 20, random.integers(0, 4)) for _ in range(count)]
        x = random.normal(size=count)
        logit = of_item[item] + np.array([of_tag[ids].mean() if len(ids) else 0.0 for ids in tags]) + x
        columns = {
            "label": (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32),
            "x": x.astype(np.float32),
            "item": item,
            "tags": [ids.tolist() for ids in tags],
            "who": random.integers(0, 50, count),
        }
        with open_writer(folder / split / "part-000.parquet", schema) as writer:
            table = pa.table([columns[name] for name in schema.names], schema=schema)
            writer.write_table(table, row_group_size=300)
    replace(dataset, files=describe_files(folder)).save(folder)
    return folder
