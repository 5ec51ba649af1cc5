"""A sweep that is killed at any moment and started again ends in the same report as one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embtab.compare.report import make_report, write_report
from embtab.compare.results import TIMES, read_results, write_results
from embtab.compare.sweep import read_sweep
from embtab.datasets import synthetic
from embtab.datasets.schema import Dataset

SWEEP = """
data: {data}
methods: {methods}
budgets: [0.3x, 0.1x]
seeds: [0, 1]
dim: 4
model: {{name: AutoInt, num_layers: 0, dnn: [8]}}
batch_size: 512
"""
STATIC = "[dense, hash, unified, qr]"
SEARCHED = "[dense, {name: magnitude, every: 3}, {name: optembed, generations: 1, mutations: 2, crossovers: 1}]"


def command(config: Path, out: Path, jobs: int) -> list[str]:
    return [sys.executable, "-m", "embtab", "compare", "--config", str(config), "--out", str(out), "--jobs", str(jobs)]


def done(out: Path) -> int:
    """Cells with a result."""
    return sum(row["status"] == "ok" for row in read_results(out / "results.csv").values())


def timeless(config: Path, out: Path, folder: Path) -> dict[str, bytes]:
    """The report's files, made of the results without the times, which no two runs share."""
    sweep = read_sweep(config)
    rows = [row | dict.fromkeys(TIMES) for row in read_results(out / "results.csv").values()]
    folder.mkdir()
    write_results(folder / "results.csv", rows)
    write_report(make_report(sweep, Dataset.load(sweep.data), rows), folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a busy machine takes long to start nine processes
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_killed_three_times_gives_the_report_of_one_left_alone(tmp_path: Path, jobs: int) -> None:
    synthetic.prepare(tmp_path / "data", rows=4000, scale=0.0002, seed=1)
    config = tmp_path / "sweep.yaml"
    config.write_text(SWEEP.format(data=tmp_path / "data", methods=STATIC))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(config, straight, jobs), check=True, capture_output=True)
    cells = done(straight)
    moments = random.Random(jobs)
    for cell in sorted(moments.sample(range(1, cells - 3), 3)):  # somewhere in the work after this cell
        process = subprocess.Popen(
            command(config, killed, jobs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and done(killed) < cell:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done_before = done(killed)
    last = subprocess.run(command(config, killed, jobs), check=True, capture_output=True, text=True)
    assert 0 < last.stderr.count(": auc ") == cells - done_before  # what was done is not done again
    assert timeless(config, straight, tmp_path / "one") == timeless(config, killed, tmp_path / "two")
    # Written again from the same results, by another process: the same bytes, times and all.
    before = {path: path.read_bytes() for path in killed.rglob("*.*") if path.is_file()}
    subprocess.run(command(config, killed, jobs), check=True, capture_output=True)
    assert {path: path.read_bytes() for path in killed.rglob("*.*") if path.is_file()} == before
    names = {path.name for path in before}
    assert {"results.csv", "results.parquet", "report.html", "report.md", "auc-fp32.png"} <= names
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_inside_its_searches_gives_the_report_of_one_left_alone(tmp_path: Path) -> None:
    synthetic.prepare(tmp_path / "data", rows=4000, scale=0.0002, seed=1)
    config = tmp_path / "sweep.yaml"
    config.write_text(SWEEP.format(data=tmp_path / "data", methods=SEARCHED))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(config, straight, 1), check=True, capture_output=True)
    for unfinished in ("magnitude*/*.part.pt", "optembed*/supernet.part.pt", "optembed*/retrain.part.pt"):
        process = subprocess.Popen(command(config, killed, 1), stderr=subprocess.DEVNULL, start_new_session=True)
        while not list(killed.glob(f"searches/{unfinished}")):
            assert process.poll() is None, f"nothing left to kill at {unfinished}"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(config, killed, 1), check=True, capture_output=True)
    assert timeless(config, straight, tmp_path / "one") == timeless(config, killed, tmp_path / "two")
