"""Numbers and values for a person. What belongs together has a space that does not break."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def event_name(name: str) -> str:
    """`micro_batch` -> `micro batch`."""
    return name.replace("_", " ")


def event_text(event: dict[str, Any]) -> str:
    """The values of any event in one line, without when it happened and without hashes."""
    values = {k: v for k, v in event.items() if k not in _NOT_SHOWN and v not in (None, [], {})}
    if "checkpoint" in values:
        values["checkpoint"] = Path(str(values["checkpoint"])).name  # where it lies is the author's own
    return "; ".join(f"{event_name(name)} {value_text(value)}" for name, value in values.items())


_NOT_SHOWN = ("event", "update", "time_utc", "blocks_sha256")


def value_text(value: Any) -> str:
    """A JSON value for a person, 200 characters at most."""
    if isinstance(value, dict):
        pairs = {k: v for k, v in value.items() if isinstance(v, list) and len(v) == 2}
        if len(pairs) == len(value):  # changes: [earlier, now]
            text = ", ".join(f"{name} {value_text(old)} → {value_text(new)}" for name, (old, new) in pairs.items())
        else:
            text = ", ".join(f"{name} {value_text(inner)}" for name, inner in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(value_text(inner) for inner in value)
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = "none" if value is None else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"


def short_count(number: float) -> str:
    """983,040, then 409.6 million, 26.3 billion, 1.2 trillion."""
    for name, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= 10 * scale or (name != "million" and number >= scale):
            return f"{number / scale:,.1f} {name}"
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """0.412 -> 41.2 %."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """`42 s`, `1 min 24 s`, `3 h 12 min`, `5 d 3 h`, with spaces that do not break."""
    text = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    for large, small, scale, factor in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= scale:
            whole, rest = divmod(round(seconds / factor), scale // factor)
            text = f"{whole:,} {large} {rest} {small}"
            break
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def size_text(size_bytes: float) -> str:
    """Bytes in kB, MB or GB, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB" if size_bytes else "0"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with columns below each other: the first and the last to the left, sizes between them to the right."""
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  " + "  ".join([*cells, row[last]]).rstrip())
    return "\n".join(lines)
