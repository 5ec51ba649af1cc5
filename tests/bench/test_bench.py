"""embtab bench: arms take turns, ratios are paired, ids follow their law, and results are written whole."""

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from embtab.bench import machine, memory, serving
from embtab.bench.loading import PYARROW, loader_arms
from embtab.bench.lookups import TORCH, TORCHREC, lookup_arms, make_tables
from embtab.bench.run import run
from embtab.bench.settings import Settings
from embtab.bench.timing import Stopwatch, Times, alternate
from embtab.bench.workload import Case, draw, numeric
from embtab.cli import main
from embtab.datasets import synthetic
from embtab.datasets.schema import Dataset
from embtab.errors import UserError
from embtab.fused import OPTIMIZERS

CPU = torch.device("cpu")
SMALL = ["--batch", "32", "--rounds", "2", "--scale", "0.0001"]


def test_arms_take_turns_and_warm_ups_are_thrown_away() -> None:
    turns: list[tuple[str, int]] = []

    def arm(name: str):
        def turn(i: int, watch: Stopwatch) -> None:
            turns.append((name, i))
            watch.lap()
            watch.lap()

        return turn

    seconds = alternate({"a": arm("a"), "b": arm("b")}, rounds=3, device=CPU, warmup=1)
    assert sorted(turns, key=lambda turn: turn[1]) == turns  # round after round
    assert sorted(turns) == [(name, i) for name in "ab" for i in range(4)]
    assert len({"".join(name for name, i in turns if i == of) for of in range(4)}) == 2  # not always the same neighbour
    assert {name: times.shape for name, times in seconds.items()} == {"a": (3, 2), "b": (3, 2)}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    times = Times(np.array([1.0, 20.0, 4.0]), np.array([1.0, 10.0, 1.0]))  # a slow round is slow for both
    assert times.ratio == 2.0
    assert times.median == 4.0


def test_drawn_ids_follow_the_zipf_law() -> None:
    ids = draw(np.random.default_rng(0), 1000, 200_000, "zipf")
    assert ids.min() == 0
    assert ids.max() == 999
    # The law is continuous: id i has the mass of [i + 1, i + 2).
    cdf = (np.arange(1, 1001) ** -0.05 - 1) / (1001**-0.05 - 1)
    found = np.searchsorted(np.sort(ids), np.arange(1000)) / len(ids)
    assert np.abs(found - cdf).max() < 0.005


def test_a_case_has_criteos_features_and_batches_within_range() -> None:
    assert Case(cap=None).num_ids == 33_762_577
    case = Case(batch=8, bag=3, cap=100)
    (batch,) = case.batches(1, CPU)
    assert batch.values().numel() == case.lookups == 26 * 8 * 3
    for feature in case.features:
        assert int(batch[feature.name].values().max()) < feature.num_ids <= 100


def test_every_kind_of_tables_gives_one_vector_a_feature_and_bag() -> None:
    case = Case(dim=4, batch=8, bag=2, cap=50)
    (batch,) = case.batches(1, CPU)
    for name in (TORCHREC, TORCH, "dense", "qr:op=sum", "dense@native", "qr:op=sum@native+compiled", "hash@fbgemm"):
        tables = make_tables(name, case, "0.5x", "rowwise_adagrad", CPU)
        assert tables.forward(batch).shape == (8, 26 * 4)
    for wrong in ("dense@torchrec", "dense+native", "dense@native+quick"):
        with pytest.raises(UserError, match=re.escape(f"arm {wrong}: a method may be followed by @native or @fbgemm")):
            make_tables(wrong, case, "0.5x", "rowwise_adagrad", CPU)


def test_arms_of_lookups_take_a_number_of_threads() -> None:
    case, before = Case(batch=8, cap=50), torch.get_num_threads()
    seen = {}
    try:
        arms = lookup_arms(["hash@native/1", "hash@native/2", "hash@native"], case, "0.5x", "sgd", torch.device("cpu"))
        for name, arm in arms.items():
            arm(0, Stopwatch(torch.device("cpu")))
            seen[name] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen == {"hash@native/1": 1, "hash@native/2": 2, "hash@native": before}
    for wrong in ("dense/0", "dense/two", "dense/-1", "dense/"):
        with pytest.raises(UserError, match=f"arm {wrong}: after / stands a number of threads"):
            lookup_arms([wrong], case, "0.5x", "sgd", torch.device("cpu"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torchrecs_arm_trains_by_every_table_optimizer(optimizer: str) -> None:
    case = Case(dim=4, batch=8, cap=50)
    tables = make_tables(TORCHREC, case, "0.5x", optimizer, CPU)
    (batch,) = case.batches(1, CPU)
    before = tables.forward(batch).detach().clone()
    tables.forward(batch).sum().backward()
    assert not torch.equal(before, tables.forward(batch))


def test_the_plain_torch_arm_trains_by_sgd() -> None:
    case = Case(dim=4, batch=8, cap=50)
    (batch,) = case.batches(1, CPU)
    tables = make_tables(TORCH, case, "1x", "sgd", CPU)
    bag = next(iter(tables.module.children()))
    assert isinstance(bag, nn.EmbeddingBag)
    before = bag.weight.detach().clone()
    tables.forward(batch).sum().backward()
    tables.update()
    counts = torch.bincount(batch["C1"].values(), minlength=50).unsqueeze(1)
    torch.testing.assert_close(bag.weight.detach(), before - 0.01 * counts)


def test_rates_of_the_memory_are_those_of_what_was_moved() -> None:
    limits = machine.measure([4, 16], CPU, 8 << 20)
    assert limits.copy > 1e8
    # More bytes a row cannot be read more often a second; generous, as the machine may be busy.
    assert limits.rows[16] < 4 * limits.rows[4]
    assert "copy" in str(limits)


def test_peak_memory_counts_what_a_process_touched() -> None:
    before = memory.most_resident()
    assert before is not None
    touched = torch.ones(before // 4 + (64 << 18))
    after = memory.most_resident()
    assert after is not None
    assert after >= before + touched.nbytes // 2


def test_the_command_writes_results_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", *SMALL, "--arms", "torchrec", "dense", "qr", "--baseline", "dense", "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["phase"]) for row in rows] == [
        (arm, phase) for phase in ("step", "forward") for arm in ("torchrec", "dense", "qr")
    ]
    assert all(float(row["ratio"]) == 1 for row in rows if row["arm"] == "dense")
    for row in rows:
        assert float(row["rate"]) == pytest.approx(32 * 26 / float(row["median_ms"]) * 1e3)
        assert row["sample_bytes"] == str(26 * 16 * 4)
    assert (tmp_path / "out" / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "M/s" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["autoint", "din", pytest.param("serving", marks=pytest.mark.slow)])  # compiles
def test_rankers_are_measured(what: str) -> None:
    arms = (TORCHREC, "qr") if what == "serving" else (TORCHREC, TORCH, "dense", "qr")  # each is compiled to be served
    settings = Settings(
        (what,), arms, batches=(16,), bags=(3,), scales=(1e-4,), rounds=1, dims=(4,), machine_bytes=1 << 20
    )
    if what != "din":
        settings = Settings((what,), arms, batches=(16,), scales=(1e-4,), rounds=1, dims=(4,), machine_bytes=1 << 20)
    names = [result.arm for result in run(settings)]
    assert names == (["dense", "qr"] if what == "din" else list(arms))


@pytest.mark.parametrize("form", ["onnx", "onnx+int8", "quantised"])
def test_what_is_served_answers_as_what_was_trained(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that is timed gives the trained ranker's probabilities."""
    if form != "quantised":
        pytest.importorskip("onnxruntime")
    case, seen = Case(dim=4, batch=5, scale=1e-3), {}
    chosen = serving._program

    def program(name, form, model, *rest):
        seen["model"], answer = model, chosen(name, form, model, *rest)

        def noting(inputs):
            seen.setdefault("answer", answer(inputs))
            seen.setdefault("inputs", inputs)

        return noting

    kept = {}
    made = serving.make_tables
    monkeypatch.setattr(serving, "make_tables", lambda *a: kept.setdefault("tables", made(*a)))
    monkeypatch.setattr(serving, "_program", program)
    arms = serving.serving_arms([f"qr@{form}"], case, "0.5x", "sgd", torch.device("cpu"))
    arms[f"qr@{form}"](0, Stopwatch(torch.device("cpu")))
    batch = case.batches(8, torch.device("cpu"))[0]
    with torch.no_grad():
        vectors = kept["tables"].module.vectors(batch)
        wanted = seen["model"](torch.from_numpy(seen["inputs"]["dense"]), vectors)
    answer = seen["answer"] if form == "quantised" else seen["answer"]["logits"]
    torch.testing.assert_close(torch.as_tensor(answer), wanted, rtol=1e-3, atol=1e-6 if form == "onnx" else 1e-3)


@pytest.mark.parametrize(("cold", "answered"), [(True, 1), (False, 21)])
def test_a_request_comes_after_others_unless_it_is_cold(
    cold: bool, answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[np.ndarray] = []
    monkeypatch.setattr(serving, "_program", lambda *_: lambda inputs: requests.append(inputs["ids"]))
    case = Case(dim=4, batch=1, scale=1e-3)
    arms = serving.serving_arms(["qr@onnx"], case, "0.5x", "sgd", torch.device("cpu"), cold)
    watch = Stopwatch(torch.device("cpu"))
    arms["qr@onnx"](3, watch)
    assert (len(requests), len(watch.laps())) == (answered, 1)
    ids = [serving._inputs(batch, torch.zeros(1, 13))["ids"] for batch in case.batches(8, torch.device("cpu"))]
    assert all((given == ids[(3 + k) % 8]).all() for k, given in enumerate(requests))


def test_a_plain_ranker_is_served_beside() -> None:
    """One table of all ids as one writes it in torch: row for row what an own table for each feature has."""
    pytest.importorskip("onnxruntime")
    case, cpu = Case(dim=4, batch=5, scale=1e-3), torch.device("cpu")
    torch.manual_seed(0)
    model = serving.SmallRanker(13 + 4 * 26).eval()
    plain = serving.PlainRanker(case, model)
    given = serving._inputs(case.batches(1, cpu)[0], numeric(case, 1, cpu)[0][0])
    own = plain.table.weight.split([feature.num_ids for feature in case.features])
    vectors = torch.stack([table[given["ids"][:, k]] for k, table in enumerate(own)], dim=1)
    with torch.no_grad():
        found = plain({name: torch.from_numpy(array) for name, array in given.items()})["logits"]
        torch.testing.assert_close(found, model(torch.from_numpy(given["dense"]), vectors))
    answer = serving._program("nn.Embedding", "onnx", model, case, "0.5x", "sgd")(given)
    assert isinstance(answer, dict)
    assert answer["logits"].shape == (5,)


@pytest.mark.parametrize(("what", "arm"), [("lookups", "dense+compiled"), ("autoint", "qr+bf16")])
def test_arms_in_another_form_are_measured(what: str, arm: str) -> None:
    settings = Settings((what,), (arm,), arm, batches=(16,), scales=(1e-4,), rounds=1, dims=(4,), machine_bytes=1 << 20)
    assert {result.arm for result in run(settings)} == {arm}


@pytest.mark.parametrize(
    ("what", "arm", "message"),
    [
        (
            "lookups",
            "qr+fast",
            r"arm qr\+fast: a method may be followed by @native or @fbgemm, and then \+compiled, only",
        ),
        ("serving", "qr@java", "forms are onnx, onnx.int8, aoti, aoti.int8, quantised"),
        ("serving", f"{TORCHREC}@onnx", "only a method of embtab is served so"),
    ],
)
def test_unknown_forms_are_named(what: str, arm: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(Settings((what,), (arm,), arm, batches=(8,), scales=(1e-4,), rounds=1, dims=(4,), machine_bytes=1 << 20))


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="unknown measurement 'trains'; there are lookups"):
        run(Settings(("trains",)))
    with pytest.raises(UserError, match="the baseline 'torchrec' is not measured; arms are dense"):
        run(Settings(arms=("dense",)))
    with pytest.raises(UserError, match="memory is not measured of search"):
        run(Settings(("lookups", "search"), memory=True))
    with pytest.raises(SystemExit):
        main(["bench", "--skew", "steep"])
    assert "--skew must be zipf or uniform, got steep" in capsys.readouterr().err


@pytest.mark.slow
def test_the_reader_is_measured_on_every_row_of_the_split(tmp_path: Path) -> None:
    synthetic.prepare(tmp_path / "data", rows=500, scale=0.0001, seed=0)
    arms, rows = loader_arms(tmp_path / "data", batch=64)
    assert rows == Dataset.load(tmp_path / "data").rows("train") == 400
    watch = Stopwatch(CPU)
    for turn in arms.values():
        turn(0, watch)
    assert all(seconds > 0 for seconds in watch.laps())
    settings = Settings(
        ("loader",), data=tmp_path / "data", batches=(64,), rounds=3, memory=True, machine_bytes=1 << 20
    )
    found = {result.arm: result for result in run(settings)}
    assert list(found) == [PYARROW, "in order", "shuffled"]
    assert found[PYARROW].ratio == 1
    assert all(result.rate == pytest.approx(400e3 / result.median_ms) for result in found.values())
    assert all((result.peak_bytes or 0) > 50e6 for result in found.values())


@pytest.mark.slow
def test_memory_is_that_of_the_work_in_a_process_of_its_own() -> None:
    small, large = (memory.peak_bytes(partial(np.ones, count), CPU) for count in (1, 30_000_000))
    assert small is not None
    assert large is not None
    assert 200e6 < large - small < 300e6
    settings = Settings(
        arms=("dense",), baseline="dense", batches=(8,), scales=(1e-4,), dims=(4,), memory=True, machine_bytes=1 << 20
    )
    forward, step = run(settings)
    assert forward.peak_bytes == step.peak_bytes
    assert step.peak_bytes is not None
    assert step.peak_bytes > small


def test_a_case_that_does_not_fit_is_skipped_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    huge = Settings(arms=("dense",), baseline="dense", scales=(1e6,), cap=None, machine_bytes=1 << 20)
    assert run(huge) == []
    assert "skipped" in capsys.readouterr().err
