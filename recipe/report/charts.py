"""Curves as charts of altair (https://altair-viz.github.io): in the report's page, and as the card's PNG."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

from recipe.config.settings import HELD_OUT
from recipe.errors import RecipeError
from recipe.report.curves import LOSS, VALIDATION, Curves, Metric, band_of, bits_per_byte, budget_of, median_of
from recipe.report.record import Record
from recipe.text import one_line

if TYPE_CHECKING:
    import altair as alt

Axis = Literal["tokens", "time"]

MANY_DOTS, MANY_EVENTS = 60, 30  # from here on they are drawn smaller, or paler
PALETTE = {
    "light": ["#2563c9", "#c2570c", "#1a7f4e", "#8446b8", "#0b7c8e", "#b92e6d"],
    "dark": ["#7fabff", "#f79a4b", "#57c98f", "#c7a2f2", "#4fc4d6", "#f28ab5"],
}
EVENT_COLORS: dict[str, str] = defaultdict(lambda: "#2a9d8f")  # of the marks; readable on white and on black
EVENT_COLORS |= {"resume": "#8b8d98", "micro_batch": "#c99a12", "spike": "#f76808", "skipped_update": "#e5484d"}
EVENT_COLORS |= {"rollback": "#a855f7", "checkpoint_failed": "#d6409f", "push_failed": "#d6409f"}
_INK = {"light": ("#ffffff", "#1c2430", "#5b6472", "#e6e8ec"), "dark": ("#171b22", "#e8eaed", "#9aa3b0", "#2b313b")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"


def chart(curves: Curves, metric: Metric, axis: Axis) -> alt.LayerChart:
    """The chart of a metric by tokens or by time. Its data are `curves.datasets`, which whoever draws it adds."""
    import altair as alt

    x, is_one_run = _x(curves, axis), len(curves.names) == 1
    color = alt.Color("run:N", scale=alt.Scale(domain=curves.names), legend=None)
    who = [] if is_one_run else [alt.Tooltip("run:N")]
    where = [alt.Tooltip(f"{name}:Q", format=",") for name in ("update", "tokens")]
    where.append(alt.Tooltip("time:Q", title=curves.time_unit, format=",.2f"))

    def points(dataset: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(dataset)).encode(x, _y(curves, metric), color)

    def values(title: str) -> list[alt.Tooltip]:
        """What a point shows under the pointer."""
        return [*who, alt.Tooltip("value:Q", title=f"{title}, {metric.unit}", format=",.5~g"), *where]

    layers: list[alt.Chart] = []
    if metric.band:
        interval = alt.Chart(alt.NamedData(band_of(metric))).mark_area(opacity=0.2)
        layers.append(interval.encode(x, _y(curves, metric, "low"), alt.Y2("value:Q"), color))
        layers.append(points(budget_of(metric)).mark_line(strokeDash=[6, 4], opacity=0.8).encode(order="update:Q"))
    if not metric.is_validation:
        line = points(metric.column).encode(order="update:Q")
        if metric.is_noisy:
            layers.append(line.mark_line(strokeWidth=1.2, opacity=0.3))
            line = points(median_of(metric)).encode(order="update:Q")
        layers.append(line.mark_line(strokeWidth=1.8))
        # The point nearest to the pointer is shown; of a single run the nearest in x, however far above or below.
        near = alt.selection_point(
            on="pointerover", clear="pointerout", nearest=True, encodings=["x"] if is_one_run else alt.Undefined
        )
        opacity = alt.when(near, empty=False).then(alt.value(1)).otherwise(alt.value(0))
        dots = points(metric.column).mark_point(filled=True, size=60)
        layers.append(dots.encode(opacity=opacity, tooltip=values(metric.title.lower())).add_params(near))
    evaluated = VALIDATION if metric == LOSS else metric
    if evaluated.is_validation and evaluated.column in curves.datasets:
        size = 60 if len(curves.datasets[evaluated.column]) <= MANY_DOTS else 16
        layers.append(points(evaluated.column).mark_line(strokeDash=[5, 3]).encode(order="update:Q"))
        dots = points(evaluated.column).mark_point(filled=True, size=size, opacity=1)
        layers.append(dots.encode(tooltip=values("validation")))
    if curves.datasets["events"]:
        layers += _event_marks(curves, x, [*who, alt.Tooltip("what:N", title="event"), *where])
    description = f"{metric.title}, {metric.unit}, by {axis}"
    return alt.layer(*layers).resolve_scale(color="independent").properties(description=description)


def _x(curves: Curves, axis: Axis) -> alt.X:
    import altair as alt

    scale = alt.Scale(zero=True, nice=False)
    if axis == "time":
        return alt.X("time:Q", title=f"{curves.time_unit} of training", scale=scale)
    tokens = "replace(format(datum.value, '~s'), 'G', 'B')"  # d3 says G for 10^9
    return alt.X("tokens:Q", title="tokens seen", scale=scale, axis=alt.Axis(labelExpr=tokens))


def _y(curves: Curves, metric: Metric, field: str = "value") -> alt.Y:
    import altair as alt

    look: dict[str, Any] = {}
    scale = alt.Scale(zero=metric.from_zero, nice=True, padding=0 if metric.from_zero else 8)
    if curves.is_logarithmic(metric):
        scale = alt.Scale(type="log", nice=False, padding=8)
        look["values"] = _logarithmic_ticks(*curves.range_of(metric))
    if metric.axis_format:
        look["labelExpr"] = f"datum.value ? format(datum.value, '{metric.axis_format}') : '0'"
    return alt.Y(f"{field}:Q", title=None, scale=scale, axis=alt.Axis(**look))


def _logarithmic_ticks(smallest: float, largest: float) -> list[float]:
    """1, 2 and 5 of every decade; powers of ten only, if there are many."""
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def _event_marks(curves: Curves, x: alt.X, values: list[alt.Tooltip]) -> list[alt.Chart]:
    """A line through the chart, and a mark at its top that is large enough to point at."""
    import altair as alt

    events = curves.datasets["events"]
    kinds = sorted({event["event"] for event in events})
    palette = alt.Scale(domain=kinds, range=[EVENT_COLORS[kind] for kind in kinds])
    marks = alt.Chart(alt.NamedData("events")).encode(
        x, alt.Color("event:N", scale=palette, legend=None), tooltip=[*values, alt.Tooltip("details:N")]
    )
    line = marks.mark_rule(strokeDash=[2, 3], opacity=0.8 if len(events) <= MANY_EVENTS else 0.3)
    return [line, marks.mark_point(shape="triangle-down", filled=True, size=70, opacity=1).encode(y=alt.value(0))]


def theme(mode: Literal["light", "dark"]) -> dict[str, Any]:
    """Vega's configuration for a light or a dark page."""
    background, text, faint, grid = _INK[mode]
    colors = {"labelColor": faint, "titleColor": faint, "gridColor": grid, "domainColor": grid, "tickColor": grid}
    sizes = {"labelFontSize": 12, "titleFontSize": 12, "labelPadding": 6, "titlePadding": 10, "tickSize": 0}
    return {
        "background": background,
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": PALETTE[mode]},
        "axis": {**colors, **sizes, "titleFontWeight": "normal"},
        "axisX": {"grid": False, "tickCount": 6, "labelFlush": True, "labelOverlap": "greedy", "labelSeparation": 8},
        "axisY": {"domain": False, "tickCount": 5, "minExtent": 34},
        "title": {"color": text, "fontSize": 14, "anchor": "start", "subtitleColor": faint, "subtitleFontSize": 12},
    }


def library() -> Any:
    """vl_convert: Vega's JavaScript, and PNG without a browser.

    Raises:
        RecipeError: it is not installed, or altair is not.
    """
    try:
        import altair  # noqa: F401
        import vl_convert
    except ImportError as error:
        raise RecipeError(
            f"the curves need {error.name}, which is not installed: pip install --editable '.[report]'"
        ) from None
    return vl_convert


def curves_png(record: Record) -> bytes:
    """Loss and, if text was held out, bits per byte, by tokens, as one picture on white.

    Raises:
        RecipeError: the library is not installed.
    """
    library()
    import altair as alt

    curves = Curves([record], [one_line(record.directory.resolve().name)])
    panels = [
        chart(curves, metric, "tokens").properties(
            title=alt.Title(metric.title, subtitle=metric.unit), width=420, height=260
        )
        for metric in (LOSS, bits_per_byte(HELD_OUT))
        if metric in curves.metrics
    ]
    picture = alt.hconcat(*panels, spacing=40, padding=16, datasets=curves.datasets, config=theme("light"))
    file = io.BytesIO()
    picture.save(file, format="png", scale_factor=2)
    return file.getvalue()
