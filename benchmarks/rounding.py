"""How far the losses of the quickstart on two ranks are from those on one, update by update: `python -m benchmarks.rounding`.

The updates are the same, but sums are rounded in another order, and training amplifies any difference. Prints a table, draws a
picture into docs/results.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import altair as alt
import pandas as pd

SHOWN = (1, 6, 12, 20, 24, 40, 60, 120, 240)
PROGRAMS = {
    1: ["recipe/train.py"],
    2: ["-m", "recipe", "launch", "--quiet", "--config_file", "accelerate_configs/cpu_2.yaml", "recipe/train.py"],
}


def main() -> None:
    """Train twice, compare, draw."""
    ledgers = {}
    with tempfile.TemporaryDirectory() as root:
        for ranks, program in PROGRAMS.items():
            directory = Path(root, str(ranks))
            given = ["--config", "benchmarks/plain.yaml", "--run.directory", str(directory)]
            quiet = ["--evaluation.sample_tokens", "null", "--run.parity_check", "false"]
            subprocess.run([sys.executable, *program, *given, *quiet], check=True, stdout=subprocess.DEVNULL)
            ledgers[ranks] = pd.read_json(directory / "ledger.jsonl", lines=True).query("update > 0")
    assert (ledgers[1]["blocks_sha256"] == ledgers[2]["blocks_sha256"]).all()
    difference = (ledgers[2]["loss"] / ledgers[1]["loss"] - 1).abs()
    curve = pd.DataFrame({"update": ledgers[1]["update"], "difference": difference, "so far": difference.cummax()})
    print(curve[curve["update"].isin(SHOWN)].to_string(index=False, float_format="{:.1e}".format))
    log = alt.Scale(type="log")
    points = alt.Chart(curve[curve["difference"] > 0]).mark_point(filled=True, size=14)
    picture = points.encode(
        alt.X("update", title="update of the quickstart"),
        alt.Y(
            "difference", scale=log, axis=alt.Axis(format="~e"), title="relative difference of the loss, 2 ranks to 1"
        ),
    )
    output = Path("docs/results") / f"{date.today()}-rounding.png"
    picture.properties(width=560, height=300).save(output, scale_factor=2)
    print(output)


if __name__ == "__main__":
    main()
