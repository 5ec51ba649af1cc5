"""The script of docs/sharding.md under torchrun: it trains, a killed process stops the run, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embtab.datasets import synthetic

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "docs" / "sharded_run.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    return subprocess.Popen(
        [*command, str(folder / "data"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def child_of(process: subprocess.Popen) -> int:
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", SCRIPT.name], capture_output=True, text=True)
    return int(found.stdout.split()[-1])


def test_a_killed_process_stops_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    synthetic.prepare(tmp_path / "data", rows=150_000, scale=0.002)
    run = start(tmp_path, "row_wise")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not (checkpoint / "meta.pt").exists():
        assert run.poll() is None, run.communicate(timeout=60)[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(child_of(run), signal.SIGKILL)
    said, _ = run.communicate(timeout=130)
    assert run.returncode != 0
    assert "another process of the run died or hangs. Start all processes again with ckpt_path" in said
    resumed = start(tmp_path, "table_wise", str(checkpoint))
    said, _ = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, said
    assert "'val/auc'" in said
