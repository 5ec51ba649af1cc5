"""Vega-Lite charts, made by Altair, of records that are already computed.

Colours are those of Okabe and Ito, which stay distinct under every common colour blindness, and each method also has a
shape of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import altair as alt

from embtab.compare.labels import Axis, Names, spread

Record = dict[str, Any]
Spec = dict[str, Any]
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
PART_COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#999999")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
DASHES: dict[str, list[int]] = {
    "Bayes": [9, 3, 2, 3],
    "dense, fp32": [7, 3],
    "dense, int8": [2, 3],
    "Pareto front": [1, 0],
}
HEIGHT = 320
_BYTES = "format(datum.value, '~s') + 'B'"


def against_bytes(
    points: Sequence[Record],
    methods: Sequence[str],
    y: str,
    title: str,
    *,
    domain: tuple[float, float] | None = None,
    references: Sequence[Record] = (),
    front: Sequence[Record] = (),
    recommended: Sequence[Record] = (),
    log: bool = False,
) -> Spec:
    """A point per record at (nbytes, y), joined by method; its interval where it has `low` and `high`.

    The name of each method stands at the right, joined to its last point.

    Args:
        points: records with nbytes, method, `y`, and what the tooltip shows.
        methods: all methods of the report, so that each keeps its colour in every chart.
        y: name of the value.
        title: of the y axis.
        domain: of the y axis.
        references: records {line, value}: horizontal lines.
        front: records {line, nbytes, `y`}: a staircase.
        recommended: the points that get a ring.
        log: whether the y axis is logarithmic, too.
    """
    marks = [record[name] for record in points for name in (y, "low", "high") if record.get(name) is not None]
    marks += [line["value"] for line in references]
    vertical = Axis(*domain, log) if domain else Axis.around(marks, 0.05, 0.05, log)
    scale = alt.Scale(type="log" if log else "linear", domain=[vertical.low, vertical.high], nice=False, zero=False)
    sizes = [record["nbytes"] for record in (*points, *front)]
    names = Names(max(len(point["method"]) for point in points))
    horizontal = names.axis(sizes)
    across_bytes = alt.Scale(type="log", domain=[horizontal.low, horizontal.high], nice=False)
    x = alt.X("nbytes:Q", scale=across_bytes, axis=_byte_axis(sizes), title="serving bytes")
    across = alt.Axis(values=_ticks([point[y] for point in points]) if log else alt.Undefined)
    y_at = {name: alt.Y(f"{name}:Q", scale=scale, axis=across, title=title) for name in (y, "low", "label")}
    layers: list[Any] = []
    data = _Data()
    lines = [line["line"] for line in (*references, *front[:1])]
    dashes = alt.Scale(domain=lines, range=[DASHES[line] for line in lines])
    dash = alt.StrokeDash("line:N", title=None, scale=dashes, legend=alt.Legend(symbolType="stroke", symbolSize=900))
    if references:
        rules = alt.Chart(data.of(references)).mark_rule(color="#666666").encode(y="value:Q", strokeDash=dash)
        layers.append(rules.encode(tooltip=[alt.Tooltip("line:N"), alt.Tooltip("value:Q", format=".5f")]))
    if front:
        stairs = alt.Chart(data.of(front)).mark_line(interpolate="step-after", color="#999999", strokeWidth=1.5)
        layers.append(stairs.encode(x=x, y=y_at[y], strokeDash=dash))
    colour, shape = _method_colour(methods, ()), _method_shape(methods, ())
    labels = _labels(points, methods, y, vertical)
    for offset, own in _beside(points, methods):
        base = alt.Chart(data.of(own)).encode(x=x, y=y_at[y], color=colour)
        layers.append(base.mark_line(strokeWidth=1, strokeOpacity=0.5, xOffset=offset))
        known = [point for point in own if point.get("low") is not None]
        if known:
            bars = alt.Chart(data.of(known)).mark_rule(strokeWidth=1.5, strokeOpacity=0.7, xOffset=offset)
            layers.append(bars.encode(x=x, y=y_at["low"], y2="high:Q", color=colour))
        marks = base.mark_point(filled=True, size=70, opacity=1, xOffset=offset)
        layers.append(marks.encode(shape=shape, tooltip=_tooltip(points)))
        ringed = [record for record in own if record in recommended]
        if ringed:
            rings = alt.Chart(data.of(ringed)).mark_point(shape="circle", size=260, strokeWidth=2, xOffset=offset)
            layers.append(rings.encode(x=x, y=y_at[y], color=alt.value("#222222")))
        named = alt.Chart(data.of([labels[own[0]["method"]]]))
        start = alt.datum(names.start(horizontal))
        leader = named.mark_rule(strokeWidth=1, strokeDash=[1, 3], xOffset=offset)
        layers.append(leader.encode(x=x, x2=start, y=y_at[y], y2="label:Q", color=colour))
        texts = named.mark_text(align="left", baseline="middle", dx=3, fontSize=11, limit=names.limit)
        layers.append(
            texts.encode(
                x=alt.X(datum=start["datum"], type="quantitative"), y=y_at["label"], color=colour, text="method:N"
            )
        )
    return _finished(alt.layer(*layers), data)


def _labels(points: Sequence[Record], methods: Sequence[str], y: str, axis: Axis) -> dict[str, Record]:
    """The last record of each method, with the height of its name as `label`."""
    last: dict[str, Record] = {}
    for point in sorted(points, key=lambda point: point["nbytes"]):
        last[point["method"]] = point
    places = spread([(1 - axis.share(point[y])) * HEIGHT for point in last.values()], 6, HEIGHT - 6)
    heights = [axis.value(1 - place / HEIGHT) for place in places]
    return {name: point | {"label": height} for (name, point), height in zip(last.items(), heights, strict=True)}


def _beside(points: Sequence[Record], methods: Sequence[str]) -> list[tuple[float, list[Record]]]:
    """Each method's records, with the pixels it is moved aside, so that points of one budget do not hide each other."""
    by_method = {method: [point for point in points if point["method"] == method] for method in methods}
    alone = [(0.0, by_method[method]) for method in methods if method == "dense" and by_method[method]]
    shown = [own for method, own in by_method.items() if own and method != "dense"]
    step = min(6.0, 40 / max(len(shown), 1))
    return alone + [(round((i - (len(shown) - 1) / 2) * step, 2), own) for i, own in enumerate(shown)]


def bars(records: Sequence[Record], parts: Sequence[str]) -> Spec:
    """Stacked shares: a bar for each `name`, cut into `part`s of `nbytes`."""
    names = list(dict.fromkeys(record["name"] for record in records))
    data = _Data()
    chart = alt.Chart(data.of(records)).mark_bar()
    lightened = alt.Scale(domain=list(parts), range=list(PART_COLOURS[: len(parts)]))
    colour = alt.Color("part:N", scale=lightened, title=None)
    x = alt.X("nbytes:Q", stack="normalize", axis=alt.Axis(format="%"), title="share of the serving bytes")
    chart = chart.encode(x=x, y=alt.Y("name:N", sort=names, title=None), color=colour, tooltip=_tooltip(records))
    return _finished(chart, data, height=18 * len(names))


def heat(records: Sequence[Record], value: str, title: str) -> Spec:
    """A cell for each (column, name), the darker the larger its value."""
    columns, names = (list(dict.fromkeys(record[key] for record in records)) for key in ("column", "name"))
    colour = alt.Color(f"{value}:Q", title=title, scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=_gradient())
    x = alt.X("column:N", sort=columns, title=None, axis=alt.Axis(labelAngle=-90))
    data = _Data()
    chart = alt.Chart(data.of(records)).mark_rect(stroke="#cccccc", strokeWidth=0.5)
    chart = chart.encode(x=x, y=alt.Y("name:N", sort=names, title=None), color=colour, tooltip=_tooltip(records))
    return _finished(chart, data, alt.Step(16), alt.Step(16))


def reliability(records: Sequence[Record], methods: Sequence[str]) -> Spec:
    """Observed against predicted rates by decile, with the line on which they agree."""
    ends = [value for record in records for value in (record["predicted"], record["observed"])]
    edge = [{"predicted": end, "observed": end} for end in (min(ends), max(ends))]
    data = _Data()
    ideal = alt.Chart(data.of(edge)).mark_line(color="#666666", strokeDash=[2, 3])
    x, y = alt.X("predicted:Q", title="predicted rate"), alt.Y("observed:Q", title="observed rate")
    measured = data.of(records)
    lines = alt.Chart(measured).mark_line(strokeWidth=1, opacity=0.6)
    marks = alt.Chart(measured).mark_point(filled=True, size=40, opacity=0.8)
    shown = {record["method"] for record in records}
    colour = _method_colour(methods, shown)
    drawn = marks.encode(x=x, y=y, color=colour, shape=_method_shape(methods, shown), tooltip=_tooltip(records))
    return _finished(alt.layer(ideal.encode(x=x, y=y), lines.encode(x=x, y=y, color=colour), drawn), data)


class _Data:
    """The records of one chart by name, so that Altair does not copy them at every step."""

    def __init__(self) -> None:
        self.sets: dict[str, list[Record]] = {}

    def of(self, records: Sequence[Record]) -> alt.NamedData:
        """A name for some records."""
        name = f"data{len(self.sets)}"
        self.sets[name] = list(records)
        return alt.NamedData(name=name)


def _tooltip(records: Sequence[Record]) -> list[alt.Tooltip]:
    """Every value of the records, in their order."""
    shown = []
    for name, value in records[0].items():
        numeric = isinstance(value, int | float) or name in ("low", "high")
        form = "," if isinstance(value, int) else ".5~f"
        shown.append(alt.Tooltip(f"{name}:Q", format=form) if numeric else alt.Tooltip(f"{name}:N"))
    return shown


def _byte_axis(sizes: Sequence[int]) -> alt.Axis:
    return alt.Axis(
        values=_ticks(sizes),
        labelExpr=_BYTES,
        labelOverlap="greedy",
        labelSeparation=8,
        labelFlush=15,
    )


def _ticks(values: Sequence[float]) -> Any:
    found = ticks(min(values), max(values))
    return found if len(found) > 1 else alt.Undefined


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high for a logarithmic axis: 1, 2, 5, 10, ...; where those are few, all in between."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), range(1, 10)):
        every = (float(f"{digit}e{decade}") for decade in decades for digit in digits)
        found = [value for value in every if low <= value <= high]
        if len(found) > 2:
            break
    return found


def _method_colour(methods: Sequence[str], shown: Collection[str]) -> alt.Color:
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(methods))]
    scale = alt.Scale(domain=list(methods), range=colours)
    return alt.Color("method:N", scale=scale, title=None, legend=_legend(methods, shown))


def _method_shape(methods: Sequence[str], shown: Collection[str]) -> alt.Shape:
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(methods))]
    scale = alt.Scale(domain=list(methods), range=shapes)
    return alt.Shape("method:N", scale=scale, title=None, legend=_legend(methods, shown))


def _legend(methods: Sequence[str], shown: Collection[str]) -> alt.Legend | None:
    """Of the methods that are shown; none where their names stand in the chart."""
    if not shown:
        return None
    return alt.Legend(values=[method for method in methods if method in shown])


def _gradient() -> alt.Legend:
    return alt.Legend(orient="top", format=".0%", gradientLength=150)


def _finished(chart: Any, data: _Data, width: Any = "container", height: Any = HEIGHT) -> Spec:
    """The specification, as wide as the page lets it be, or of so many pixels a column."""
    chart = chart.properties(width=width, height=height).configure(font="sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(gridColor="#e5e5e5", labelLimit=200, labelFontSize=11).configure_legend(
        orient="bottom", columns=5, labelLimit=160, labelFontSize=11, symbolLimit=60, symbolOpacity=1
    )
    spec = dict(chart.to_dict(validate=False)) | {"datasets": data.sets}
    spec["config"]["legend"]["layout"] = {"bottom": {"direction": "vertical"}}  # Altair does not know it
    return spec
