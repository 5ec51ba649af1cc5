"""The benchmark of searches: it finds what a search finds, and its command writes all phases and a plot."""

import csv
from pathlib import Path

import pytest
import torch

from embtab.bench import search
from embtab.bench.run import run
from embtab.bench.settings import Settings
from embtab.bench.timing import Stopwatch
from embtab.bench.workload import Case
from embtab.cli import main
from embtab.errors import UserError


def test_a_turn_searches_whole_histories(monkeypatch) -> None:
    found = []
    best = search.top_events

    def spy(scores, lengths, k):
        found.append((scores, lengths, k, best(scores, lengths, k)))
        return found[-1][-1]

    monkeypatch.setattr(search, "top_events", spy)
    watch = Stopwatch(torch.device("cpu"))
    search.search_arm(Case(dim=4, batch=3, bag=30), torch.device("cpu"))(0, watch)
    ((scores, lengths, k, chosen),) = found
    assert len(watch.laps()) == len(search.PHASES)
    assert lengths.tolist() == [30, 30, 30]
    assert k == search.TOP_K
    assert [part.sum().item() for part in chosen.split(30)] == [20, 20, 20]
    assert scores.std() > 0


def test_the_command_measures_every_width_and_length(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--dim", "8", "4", "--bag", "30", "60", "--batch", "2", "--rounds", "2"]
    main(["bench", "search", *sizes, "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["dim"], r["bag"]) for r in rows} == {(d, n) for d in ("8", "4") for n in ("30", "60")}
    assert len(rows) == 4 * (len(search.PHASES) + 1)
    assert all(float(r["ratio"]) == 1 for r in rows if r["dim"] == "8")
    assert (tmp_path / "out" / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert "search" in capsys.readouterr().out


def test_histories_that_would_fill_the_memory_are_refused() -> None:
    with pytest.raises(UserError, match="smaller --batch"):
        run(Settings(["search"], dims=[128], bags=[10_000], batches=[4096], machine_bytes=1 << 20))
