"""A benchmark of trials, run to its end with its tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers import run


def quick_benchmark(name: str, directory: Path) -> tuple[str, str, list[Path]]:
    """What it prints, its page, and the outcomes of its runs."""
    runs, out = directory / "runs", directory / "out"
    options = ["--quick", "--at_once", "2", "--runs", str(runs), "--out", str(out)]
    done = run([sys.executable, "-m", f"benchmarks.{name}", *options], timeout=600)
    assert done.returncode == 0, done.stderr
    (page,) = out.glob(f"*-{name}.md")
    return done.stdout, page.read_text(encoding="utf-8"), [*runs.glob("*.json")]
