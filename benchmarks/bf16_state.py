"""What AdamW with bf16 state costs in quality: losses on the quickstart, and the error of adding up gradients in bf16.

`python -m benchmarks.bf16_state`; it needs torchao: `pip install --editable '.[bf16-state]'`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor

from benchmarks.results import command_line, table, write_result
from benchmarks.training import Training, read_preset
from recipe.config.settings import HELD_OUT
from recipe.errors import run_command
from recipe.report.charts import library
from recipe.run.ledger import LEDGER
from recipe.step.parity import relative_difference, split_otherwise, update_gradient

PRESET = "benchmarks/plain.yaml"
# The second seed shows how far two runs are apart that differ in nothing that matters.
RUNS = {
    "fp32": [],
    "fp32, another seed": ["--run.seed", "4321"],
    "bf16 autocast, fp32 state": ["--precision", "bf16"],
    "bf16 state": ["--precision", "bf16", "--optimizer.state", "bf16"],
}
TINY = ["--model.n_layer", "1", "--model.n_embd", "32", "--run.max_updates", "12", "--evaluation.tokens", "4096"]
STEPS = (1, 4, 16, 64)
LAST_UPDATES = 40  # whose training loss is averaged
VALIDATION = f"validation/{HELD_OUT}/loss"


def train(root: Path, arguments: Sequence[str]) -> dict[str, pandas.DataFrame]:
    """Train the quickstart in each way, one after the other, with the same blocks but for the other seed's; the ledgers."""
    ledgers = {}
    for number, (name, more) in enumerate(RUNS.items()):
        directory = root / str(number)
        command = [sys.executable, "recipe/train.py", "--config", PRESET, *arguments, *more]
        command += ["--run.directory", str(directory), "--data.cache_directory", str(root / "cache")]
        command += ["--run.parity_check", "false", "--evaluation.sample_tokens", "null"]
        print(f"training: {name}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ledgers[name] = pandas.read_json(directory / LEDGER, lines=True)
    return ledgers


def accumulation_errors() -> dict[int, dict[str, float]]:
    """||g - g'|| / ||g'|| of the gradient of 64 blocks in N micro-batches, by the precision of arithmetic and state.

    All have the same weights, those rounded to bf16. So bf16 state and bf16 autocast differ in the state's precision alone,
    and bf16 autocast and float32 in the arithmetic's.
    """
    weights: dict[str, Tensor] | None = None
    found = []
    for precision, state in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        changes = {"precision": precision, "optimizer.state": state, "performance.compile": False}
        changes |= {"data.sequence_length": 64, "batch.lanes": 64}
        training = Training(read_preset(PRESET, changes), vocabulary=2048)
        weights = weights or training.model.state_dict()
        training.model.load_state_dict(weights)
        batch = training.first_blocks().batch
        runs = {steps: split_otherwise(training.run, 64 // steps, "accumulate") for steps in STEPS}
        found.append({steps: update_gradient(run, training.model, batch) for steps, run in runs.items()})
    bf16, autocast, fp32 = found
    return {
        steps: {
            "bf16 gradient": relative_difference(bf16[steps], autocast[steps]),
            "bf16 arithmetic": relative_difference(autocast[steps], fp32[steps]),
            "norm": norm(bf16[steps]) / norm(autocast[steps]) - 1,
        }
        for steps in STEPS
    }


def norm(gradient: Sequence[Tensor]) -> float:
    """2-norm, over all tensors together."""
    return float(torch.stack([part.norm() for part in gradient]).norm())


def chart(ledgers: Mapping[str, pandas.DataFrame]) -> Any:
    """Training loss, averaged over ten updates, as lines, and validation loss as dots."""
    import altair as alt

    smooth = [
        ledger.assign(run=name, smooth=ledger["loss"].rolling(10).mean(), validation=ledger[VALIDATION])
        for name, ledger in ledgers.items()
    ]
    points = pandas.concat(smooth)[["run", "tokens", "smooth", "validation"]]
    color = alt.Color("run:N", sort=list(RUNS), title=None)
    base = alt.Chart(points).encode(alt.X("tokens:Q", title="tokens seen"), color=color)
    nats = alt.Y("smooth:Q", title="nats per token", scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1.8).encode(nats)
    dots = base.mark_point(filled=True, size=60).encode(alt.Y("validation:Q"))
    title = alt.Title("Loss on the quickstart", subtitle="lines: training, dots: validation")
    return alt.layer(lines, dots).properties(title=title, width=520, height=320)


def report(result: Mapping[str, Any]) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    reference = result["runs"]["fp32"]["validation_loss"]
    runs = [
        {
            "": name,
            "against fp32": f"{values['validation_loss'] - reference:+.4f}",
            "validation loss": f"{values['validation_loss']:.4f}",
            "training loss": f"{values['last_training_loss']:.4f}",
        }
        for name, values in result["runs"].items()
    ]
    errors = [
        {
            "N": str(steps),
            "bf16 state against autocast": f"{of['bf16 gradient']:.1e}",
            "autocast against fp32": f"{of['bf16 arithmetic']:.1e}",
            "norm, bf16 state": f"{of['norm']:+.1e}",
        }
        for steps, of in result["accumulation"].items()
    ]
    return f"""What AdamW with bf16 state costs in quality
## Loss on the quickstart

{len(result["runs"]["fp32"]["losses"])} updates, the same blocks in the same order but for the other seed's,
which shows how far two runs are apart that differ in nothing that matters. Validation loss at the end in nats per token;
training loss is the mean of the last {LAST_UPDATES} updates.

{table(runs)}
## Adding up gradients in bf16

||g - g'|| / ||g'|| of an update's gradient, of the quickstart's shape at its start, 64 blocks in N micro-batches. First column:
bf16 state, whose gradients and residual stream are bf16, against bf16 autocast with the same weights in float32. Second:
autocast against float32, both with float32 gradients. Third: relative error of the norm in the first.

{table(errors)}"""


def main() -> None:
    options = command_line("bf16_state", __doc__).parse_args()
    library()  # before anything is measured
    errors = accumulation_errors()
    with tempfile.TemporaryDirectory() as root:
        ledgers = train(Path(root), TINY if options.quick else [])
    runs = {
        name: {
            "validation_loss": ledger[VALIDATION].dropna().iloc[-1],
            "last_training_loss": ledger["loss"].tail(LAST_UPDATES).mean(),
            "losses": ledger["loss"].dropna().tolist(),
        }
        for name, ledger in ledgers.items()
    }
    result = {"runs": runs, "accumulation": errors}
    write_result("bf16_state", options, result, report(result), chart(ledgers))


if __name__ == "__main__":
    run_command(main)
