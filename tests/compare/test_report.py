"""The page shows the numbers of results.csv, says what they mean, and is drawn without errors or overlap."""

import csv
import html as entities
import json
import math
import re
import shutil
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from compare.results_made_up import BUDGETS, DATASET, DENSE_BYTES, SWEEP, made_up_rows

from embtab.compare.charts import HEIGHT, ticks
from embtab.compare.figures import kind_of
from embtab.compare.labels import LINE, Axis, spread
from embtab.compare.report import brief, html, make_report, markdown, write_report
from embtab.compare.results import read_results, write_results
from embtab.compare.statistics import mean_interval
from embtab.compare.summary import summarise
from embtab.compare.words import advise
from embtab.features import Feature
from embtab.methods import METHODS
from embtab.planning import plan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLIPPED = """
<script>
const look = setInterval(() => {
  if (!document.body.dataset.rendered) return;
  clearInterval(look);
  const clipped = [...document.querySelectorAll(".chart svg")].flatMap((svg) => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter((text) => {
      const box = text.getBoundingClientRect();
      return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1);
    }).map((text) => text.textContent);
  });
  document.body.dataset.clipped = clipped.join("|");
  document.body.dataset.spill = document.body.scrollWidth - document.body.clientWidth;
}, 50);
</script>
"""


@pytest.fixture(scope="module")
def page() -> str:
    return html(make_report(SWEEP, DATASET, made_up_rows()))


def records_of(page: str, chart: str) -> list[dict[str, Any]]:
    """What a chart draws, read from the page."""
    found = re.search(rf'<script[^>]*data-chart="chart-{re.escape(chart)}">(.*?)</script>', page, re.DOTALL)
    assert found, chart
    return [record for records in json.loads(found.group(1))["datasets"].values() for record in records]


def test_figures_show_the_numbers_of_results_csv(page: str, tmp_path: Path) -> None:
    write_results(tmp_path / "results.csv", made_up_rows())
    with (tmp_path / "results.csv").open(newline="") as file:
        written = [row for row in csv.DictReader(file) if row["status"] == "ok"]

    def values(column: str, record: dict[str, Any]) -> list[float]:
        budget = record["budget"].replace("no limit", "none")
        cell = (record["method"], record["precision"], budget)
        return [float(r[column]) for r in written if (r["method"], r["precision"], r["budget"]) == cell]

    shown = [r for p in ("fp32", "int8") for r in records_of(page, f"auc-{p}") if "method" in r]
    assert {(r["method"], r["precision"], r["budget"]) for r in shown} == {
        (r["method"], r["precision"], r["budget"].replace("none", "no limit")) for r in written
    }
    for record in shown:
        aucs = values("auc", record)
        assert record["auc"] == pytest.approx(statistics.fmean(aucs), abs=1e-12)
        assert (record["low"], record["high"]) == (mean_interval(aucs).low, mean_interval(aucs).high)
        assert record["nbytes"] == values("nbytes", record)[0]
        assert f"<td>{statistics.fmean(aucs):.4f}</td>" in page
    lines = {r["line"]: r["value"] for r in records_of(page, "auc-fp32") if "value" in r}
    assert lines["Bayes"] == 0.8
    assert set(lines) == {"Bayes", "dense, fp32", "dense, int8"}
    for name, column in (("samples", "samples_per_s"), ("latency", "latency_us")):
        for record in records_of(page, f"speed-{name}-fp32"):
            assert record[column] == pytest.approx(statistics.fmean(values(column, record)))
    for record in records_of(page, "slices-unseen-fp32"):
        if "method" in record:
            dense = {"method": "dense", "precision": "fp32", "budget": "no limit"}
            own, other = (
                statistics.fmean(json.loads(r["slices"])["unseen"]["auc"] for r in written if matches(r, wanted))
                for wanted in (record, dense)
            )
            assert record["loss"] == pytest.approx(own - other, abs=1e-9)
    for record in records_of(page, "collisions-fp32"):
        (loss,) = {json.loads(r["collisions"])[record["column"]][0] for r in written if named(r) == record["name"]}
        assert record["share"] == pytest.approx(loss / record["ids"])
    for record in records_of(page, "parts-int8"):
        part = {"rows": "user", "remainder": "item@remainder"}[record["part"]]
        beside = [r for r in written if r["precision"] == "int8" or r["method"] == "auto"]
        row = next(r for r in beside if named(r) == record["name"])
        assert record["nbytes"] == json.loads(row["bytes_by_part"])[part]
    for record in records_of(page, "calibration-fp32-0.2x"):
        if "method" in record:
            groups = [json.loads(r["deciles"])[record["decile"] - 1] for r in written if matches(r, record)]
            assert record["predicted"] == pytest.approx(statistics.fmean(group[0] for group in groups))
            assert record["observed"] == pytest.approx(statistics.fmean(group[1] for group in groups))


def matches(row: dict[str, str], record: dict[str, Any]) -> bool:
    budget = row["budget"].replace("none", "no limit")
    return (row["method"], row["precision"], budget) == (record["method"], record["precision"], record["budget"])


def named(row: dict[str, str]) -> str:
    own = f" ({row['precision']})" if row["method"] == "auto" else ""
    return f"{row['method']}{own}, {row['budget'].replace('none', 'no limit')}"


def test_a_method_that_chooses_its_precision_is_beside_the_others(page: str) -> None:
    charts = re.findall(r'data-chart="chart-([^"]+)"', page)
    assert {name.rpartition("-")[2] for name in charts if name.startswith("auc-")} == {"fp32", "int8"}
    for precision in ("fp32", "int8"):
        for chart in ("auc", "speed-samples", "slices-rare", "calibration"):
            name = f"{chart}-{precision}" if chart != "calibration" else f"{chart}-{precision}-0.05x"
            shown = {(r["method"], r["precision"]) for r in records_of(page, name) if "method" in r}
            assert {("unified", precision), ("auto", "mixed")} <= shown
            assert {own for _, own in shown} <= {precision, "int4", "mixed"}
        for chart in ("parts", "collisions"):
            shown = {record["name"] for record in records_of(page, f"{chart}-{precision}")}
            assert {"hash, 0.2x", "auto (int4), 0.2x", "auto (mixed), 0.05x"} <= shown
    assert "Rows served in int8 (auto: precision of its own)" in page


def test_a_method_that_chooses_its_precision_is_held_to_the_best_hash() -> None:
    rows = made_up_rows()
    for row in rows:
        if row["status"] == "ok":
            row["val_auc"] += {"hash int8": 0.01, "auto int4": 0.1, "auto mixed": 0.1}.get(
                f"{row['method']} {row['precision']}", 0
            )
    summary = summarise(rows, BUDGETS)
    for auto in (point for point in summary.points if point.method == "auto"):
        beside = summary.hash_beside(auto)
        assert beside is not None
        assert (beside.method, beside.precision, beside.budget) == ("hash", "int8", auto.budget)
    (first, second) = advise(summary)
    assert (first.choice, second.choice) == ("auto, int4", "auto, mixed precision")
    assert "above hash at equal bytes" in second.reasons


def test_alone_with_dense_it_has_the_panels_of_dense() -> None:
    some = [row for row in made_up_rows() if row["method"] in ("dense", "auto")]
    page = html(make_report(SWEEP, DATASET, some))
    assert {("auto", "mixed"), ("dense", "fp32")} <= {
        (r["method"], r["precision"]) for r in records_of(page, "auc-fp32") if "method" in r
    }


def test_a_terminal_shows_the_choice_at_each_budget_in_a_dozen_lines() -> None:
    report = make_report(SWEEP, DATASET, made_up_rows())
    lines = brief(report).splitlines()
    assert len(lines) <= 12
    for advice in report.sections[0].advice:
        (line,) = [line for line in lines if advice.budget in line]
        assert advice.choice in line
        assert re.search(r"AUC 0\.7\d+, 0\.00\d+ below dense \(0\.00\d+ to 0\.0\d+\), \d+x smaller$", line)


def test_each_line_is_named_at_its_end_and_the_choice_has_a_ring(page: str) -> None:
    (found,) = re.findall(r'<script[^>]*data-chart="chart-auc-fp32">(.*?)</script>', page, re.DOTALL)
    spec = json.loads(found)

    def records(kind: str, **mark: Any) -> list[dict[str, Any]]:
        drawn = [each for each in spec["layer"] if {"type": kind, **mark}.items() <= each["mark"].items()]
        return [record for each in drawn for record in spec["datasets"][each["data"]["name"]]]

    named = {record["method"]: record for record in records("text")}
    assert set(named) == {"dense", "hash", "unified", "qr op=concat", "auto"}
    for method, record in named.items():
        assert record["nbytes"] == max(r["nbytes"] for r in records("point") if r["method"] == method)
    heights = sorted(record["label"] for record in named.values())
    scales = [each["encoding"]["y"]["scale"] for each in spec["layer"] if "scale" in each["encoding"].get("y", {})]
    low, high = scales[0]["domain"]
    assert min(b - a for a, b in pairwise(heights)) >= (high - low) * 0.99 * LINE / HEIGHT
    (ringed,) = records("point", shape="circle", size=260)
    assert advise(summarise(made_up_rows(), BUDGETS))[0].choice == f"{ringed['method']}, {ringed['precision']}"
    boxes = re.findall(r'<input type="checkbox" value="([^"]+)"', page)
    assert set(boxes) == set(named)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([50.0], [50.0]),
        ([50.0, 50.0, 20.0], [50.0, 62.0, 20.0]),
        ([95.0, 95.0, 94.0], [88.0, 100.0, 76.0]),
        ([0.0] * 11, [10.0 * i for i in range(11)]),
    ],
)
def test_names_stand_apart_and_within_the_chart(places: list[float], expected: list[float]) -> None:
    assert spread(places, 0, 100) == pytest.approx(expected)


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_leaves_room_on_both_sides(log: bool) -> None:
    axis = Axis.around([3.0, 48.0, 12.0], 0.1, 0.3, log)
    assert axis.share(3.0) == pytest.approx(0.1)
    assert axis.share(48.0) == pytest.approx(0.7)
    assert axis.value(axis.share(12.0)) == pytest.approx(12.0)
    assert Axis.around([5.0], 0.1, 0.3, log).share(5.0) == pytest.approx(0.4)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_parts_are_known_whatever_the_features_are_called(method: str) -> None:
    kinds = []
    for names in (("user", "item", "tag"), ("No.", "No.@2 1", "@")):
        features = [Feature(name, ids) for name, ids in zip(names, (700, 300, 40), strict=True)]
        # The largest budget that compresses something, since some methods need most of it.
        made = plan(features, method, None if method == "dense" else "0.9x", 16)
        kinds.append(sorted((kind_of(part, names), nbytes) for part, nbytes in made.bytes_by_part().items()))
    assert kinds[0] == kinds[1]
    assert "" not in dict(kinds[0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (17_000, 853_000, [20_000, 50_000, 100_000, 200_000, 500_000]),
        (34_000, 102_000, [40_000, 50_000, 60_000, 70_000, 80_000, 90_000, 100_000]),
        (1, 10, [1, 2, 5, 10]),
        (0.2, 0.35, [0.2, 0.3]),
        (11, 12, []),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_the_front_is_what_nothing_smaller_surpasses() -> None:
    summary = summarise(made_up_rows(), BUDGETS)
    front = summary.pareto()
    for point in summary.points:
        beaten = any(p.nbytes <= point.nbytes and p.auc.mean > point.auc.mean for p in summary.points)
        assert beaten != (point in front)
    assert [p.nbytes for p in front] == sorted(p.nbytes for p in front)


def test_the_advice_is_chosen_on_the_validation_split() -> None:
    rows = made_up_rows()
    (first, second) = advise(summarise(rows, BUDGETS))
    assert first.budget == "200 kB (0.2x)"
    assert first.choice.startswith("unified")
    said = r"AUC 0\.7\d+; 0\.00\d+ below dense \(0\.00\d+ to 0\.0\d+\); 5x smaller; 0\.0\d+ above hash"
    assert re.match(said, first.reasons)
    for row in rows:  # hash looks best in validation: it is taken, with its own AUC of the test split
        if row["method"] == "hash" and row["val_auc"]:
            row["val_auc"] += 1
    summary = summarise(rows, BUDGETS)
    assert advise(summary)[1].choice.startswith("hash")
    assert advise(summary)[1].reasons.startswith(f"AUC {summary.best(50_000)[0].auc.mean:.4f}; ")
    assert second.budget == "50 kB (0.05x)"


def test_one_seed_has_the_bootstrap_and_without_it_nothing_is_called_significant() -> None:
    rows = [row for row in made_up_rows() if row["seed"] == 0]
    point = summarise(rows, BUDGETS).points[0]
    assert point.auc == point.test_interval
    assert point.auc.count == 200
    bare = [row | {"auc_resampled": None} for row in rows]
    assert "one run, no interval" in advise(summarise(bare, BUDGETS))[0].reasons
    assert not summarise(bare, BUDGETS).points[0].auc.known


def test_what_makes_no_difference_is_said_to() -> None:
    rows = made_up_rows()
    by_place = {(row["precision"], row["seed"]): row for row in rows if row["method"] == "dense"}
    for row in rows:  # unified is dense but for a little noise
        if row["method"] == "unified":
            dense = by_place["fp32", row["seed"]]
            shift = (-1) ** row["seed"] * 1e-4
            row |= {"auc": dense["auc"] + shift, "val_auc": 0.9}
            row["auc_resampled"] = [auc + shift for auc in dense["auc_resampled"]]
    assert "dense, not significant;" in advise(summarise(rows, BUDGETS))[0].reasons


def test_equal_results_give_equal_bytes_after_a_round_trip(page: str, tmp_path: Path) -> None:
    write_results(tmp_path / "results.csv", made_up_rows())
    read = list(read_results(tmp_path / "results.csv").values())
    assert html(make_report(SWEEP, DATASET, read)) == page
    some = [row for row in read if row["precision"] == "fp32" and row["budget"] != "0.05x"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        report = make_report(SWEEP, DATASET, some)
        write_report(report, tmp_path / folder)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 2 + 9
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one" / "report.md").read_text()
    for image in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (tmp_path / "one" / image).read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network_and_says_what_is_missing(page: str) -> None:
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "qr op=concat, fp32, 0.05x: infeasible, needs 60 kB (seeds 0, 1, 2)" in page
    assert "qr op=concat, fp32, 0.05x: infeasible, needs 60 kB (seeds 0, 1, 2)" in markdown(
        make_report(SWEEP, DATASET, made_up_rows())
    )


def test_names_from_data_cannot_break_the_page() -> None:
    rows = made_up_rows()
    for row in rows:
        if row["collisions"]:
            row["collisions"] = {"</script><b>": [1, 2]}
    page = html(make_report(SWEEP, DATASET, rows))
    assert "</script><b>" not in page
    assert records_of(page, "collisions-fp32")[0]["column"] == "</script><b>"
    assert entities.escape("</script><b> (2)") in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: its `chromium` is needed to draw the page")
@pytest.mark.parametrize("width", [1400, 400])
def test_chromium_draws_the_page(page: str, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    narrowed = page.replace('<html lang="en">', f'<html style="width: {width}px">', 1)  # no window is below 500 pixels
    file.write_text(narrowed.removesuffix("</body>\n</html>") + CLIPPED + "</body>\n</html>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=60000"]
    flags += [f"--window-size={max(width, 500)},900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    charts = page.count('class="spec"')
    assert f'data-rendered="{charts}"' in done.stdout
    assert len(re.findall(r'<svg[^>]*class="marks"', done.stdout)) == charts
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-spill="0"' in done.stdout  # nothing stands out to the side
    assert 'data-clipped=""' in done.stdout


def test_an_auc_that_is_not_defined_chooses_nothing():
    rows = made_up_rows()
    spoilt = [row | {"val_auc": math.nan} if row["method"] == "unified" else row for row in rows]
    best = summarise(spoilt, SWEEP.budgets).best(DENSE_BYTES)
    assert best[-1].method == "unified"
    assert all(math.isfinite(point.validated) for point in best if point.method != "unified")
    advice = advise(summarise([row | {"val_auc": math.nan} for row in rows], SWEEP.budgets))
    assert {each.choice for each in advice} == {"undecided"}
    assert "not defined on the validation split" in advice[0].reasons
