"""The report of a sweep: one HTML page that needs no network, and the same as Markdown with PNG files.

A function of the sweep, the dataset and the rows alone: equal results give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from embtab import text
from embtab.compare.charts import Spec
from embtab.compare.figure import Figure, Panel
from embtab.compare.figures import figures
from embtab.compare.statistics import LEVEL, RESAMPLES
from embtab.compare.summary import Row, Summary, summarise
from embtab.compare.sweep import Sweep
from embtab.compare.words import Advice, advise
from embtab.datasets.schema import Dataset
from embtab.files import write_bytes, write_text
from embtab.planning.specs import label
from embtab.sizes import format_bytes

PNG_WIDTH = 720


@dataclass(frozen=True)
class Section:
    """What was found with one ranker."""

    title: str
    prefix: str
    advice: Sequence[Advice]
    figures: Sequence[Figure]
    undone: Sequence[str]
    same: str


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    about: str
    sections: Sequence[Section]
    made: Sequence[str]
    method: Sequence[str]
    methods: Sequence[str]


def make_report(sweep: Sweep, dataset: Dataset, rows: Sequence[Row]) -> Report:
    """Computes everything that is shown.

    Args:
        sweep: what was compared.
        dataset: what it was compared on.
        rows: results of its cells.
    """
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(label(dict(sorted(row["training"]["model"].items()))), []).append(row)
    budgets = [str(budget) for budget in sweep.budgets]
    bayes = dataset.bayes["auc"] if dataset.bayes else None
    spaces = [feature.id_space or feature.name for feature in dataset.features]
    sections = []
    for i, (title, own) in enumerate(by_model.items()):
        prefix = f"{i}-" if len(by_model) > 1 else ""
        sections.append(_section(title, prefix, summarise(own, budgets, bayes, spaces)))
    title = f"{dataset.name}: embedding tables at equal bytes"
    made = _made(sweep, rows, list(by_model))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["status"] == "ok"))
    return Report(title, _about(dataset, sweep.dim, rows), sections, made, _method(dataset), methods)


def html(report: Report) -> str:
    """The page, with the chart library inside: about a megabyte."""
    return _environment(True).get_template("page.html.j2").render(vars(report), vega=_library())


def markdown(report: Report) -> str:
    """The same for GitHub; its charts are the files of `pictures`, below figures/."""
    return _environment(False).get_template("report.md.j2").render(vars(report))


def brief(report: Report) -> str:
    """The table to take at each budget, for a terminal."""
    lines = [report.title]
    for section in report.sections:
        if len(report.sections) > 1:
            lines.append(section.title)
        asked = max((len(advice.budget) for advice in section.advice), default=0)
        taken = max((len(advice.choice) for advice in section.advice), default=0)
        for advice in section.advice:
            lines.append(f"  {advice.budget:>{asked}}  {advice.choice:<{taken}}  {advice.short}".rstrip())
        if section.undone:
            lines.append(f"  without a result: {len(section.undone)}; the report says which and why")
    return "\n".join(map(text.printable, lines))


def pictures(report: Report) -> dict[str, bytes]:
    """PNG files by name."""
    import vl_convert

    return {
        f"{section.prefix}{panel.name}.png": vl_convert.vegalite_to_png(_printed(panel), scale=1.5)
        for section in report.sections
        for figure in section.figures
        for panel in figure.panels
    }


@cache
def _library() -> str:
    """Vega-Embed and all that it needs."""
    import vl_convert

    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # a snippet would leave most of it out


def _printed(panel: Panel) -> Spec:
    """The chart of a panel with its title, of a width that fits GitHub's pages."""
    width = PNG_WIDTH if panel.spec["width"] == "container" else panel.spec["width"]
    return panel.spec | {"width": width, "title": panel.title}


def write_report(report: Report, out: Path) -> None:
    """Writes report.html, report.md and figures/ into `out`."""
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    made = pictures(report)
    for old in set(folder.glob("*.png")) - {folder / name for name in made}:
        old.unlink()
    for name, content in made.items():
        write_bytes(folder / name, content)
    write_text(out / "report.html", html(report))
    write_text(out / "report.md", markdown(report))


def _environment(escape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("embtab.compare"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if escape else _in_markdown,
    )
    environment.filters["markdown"] = text.markdown
    environment.filters["json"] = _script_json
    return environment


def _in_markdown(value: Any) -> Any:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else text.markdown(value)


def _script_json(value: Any) -> Any:
    """JSON that cannot end the script element it stands in."""
    from markupsafe import Markup

    return Markup(json.dumps(value, sort_keys=True).replace("<", "\\u003c"))


def _section(title: str, prefix: str, summary: Summary) -> Section:
    same = "; ".join(f"{left_out} = {kept}" for left_out, kept in summary.same)
    said = f"The same runs under other names, shown once: {same}." if same else ""
    return Section(title, prefix, advise(summary), figures(summary) if summary.points else [], _undone(summary), said)


def _undone(summary: Summary) -> list[str]:
    """What has no result and why, with the seeds that it is true of."""
    seeds: dict[str, list[str]] = {}
    for row in summary.undone:
        seeds.setdefault(_why(row), []).append(str(row["seed"]))
    return [f"{why} (seed{'s' if len(own) > 1 else ''} {', '.join(own)})" for why, own in seeds.items()]


def _why(row: Row) -> str:
    name = f"{row['method']}, {row['precision']}, {row['budget']}"
    if row["status"] == "infeasible":
        return f"{name}: infeasible, needs {format_bytes(row['min_bytes'])}"
    return f"{name}: failed: {row['error']}"


def _about(dataset: Dataset, dim: int, rows: Sequence[Row]) -> str:
    splits = ", ".join(f"{dataset.rows(split):,} {split}" for split in ("train", "valid", "test"))
    dense = next((row["dense_nbytes"] for row in rows if row["dense_nbytes"]), None)
    said = (
        f"{splits} rows of {dataset.name} (fingerprint {dataset.fingerprint}); {len(dataset.features)} features of "
        f"{sum(feature.num_ids for feature in dataset.features):,} ids, dim {dim}"
        f"{'; dense tables take ' + format_bytes(dense) if dense else ''}."
    )
    if dataset.bayes:
        said += (
            f" The data is generated: the best any ranker can do on this test split is known, AUC "
            f"{dataset.bayes['auc']:.4f} and log loss {dataset.bayes['logloss']:.4f} (Bayes)."
        )
    return said


def _made(sweep: Sweep, rows: Sequence[Row], models: Sequence[str]) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in sweep.training.items() if name != "model")
    versions: dict[str, str] = next((row["versions"] for row in rows if row["versions"]), {})
    return [
        f"Ranker: {'; '.join(models)}.",
        f"Seeds {', '.join(map(str, sweep.seeds))}; {settings}.",
        f"With {', '.join(f'{name} {number}' for name, number in sorted(versions.items()))}.",
    ]


def _method(dataset: Dataset) -> list[str]:
    unit = f"users ({dataset.user})" if dataset.user else "rows"
    percent = f"{100 * LEVEL:.0f} %"
    return [
        "Bytes are all that serving needs to make a vector: rows, scales, projections, maps. Never above the budget.",
        "Training stops by the validation split alone. Results are of the rows as served, rounded to their precision.",
        "The table to take is chosen by AUC on the validation split; the AUC beside it is that of the test split.",
        "AUC is exact: the rank statistic over every test row in 64-bit floats, ties counted half; no bins.",
        f"{percent} over seeds: Student's t interval of the mean; a seed sets hashes, first weights and the shuffle, "
        "the same for every table.",
        f"{percent} over the test set: from the deviation over {RESAMPLES} resamples of its {unit}, the same for every "
        "table; resamples are of the mean over seeds.",
        "Against dense, against hash (of equal budget and precision; where a method chooses the precision itself, hash "
        "may, too: the best on the validation split): paired by seed and by resample, with the variance over seeds and "
        "the one over the test set added up; three seeds are the least that give an interval of both (one has the test "
        "set's alone). Not significant (n. s.) means that it contains zero: the difference may be chance.",
        f"Each comparison stands alone at {percent}: of twenty without any difference, about one looks significant.",
    ]
