"""What the benchmarks share: a command line, medians with their spread, tables, and a dated result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training import read_preset, start_quietly
from recipe.run.environment import describe_environment
from recipe.run.ledger import utc_now


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--out`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the result")
    return parser


def timed(action: Callable[[], object], times: int = 1) -> float:
    """Seconds that `action` takes `times` times."""
    started = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> str:
    """Median and range, to three digits: `0.41 (0.39..0.47)`."""
    return f"{median(values):#.3g} ({min(values):#.3g}..{max(values):#.3g})"


def ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    """Spread of one over the other, round by round: what slows down a whole round cancels out."""
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows of {column: cell}: the first column is text, the others are numbers."""
    lines = [[*rows[0]], ["---", *["---:"] * (len(rows[0]) - 1)], *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_result(
    name: str, options: argparse.Namespace, values: Mapping[str, Any], text: str, chart: Any = None
) -> None:
    """Write DATE-NAME.md for people, .json with every measurement, and, with a chart of altair, .png; print the text.

    Args:
        name: module of the benchmark.
        options: of `command_line`.
        values: JSON values.
        text: Markdown. Its first line is the title; the command, the machine and the picture go below it.
        chart: of altair.
    """
    machine = describe_environment(start_quietly(read_preset("benchmarks/plain.yaml")).accelerator, "fp32")
    command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
    path, (title, _, rest) = options.out / f"{utc_now()[:10]}-{name}", text.partition("\n")
    text = f"""# {title} ({utc_now()[:10]})

`{command}` at commit {machine["recipe_commit"]},
on {machine["cpu_cores"]} cores of {machine["cpu"]} with {machine["cpu_instructions"]};
{", ".join(f"{library} {version}" for library, version in machine["versions"].items())}.

{f"![{title}]({path.name}.png)" if chart else ""}
{rest}"""
    write_json(path.with_suffix(".json"), {"command": command, "machine": machine, **values})
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if chart:
        from recipe.report.charts import theme

        chart.properties(padding=16, config=theme("light")).save(path.with_suffix(".png"), scale_factor=2)
    print(text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all, so that a benchmark that is cut off leaves what it had measured.

    A float that is not finite becomes text, since JSON has no number for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    finite = json.loads(json.dumps(values), parse_constant=str)
    temporary.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
