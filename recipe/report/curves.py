"""A record as curves: for each metric the points to draw, thinned so that no spike is lost, and the events to mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recipe.format import event_name, event_text
from recipe.report.record import Record, column_of
from recipe.report.smoothing import running_median, smoothing_window, thin
from recipe.report.summary import notable_events

RAW_BUCKETS, SMOOTH_POINTS = 300, 300  # a chart is no wider than 1,100 pixels
EVENTS_OF_A_KIND = 60  # marks on the curves; the page's legend counts them all
LONG_RUN_HOURS = 2.0  # shorter ones are drawn by minutes


@dataclass(frozen=True)
class Metric:
    """A column of the ledger as a curve.

    Args:
        name: of the curve, and of the column where nothing else is said.
        title: what it shows.
        unit: of the values, after `scale`.
        scale: the column is multiplied by this.
        validation_set: whose evaluation it is; "" that of the held-out documents; None for a value of every update.
        is_noisy: drawn pale, under its running median.
        may_be_logarithmic: whether one value may be many times the others'.
        from_zero: whether the vertical axis begins at zero.
        axis_format: of the vertical axis, in d3's notation.
    """

    name: str
    title: str
    unit: str
    scale: float = 1.0
    validation_set: str | None = None
    is_noisy: bool = False
    may_be_logarithmic: bool = False
    from_zero: bool = True
    axis_format: str = ""

    def values(self, record: Record) -> np.ndarray:
        """One for each update of the record, NaN where there is none."""
        if self.name != "data_wait":
            return record[self.name] * self.scale
        with np.errstate(divide="ignore", invalid="ignore"):
            return record["data_wait_seconds"] / record["update_seconds"] * self.scale


LOSS = Metric("loss", "Loss", "nats per token", is_noisy=True, may_be_logarithmic=True, from_zero=False)
BITS_PER_BYTE = Metric("bits_per_byte", "Bits per byte", "on held-out text", validation_set="", from_zero=False)
VALIDATION = Metric("validation_loss", "Validation loss", "nats per token", validation_set="")
_OF_UPDATES = (
    Metric("learning_rate", "Learning rate", "of each update", axis_format="~e"),
    Metric("grad_norm", "Gradient norm", "before clipping", is_noisy=True, may_be_logarithmic=True),
    Metric("tokens_per_second", "Throughput", "tokens per second", is_noisy=True, axis_format="~s"),
    Metric("mfu", "Model FLOPs utilisation", "% of the peak of all devices", 100, is_noisy=True),
    Metric("data_wait", "Waiting for data", "% of each update's time", 100, is_noisy=True),
    Metric("peak_memory_bytes", "Peak memory", "GB, of the largest rank", 1e-9),
)


class Curves:
    """The points of all metrics of some runs.

    Args:
        records: the runs.
        names: what each is called.

    Attributes:
        metrics: those that any of the runs has values of.
        time_unit: of the points' `time`.
        datasets: name of a metric -> its points (run, update, tokens, time, value); "NAME, median" -> the same, smoothed;
            "events" -> the events to mark.
    """

    def __init__(self, records: Sequence[Record], names: Sequence[str]) -> None:
        self.names = list(names)
        is_long = max(record.hours[-1] for record in records) >= LONG_RUN_HOURS
        self.time_unit, self._per_hour = ("hours", 1.0) if is_long else ("minutes", 60.0)
        self.metrics: list[Metric] = []
        self.datasets: dict[str, list[dict[str, Any]]] = {"events": []}
        self._finite: dict[str, np.ndarray] = {}
        of_sets = [
            replace(BITS_PER_BYTE, name=column_of(BITS_PER_BYTE.name, name), unit=f"on {name}", validation_set=name)
            for name in dict.fromkeys(name for record in records for name in record.validation_sets)
        ]
        for metric in (LOSS, BITS_PER_BYTE, *of_sets, *_OF_UPDATES, VALIDATION):
            values = [metric.values(record) for record in records]
            finite = np.concatenate(values)
            self._finite[metric.name] = finite[np.isfinite(finite)]
            if metric != VALIDATION and len(self._finite[metric.name]):
                self.metrics.append(metric)
            self.datasets[metric.name] = []
            self.datasets[median_of(metric)] = []
            for record, name, column in zip(records, names, values, strict=True):
                self._add(metric, record, name, column)
        for record, name in zip(records, names, strict=True):
            self._add_events(record, name)

    def _add(self, metric: Metric, record: Record, name: str, values: np.ndarray) -> None:
        before = None if metric.validation_set is None else record.validation_before(metric.validation_set)
        if before:
            value = before["loss" if metric == VALIDATION else "bits_per_byte"]
            point = {"run": name, "update": 0, "tokens": 0, "time": 0.0, "value": _rounded(value)}
            self.datasets[metric.name].append(point)
        rows = thin(values, RAW_BUCKETS)
        self.datasets[metric.name] += self._points(record, name, rows, values[rows])
        if metric.is_noisy:
            rows = np.unique(np.linspace(0, len(values) - 1, SMOOTH_POINTS).astype(int))
            medians = running_median(values, smoothing_window(values), rows)
            self.datasets[median_of(metric)] += self._points(record, name, rows, medians)

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

    def _add_events(self, record: Record, name: str) -> None:
        updates, hours = np.append(0.0, record["update"]), np.append(0.0, record.hours)
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for event in notable_events(record):
            by_kind.setdefault(event["event"], []).append(event)
        for kind, events in by_kind.items():
            for event in events[:: -(-len(events) // EVENTS_OF_A_KIND)]:
                self.datasets["events"].append(
                    {
                        "run": name,
                        "event": kind,
                        "what": event_name(kind),
                        "update": event["update"],
                        "tokens": event["update"] * record.config.batch.tokens_per_update,
                        "time": _rounded(float(np.interp(event["update"], updates, hours)) * self._per_hour),
                        "details": event_text(event),
                    }
                )

    def range_of(self, metric: Metric) -> tuple[float, float]:
        """(smallest, largest) finite value of a metric of `metrics`, over all runs."""
        values = self._finite[metric.name]
        return float(values.min()), float(values.max())

    def is_logarithmic(self, metric: Metric) -> bool:
        """Whether the largest value would leave the others on the floor."""
        smallest, largest = self.range_of(metric)
        return metric.may_be_logarithmic and smallest > 0 and largest > 10 * float(np.median(self._finite[metric.name]))


def median_of(metric: Metric) -> str:
    """The dataset of a metric's running median."""
    return f"{metric.name}, median"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
