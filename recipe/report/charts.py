"""Curves as Vega-Lite charts (https://vega.github.io/vega-lite/): in the report's page, and as the card's PNG."""

from __future__ import annotations

import math
from typing import Any, Literal

from recipe.errors import RecipeError
from recipe.report.curves import BITS_PER_BYTE, LOSS, VALIDATION, Curves, Metric, median_of
from recipe.report.record import Record

Spec = dict[str, Any]
Axis = Literal["tokens", "time"]

MANY_DOTS, MANY_EVENTS = 60, 30  # from here on they are drawn smaller, or paler
PALETTE = {
    "light": ["#2563c9", "#c2570c", "#1a7f4e", "#8446b8", "#0b7c8e", "#b92e6d"],
    "dark": ["#7fabff", "#f79a4b", "#57c98f", "#c7a2f2", "#4fc4d6", "#f28ab5"],
}
EVENT_COLORS = {
    "resume": "#8b8d98",
    "micro_batch": "#c99a12",
    "spike": "#f76808",
    "skipped_update": "#e5484d",
    "rollback": "#a855f7",
    "checkpoint_failed": "#d6409f",
    "push_failed": "#d6409f",
}
OTHER_EVENT_COLOR = "#2a9d8f"
_INK = {"light": ("#ffffff", "#1c2430", "#5b6472", "#e6e8ec"), "dark": ("#171b22", "#e8eaed", "#9aa3b0", "#2b313b")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"


def chart(curves: Curves, metric: Metric, axis: Axis) -> Spec:
    """The chart of a metric by tokens or by time. Its data are `curves.datasets`, which whoever draws it adds."""
    x, y = _x(curves, axis), _y(curves, metric)
    color = {"field": "run", "type": "nominal", "scale": {"domain": curves.names}, "legend": None}
    who = [{"field": "run", "title": "run"}] if len(curves.names) > 1 else []
    where = [
        {"field": "update", "title": "update", "format": ","},
        {"field": "tokens", "title": "tokens", "format": ","},
        {"field": "time", "title": curves.time_unit, "format": ",.2f"},
    ]
    encoding = {"x": x, "y": y, "color": color, "order": {"field": "update"}}

    def with_values(what: str) -> Spec:
        """The encoding of a point that shows its values."""
        value = {"field": "value", "title": f"{what}, {metric.unit}", "format": ",.5~g"}
        return {"x": x, "y": y, "color": color, "tooltip": [*who, value, *where]}

    layers: list[Spec] = []
    evaluated = VALIDATION if metric == LOSS else metric if metric.validation_set is not None else None
    if metric != evaluated:
        pale = {"type": "line", "strokeWidth": 1.2, "opacity": 0.3} if metric.is_noisy else _LINE
        layers.append({"data": {"name": metric.name}, "mark": pale, "encoding": encoding})
        if metric.is_noisy:
            layers.append({"data": {"name": median_of(metric)}, "mark": _LINE, "encoding": encoding})
        # The point nearest to the pointer is shown; of a single run the nearest in x, however far above or below.
        select = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
        layers.append(
            {
                "data": {"name": metric.name},
                "params": [{"name": "near", "select": select if who else {**select, "encodings": ["x"]}}],
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {
                    **with_values(metric.title.lower()),
                    "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                },
            }
        )
    if evaluated:
        size = 60 if len(curves.datasets[evaluated.name]) <= MANY_DOTS else 16
        line, dot = (
            {"type": "line", "strokeDash": [5, 3]},
            {"type": "point", "filled": True, "size": size, "opacity": 1},
        )
        layers.append({"data": {"name": evaluated.name}, "mark": line, "encoding": encoding})
        layers.append({"data": {"name": evaluated.name}, "mark": dot, "encoding": with_values("validation")})
    if curves.datasets["events"]:
        layers += _event_marks(curves, x, [*who, {"field": "what", "title": "event"}, *where])
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": f"{metric.title}, {metric.unit}, by {x['axis']['title']}",
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
    }


def _x(curves: Curves, axis: Axis) -> Spec:
    look = {"title": f"{curves.time_unit} of training"}
    if axis == "tokens":  # d3 says G for 10^9
        look = {"title": "tokens seen", "labelExpr": "replace(format(datum.value, '~s'), 'G', 'B')"}
    return {"field": axis, "type": "quantitative", "scale": {"zero": True, "nice": False}, "axis": look}


def _y(curves: Curves, metric: Metric) -> Spec:
    look: Spec = {"title": None}
    scale: Spec = {"zero": metric.from_zero, "nice": True, "padding": 0 if metric.from_zero else 8}
    if curves.is_logarithmic(metric):
        scale = {"type": "log", "nice": False, "padding": 8}
        look["values"] = _logarithmic_ticks(*curves.range_of(metric))
    if metric.axis_format:
        look["labelExpr"] = f"datum.value ? format(datum.value, '{metric.axis_format}') : '0'"
    return {"field": "value", "type": "quantitative", "scale": scale, "axis": look}


def _logarithmic_ticks(smallest: float, largest: float) -> list[float]:
    """1, 2 and 5 of every decade; powers of ten only, where there are many."""
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def _event_marks(curves: Curves, x: Spec, values: list[Spec]) -> list[Spec]:
    """A line through the chart, and a mark at its top that is large enough to point at."""
    events = curves.datasets["events"]
    kinds = sorted({event["event"] for event in events})
    palette = {"domain": kinds, "range": [event_color(kind) for kind in kinds]}
    encoding = {
        "x": x,
        "color": {"field": "event", "type": "nominal", "scale": palette, "legend": None},
        "tooltip": [*values, {"field": "details", "title": "details"}],
    }
    line = {"type": "rule", "strokeDash": [2, 3], "opacity": 0.8 if len(events) <= MANY_EVENTS else 0.3}
    top = {"type": "point", "shape": "triangle-down", "filled": True, "size": 70, "opacity": 1, "y": 0}
    return [{"data": {"name": "events"}, "mark": mark, "encoding": encoding} for mark in (line, top)]


_LINE = {"type": "line", "strokeWidth": 1.8}


def event_color(kind: str) -> str:
    """Of its mark; readable on white and on black."""
    return EVENT_COLORS.get(kind, OTHER_EVENT_COLOR)


def theme(mode: Literal["light", "dark"]) -> Spec:
    """Vega's configuration for a light or a dark page."""
    background, text, faint, grid = _INK[mode]
    return {
        "background": background,
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": PALETTE[mode]},
        "axis": {
            **{"labelColor": faint, "titleColor": faint, "gridColor": grid, "domainColor": grid, "tickColor": grid},
            **{
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "labelPadding": 6,
                "titlePadding": 10,
            },
            "tickSize": 0,
        },
        "axisX": {"grid": False, "tickCount": 6, "labelFlush": True, "labelOverlap": "greedy", "labelSeparation": 8},
        "axisY": {"domain": False, "tickCount": 5, "minExtent": 34},
        "title": {"color": text, "fontSize": 14, "anchor": "start", "subtitleColor": faint, "subtitleFontSize": 12},
    }


def library() -> Any:
    """The module that turns Vega-Lite into PNG, and has its JavaScript.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise RecipeError(
            "the curves need vl-convert-python, which is not installed: pip install --editable '.[report]'"
        ) from None
    return vl_convert


def curves_png(record: Record) -> bytes:
    """Loss and, where text was held out, bits per byte, by tokens, as one picture on white.

    Raises:
        RecipeError: the library is not installed.
    """
    curves = Curves([record], [record.directory.name])
    panels = []
    for metric in (LOSS, BITS_PER_BYTE):
        if metric in curves.metrics:
            title = {"text": metric.title, "subtitle": metric.unit}
            panels.append({**chart(curves, metric, "tokens"), "title": title, "width": 420, "height": 260})
    spec = {"hconcat": panels, "spacing": 40, "datasets": curves.datasets, "padding": 16, "config": theme("light")}
    png: bytes = library().vegalite_to_png(spec, scale=2)
    return png
