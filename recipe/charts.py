"""Curves of runs as Vega-Lite charts (https://vega.github.io/vega-lite/): in the report's page, and as the card's PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recipe.errors import RecipeError
from recipe.facts import event_name, event_text, notable_events
from recipe.record import Record, running_median, smoothing_window, thin

Spec = dict[str, Any]
Axis = Literal["tokens", "time"]

RAW_BUCKETS, SMOOTH_POINTS = 300, 300  # a chart is no wider than 1,100 pixels
EVENTS_OF_A_KIND = 60  # marks on the curves; the legend counts them all
LONG_RUN_HOURS = 2.0  # shorter ones are drawn by minutes

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


@dataclass(frozen=True)
class Metric:
    """A column of the ledger as a chart.

    Args:
        name: of the chart, and of the column where nothing else is said.
        title: what it shows.
        unit: of the values, after `scale`.
        scale: the column is multiplied by this.
        is_noisy: drawn pale, under its running median.
        may_be_logarithmic: whether one value may be many times the others'.
        from_zero: whether the vertical axis begins at zero.
        axis_format: of the vertical axis, in d3's notation.
    """

    name: str
    title: str
    unit: str
    scale: float = 1.0
    is_noisy: bool = False
    may_be_logarithmic: bool = False
    from_zero: bool = True
    axis_format: str = ""

    def values(self, record: Record) -> np.ndarray:
        """One for each update of the record, NaN where there is none."""
        if self.name != "data_wait":
            return record[self.name] * self.scale
        with np.errstate(divide="ignore", invalid="ignore"):
            return record["data_wait_seconds"] / record["step_seconds"] * self.scale


LOSS = Metric("loss", "Loss", "nats per token", is_noisy=True, may_be_logarithmic=True, from_zero=False)
BITS_PER_BYTE = Metric("bits_per_byte", "Bits per byte", "on held-out text", from_zero=False)
METRICS = (
    LOSS,
    BITS_PER_BYTE,
    Metric("learning_rate", "Learning rate", "of each update", axis_format="~e"),
    Metric("grad_norm", "Gradient norm", "before clipping", is_noisy=True, may_be_logarithmic=True),
    Metric("tokens_per_second", "Throughput", "tokens per second", is_noisy=True, axis_format="~s"),
    Metric("mfu", "Model FLOPs utilisation", "% of the peak of all devices", 100, is_noisy=True),
    Metric("data_wait", "Waiting for data", "% of each update's time", 100, is_noisy=True),
    Metric("peak_memory_bytes", "Peak memory", "GB, of the largest rank", 1e-9),
)
_VALIDATION = Metric("validation_loss", "Validation loss", "nats per token")


class Curves:
    """The data of all charts of some runs, and the charts.

    Args:
        records: the runs.
        names: what each is called.
    """

    def __init__(self, records: Sequence[Record], names: Sequence[str]) -> None:
        self.records, self.names = records, list(names)
        is_long = max(record.hours[-1] for record in records) >= LONG_RUN_HOURS
        self.time_unit, self._per_hour = ("hours", 1.0) if is_long else ("minutes", 60.0)
        self.metrics = [m for m in METRICS if any(np.isfinite(m.values(record)).any() for record in records)]
        self.datasets: dict[str, list[dict[str, Any]]] = {"events": self._events()}
        for metric in (*self.metrics, _VALIDATION):
            self.datasets[metric.name] = []
            self.datasets[f"{metric.name}, median"] = []
        for record, name in zip(records, names, strict=True):
            for metric in (*self.metrics, _VALIDATION):
                values = metric.values(record)
                rows = thin(values, RAW_BUCKETS)
                self.datasets[metric.name] += self._points(record, name, rows, values[rows])
                if metric.is_noisy:
                    rows = np.unique(np.linspace(0, len(values) - 1, SMOOTH_POINTS).astype(int))
                    medians = running_median(values, smoothing_window(values), rows)
                    self.datasets[f"{metric.name}, median"] += self._points(record, name, rows, medians)
            if before := record.validation_before:
                start = {"run": name, "update": 0, "tokens": 0, "time": 0.0}
                self.datasets[_VALIDATION.name].append({**start, "value": _rounded(before["loss"])})
                self.datasets[BITS_PER_BYTE.name].append({**start, "value": _rounded(before["bits_per_byte"])})

    def _points(self, record: Record, name: str, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "run": name,
                "update": int(record["update"][row]),
                "tokens": int(record["tokens"][row]),
                "time": _rounded(record.hours[row] * self._per_hour),
                "value": _rounded(value),
            }
            for row, value in zip(rows.tolist(), values.tolist(), strict=True)
            if math.isfinite(value) and math.isfinite(record["tokens"][row])
        ]

    def _events(self) -> list[dict[str, Any]]:
        rows = []
        for record, name in zip(self.records, self.names, strict=True):
            by_kind: dict[str, list[dict[str, Any]]] = {}
            for event in notable_events(record):
                by_kind.setdefault(event["event"], []).append(event)
            for kind, events in by_kind.items():
                for event in events[:: -(-len(events) // EVENTS_OF_A_KIND)]:
                    hours = np.interp(event["update"], [0, *record["update"]], [0, *record.hours])
                    rows.append(
                        {
                            "run": name,
                            "event": kind,
                            "what": event_name(kind),
                            "update": event["update"],
                            "tokens": event["update"] * record.config.batch.tokens_per_update,
                            "time": _rounded(float(hours) * self._per_hour),
                            "details": event_text(event),
                        }
                    )
        return rows

    def is_logarithmic(self, metric: Metric) -> bool:
        """Whether the largest value would leave the others on the floor."""
        values = self._all_values(metric)
        return bool(metric.may_be_logarithmic and values.min() > 0 and values.max() > 10 * np.median(values))

    def _all_values(self, metric: Metric) -> np.ndarray:
        values = np.concatenate([metric.values(record) for record in self.records])
        return values[np.isfinite(values)]

    def _y(self, metric: Metric) -> Spec:
        axis: Spec = {"title": None}
        if self.is_logarithmic(metric):
            values = self._all_values(metric)
            axis["values"] = _logarithmic_ticks(values.min(), values.max())
            scale: Spec = {"type": "log", "nice": False, "padding": 8}
        else:
            scale = {"zero": metric.from_zero, "nice": True, "padding": 0 if metric.from_zero else 8}
        if metric.axis_format:
            axis["labelExpr"] = f"datum.value ? format(datum.value, '{metric.axis_format}') : '0'"
        return {"field": "value", "type": "quantitative", "scale": scale, "axis": axis}

    def chart(self, metric: Metric, axis: Axis) -> Spec:
        """The chart of a metric by tokens or by time; its data are `datasets`, which whoever draws it adds."""
        x: Spec = {"field": axis, "type": "quantitative", "axis": {"title": "tokens seen", "labelExpr": _TOKENS_LABEL}}
        if axis == "time":
            x["axis"] = {"title": f"{self.time_unit} of training"}
        x["scale"] = {"zero": True, "nice": False}
        y = self._y(metric)
        color: Spec = {"field": "run", "type": "nominal", "scale": {"domain": self.names}, "legend": None}
        who = [{"field": "run", "title": "run"}] if len(self.names) > 1 else []
        where = [
            {"field": "update", "title": "update", "format": ","},
            {"field": "tokens", "title": "tokens", "format": ","},
            {"field": "time", "title": self.time_unit, "format": ",.2f"},
        ]
        lines = {"x": x, "y": y, "color": color, "order": {"field": "update"}}

        def hover(title: str, param: str) -> Spec:
            """The nearest point is shown with its values; of one run, the nearest in time, however far above or below."""
            value = {"field": "value", "title": f"{title}, {metric.unit}", "format": ",.5~g"}
            select = {"type": "point", "on": "pointerover", "clear": "pointerout", "nearest": True}
            if not who:
                select["encodings"] = ["x"]
            return {
                "mark": {"type": "point", "filled": True, "size": 60},
                "params": [{"name": param, "select": select}],
                "encoding": {
                    **{"x": x, "y": y, "color": color},
                    "opacity": {"condition": {"param": param, "empty": False, "value": 1}, "value": 0},
                    "tooltip": [*who, value, *where],
                },
            }

        layers: list[Spec] = []
        if metric.name != BITS_PER_BYTE.name:
            pale = 0.3 if metric.is_noisy else 1.0
            layers.append({"data": {"name": metric.name}, "mark": _line(pale), "encoding": lines})
            if metric.is_noisy:
                layers.append({"data": {"name": f"{metric.name}, median"}, "mark": _line(1), "encoding": lines})
            layers.append({"data": {"name": metric.name}, **hover(metric.title.lower(), "near")})
        dots = {LOSS.name: _VALIDATION.name, BITS_PER_BYTE.name: BITS_PER_BYTE.name}.get(metric.name)
        if dots:  # evaluations are few: each is a mark, with its values
            value = {"field": "value", "title": "validation, " + metric.unit, "format": ",.5~g"}
            layers.append({"data": {"name": dots}, "mark": {"type": "line", "strokeDash": [5, 3]}, "encoding": lines})
            layers.append(
                {
                    "data": {"name": dots},
                    "mark": {
                        "type": "point",
                        "filled": True,
                        "size": 60 if len(self.datasets[dots]) <= 60 else 16,
                        "opacity": 1,
                    },
                    "encoding": {"x": x, "y": y, "color": color, "tooltip": [*who, value, *where]},
                }
            )
        kinds = sorted({row["event"] for row in self.datasets["events"]})
        if kinds:
            palette = {"domain": kinds, "range": [event_color(kind) for kind in kinds]}
            what = [*who, {"field": "what", "title": "event"}, *where, {"field": "details", "title": "details"}]
            marks = {
                "x": x,
                "color": {"field": "event", "type": "nominal", "scale": palette, "legend": None},
                "tooltip": what,
            }
            is_few = len(self.datasets["events"]) <= 30
            top = {"type": "point", "shape": "triangle-down", "filled": True, "size": 70, "opacity": 1, "y": 0}
            layers.append(
                {
                    "data": {"name": "events"},
                    "mark": {"type": "rule", "strokeDash": [2, 3], "opacity": 0.8 if is_few else 0.3},
                    "encoding": marks,
                }
            )
            layers.append({"data": {"name": "events"}, "mark": top, "encoding": marks})
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "description": f"{metric.title}, {metric.unit}, by {x['axis']['title']}",
            "layer": layers,
            "resolve": {"scale": {"color": "independent"}},
        }


_TOKENS_LABEL = "replace(format(datum.value, '~s'), 'G', 'B')"


def _logarithmic_ticks(smallest: float, largest: float) -> list[float]:
    """1, 2 and 5 of every decade; powers of ten only, where there are many."""
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def _line(opacity: float) -> Spec:
    return {"type": "line", "strokeWidth": 1.2 if opacity < 1 else 1.8, "opacity": opacity, "interpolate": "linear"}


def event_color(kind: str) -> str:
    """Of its mark; readable on white and on black."""
    return EVENT_COLORS.get(kind, OTHER_EVENT_COLOR)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


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
            panels.append({**curves.chart(metric, "tokens"), "title": title, "width": 420, "height": 260})
    spec = {"hconcat": panels, "spacing": 40, "datasets": curves.datasets, "padding": 16, "config": theme("light")}
    png: bytes = library().vegalite_to_png(spec, scale=2)
    return png
