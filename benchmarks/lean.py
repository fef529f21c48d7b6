"""What lean AdamW costs in quality: loss curves on the quickstart, and the error of adding up gradients in bf16.

`python -m benchmarks.lean`; torchao has to be installed: `pip install --editable '.[bf16-state]'`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from recipe.run.launch import start_accelerator
from torch import Tensor

from benchmarks.measure import circumstances, table, write_result
from recipe.config.settings import HELD_OUT, Config, ModelConfig, OptimizerConfig
from recipe.data.blocks import split_into_micro_batches
from recipe.model.gpt2 import CausalLanguageModel, build_gpt2
from recipe.plan.budget import UpdatePlan
from recipe.report.charts import library, theme
from recipe.report.record import Record, read_record
from recipe.run.environment import describe_machine
from recipe.step.update import MicroBatch, accumulate_gradient

# The second seed shows how far two runs are apart that differ in nothing that matters.
RUNS = {
    "fp32": [],
    "fp32, another seed": ["--run.seed", "4321"],
    "bf16 autocast, fp32 state": ["--precision", "bf16"],
    "bf16": ["--precision", "bf16", "--optimizer.state", "bf16"],
}
STEPS = (1, 4, 16, 64)
LAST_UPDATES = 40  # of which the training loss is averaged


def train(root: Path, arguments: Sequence[str]) -> dict[str, Record]:
    """The quickstart in each way, one after the other, with the same blocks but for the other seed's."""
    records = {}
    for name, more in RUNS.items():
        directory = root / name.replace(" ", "-").replace(",", "")
        command = [sys.executable, "recipe/train.py", "--config", "configs/quickstart.yaml", *arguments, *more]
        command += ["--run.directory", str(directory), "--data.cache_directory", str(root / "cache")]
        command += ["--run.parity_check", "false", "--evaluation.sample_tokens", "null"]
        print(f"training: {name}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records[name] = read_record(directory)
    return records


def accumulation_errors(accelerator: Any) -> dict[int, dict[str, float]]:
    """||g - g_exact|| / ||g_exact|| of the gradient of 64 blocks in N micro-batches, under bf16 autocast.

    `exact` adds up in float32 with the same weights and the same micro-batches, so that all that differs is the gradient's
    own precision; `autocast` is what bf16 arithmetic alone does, against float32 arithmetic.
    """
    shape = ModelConfig(n_layer=4, n_embd=128, n_head=4, vocab_size=2048, n_positions=64)
    tokens = torch.randint(2048, (64, 65), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    lean = build_gpt2(Config(model=shape, optimizer=OptimizerConfig(state="bf16")), 2048, 0)
    exact = build_gpt2(Config(model=shape), 2048, 0)
    exact.load_state_dict(lean.state_dict())  # the rounded weights, in float32
    errors = {}
    for steps in STEPS:
        plan = UpdatePlan(64 * 64, 64, 64, 1, 64 // steps)
        found = gradient(accelerator, lean, batch, plan, is_bf16=True)
        reference = gradient(accelerator, exact, batch, plan, is_bf16=True)
        fp32 = gradient(accelerator, exact, batch, plan, is_bf16=False)
        errors[steps] = {
            "bf16 gradient": relative(found, reference),
            "bf16 arithmetic": relative(reference, fp32),
            "norm": float(found.norm() / reference.norm()) - 1,
        }
    return errors


def gradient(
    accelerator: Any, model: CausalLanguageModel, batch: MicroBatch, plan: UpdatePlan, *, is_bf16: bool
) -> Tensor:
    """The gradient of an update as one float64 vector."""
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        micro_batches = split_into_micro_batches(batch, plan, 0)
        accumulate_gradient(
            model,
            micro_batches,
            accelerator=accelerator,
            scaling="accumulate",
            target_tokens=plan.tokens_per_update,
        )
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def summary(record: Record) -> dict[str, float]:
    """What a curve comes to."""
    losses = record.updates["loss"].dropna().tolist()
    validation = record.evaluations(HELD_OUT)["loss"].tolist()
    return {"validation_loss": validation[-1], "last_training_loss": mean(losses[-LAST_UPDATES:])}


def picture(records: dict[str, Record]) -> bytes:
    """Training loss, averaged over ten updates, and validation loss as dots; PNG on white."""
    lines, dots = [], []
    for name, record in records.items():
        updates = record.updates.dropna(subset=["loss"])
        tokens, losses = updates["tokens"].tolist(), updates["loss"].tolist()
        lines += [
            {"run": name, "tokens": tokens[last - 1], "loss": mean(losses[last - 10 : last])}
            for last in range(10, len(losses) + 1, 5)
        ]
        per_update = record.config.batch.tokens_per_update
        evaluations = record.evaluations(HELD_OUT).to_dict("records")
        dots += [{"run": name, "tokens": e["update"] * per_update, "loss": e["loss"]} for e in evaluations]
    color = {"field": "run", "type": "nominal", "scale": {"domain": list(RUNS)}, "title": None}
    encoding = {
        "x": {"field": "tokens", "type": "quantitative", "title": "tokens seen"},
        "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}, "title": "nats per token"},
        "color": color,
    }
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": "Loss on the quickstart", "subtitle": "lines: training, dots: validation"},
        "layer": [
            {"data": {"values": lines}, "mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoding},
            {"data": {"values": dots}, "mark": {"type": "point", "filled": True, "size": 60}, "encoding": encoding},
        ],
        "width": 520,
        "height": 320,
        "padding": 16,
        "config": theme("light"),
    }
    png: bytes = library().vegalite_to_png(spec, scale=2)
    return png


def report(result: dict[str, Any], image: str, command: str) -> str:
    """The result as Markdown."""
    reference = result["runs"]["fp32"]["validation_loss"]
    runs = [
        [
            name,
            f"{values['validation_loss'] - reference:+.4f}",
            f"{values['validation_loss']:.4f}",
            f"{values['last_training_loss']:.4f}",
        ]
        for name, values in result["runs"].items()
    ]
    errors = [
        [str(steps), f"{of['bf16 gradient']:.1e}", f"{of['bf16 arithmetic']:.1e}", f"{of['norm']:+.1e}"]
        for steps, of in result["accumulation"].items()
    ]
    return f"""# What lean AdamW costs in quality ({result["machine"]["time_utc"][:10]})

`{command}` at {circumstances(result["machine"])}.

## Loss on the quickstart

{result["updates"]} updates, the same blocks in the same order but for the other seed's, which shows how far apart two runs are
that differ in nothing that matters. Validation loss at the end in nats per token; training loss is the mean of the last
{LAST_UPDATES} updates.

{table(["", "against fp32", "validation loss", "training loss"], runs)}
![Loss curves]({image})

## Adding up gradients in bf16

||g - g'|| / ||g'|| of an update's gradient, of the quickstart's shape at its start, 64 blocks in N micro-batches. First column:
lean, whose gradients and residual stream are bf16, against bf16 autocast with the same weights in float32. Second: autocast
against float32, both with float32 gradients. Third: relative error of the norm in the first.

{table(["N", "lean against autocast", "autocast against fp32", "norm, lean"], errors)}"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lean", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few updates of a tiny shape, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the result")
    options = parser.parse_args()
    tiny = ["--model.n_layer", "1", "--model.n_embd", "32", "--run.max_updates", "12", "--evaluation.tokens", "4096"]
    accelerator = start_accelerator(Config(), "fp32")
    machine = describe_machine(accelerator, "fp32", None)
    errors = accumulation_errors(accelerator)
    with tempfile.TemporaryDirectory() as root:
        records = train(Path(root), tiny if options.quick else [])
    command = "python -m benchmarks.lean" + " --quick" * options.quick
    result = {
        "command": command,
        "machine": machine,
        "updates": next(iter(records.values())).updates_done,
        "runs": {name: summary(record) for name, record in records.items()},
        "losses": {name: record.updates["loss"].dropna().tolist() for name, record in records.items()},
        "accumulation": errors,
    }
    path = options.out / f"{machine['time_utc'][:10]}-lean"
    text = report(result, f"{path.name}.png", command)
    write_result(path, text, result)
    path.with_suffix(".png").write_bytes(picture(records))
    print(text)


if __name__ == "__main__":
    main()
