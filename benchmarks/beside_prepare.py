"""`embtab prepare criteo` beside FuxiCTR's feature processor, in turn, on rows of the same content.

    python -m venv fx; fx/bin/pip install fuxictr==2.3.10 "polars<2"    # of its own: it reads CSV by polars 1 only
    python benchmarks/beside_prepare.py fx/bin/python [--rows 200000]

Generated rows: 13 integers, some of them blank, and 26 hexadecimal values of Criteo's cardinalities cut to 100,000, by
Zipf's law; as Criteo's raw text for ours, as CSV with a header for theirs. Each turn is a process of its own, timed
from the first call to the last: what it imports is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl

from embtab.bench.workload import Case, draw

OURS = """
import sys, time
from pathlib import Path
from embtab.datasets.criteo import prepare
begun = time.perf_counter()
prepare([Path(sys.argv[1])], Path(sys.argv[2]))
print("seconds", time.perf_counter() - begun)
"""
THEIRS = """
import sys, time
from fuxictr.preprocess import FeatureProcessor, build_dataset
csv, out = sys.argv[1:]
features = [
    dict(name=[f"I{i}" for i in range(1, 14)], active=True, dtype="float", type="numeric", fill_na=0),
    dict(name=[f"C{i}" for i in range(1, 27)], active=True, dtype="str", type="categorical", fill_na=""),
]
begun = time.perf_counter()
processor = FeatureProcessor(
    feature_cols=features, label_col=dict(name="label", dtype="float"), dataset_id="made", data_root=out
)
build_dataset(processor, train_data=csv, min_categr_count=2, data_root=out)
print("seconds", time.perf_counter() - begun)
"""


def made(rows: int) -> pl.DataFrame:
    """Columns label, I1 to I13, C1 to C26."""
    random = np.random.default_rng(0)
    columns: dict[str, pl.Series] = {"label": pl.Series(random.integers(0, 2, rows))}
    for i in range(1, 14):
        numbers = pl.Series(random.geometric(0.02, rows) - 1)
        columns[f"I{i}"] = numbers.set(pl.Series(random.random(rows) < 0.2), None)
    for i, num_ids in enumerate(Case().cardinalities, 1):
        ids = pl.Series(draw(random, num_ids, rows, "zipf") * 2654435761 % 2**32)
        columns[f"C{i}"] = pl.Series([f"{each:08x}" for each in ids])
    return pl.DataFrame(columns)


def main() -> None:
    """Prints rows a second and the ratio."""
    parser = argparse.ArgumentParser(description="prepare criteo beside FuxiCTR")
    parser.add_argument("python", help="an interpreter that has fuxictr and polars 1")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = made(given.rows)
        table.write_csv(folder / "made.txt", separator="\t", include_header=False)
        table.write_csv(folder / "made.csv")
        arms = {
            "embtab": (sys.executable, OURS, folder / "made.txt"),
            "FuxiCTR": (str(Path(given.python).absolute()), THEIRS, folder / "made.csv"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(given.rounds):
            for name, (python, script, raw) in arms.items():
                told = [python, "-c", script, str(raw), str(folder / f"{name}-{turn}")]
                done = subprocess.run(told, check=True, capture_output=True, text=True, cwd=folder)
                seconds[name].append(float(done.stdout.split("seconds ")[-1]))
    for name, each in seconds.items():
        print(f"{name:8s} {median(each):7.2f} s {given.rows / median(each):10,.0f} rows/s")
    ratio = median(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"{ratio:.1f} times its rows a second")


if __name__ == "__main__":
    main()
