"""The gradient noise scale at a checkpoint, block by block: `python -m recipe noise runs/NAME/checkpoints/step-000500`."""

from __future__ import annotations  # without it, --help prints each Annotated type in full

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from recipe.config.command_line import config_of_checkpoint, make_parser, parse
from recipe.config.settings import AtLeast, AtMost, Config, OptimizerConfig, PerformanceConfig
from recipe.errors import RecipeError
from recipe.format import aligned
from recipe.plan.run_plan import make_plan
from recipe.run.console import Console
from recipe.run.environment import choose_precision, device_type, start_accelerator
from recipe.run.launch import check_launch
from recipe.run.ledger import Ledger
from recipe.run.run import Run
from recipe.run.stop import StopRequest


@dataclass(frozen=True)
class NoiseConfig:
    """What is measured."""

    blocks: Annotated[int, AtLeast(8), AtMost(2**20)] = 256
    """Blocks whose gradient is computed, one by one and twice: the next ones of the run. Four times as many halve the error."""


def main() -> None:
    """The command."""
    text = "Measure the gradient noise scale at a checkpoint, from the gradient of each block alone."
    parser = make_parser(NoiseConfig, "python -m recipe noise", text)
    parser.add_argument("checkpoint", help="Checkpoint of a run, such as runs/NAME/checkpoints/step-000500.")
    parser.add_argument("--json", action="store_true", help="Print the same numbers as JSON.")
    config, rest = parse(parser, NoiseConfig, sys.argv[1:])
    check_launch()
    found = noise_at(Path(rest["checkpoint"]), config.blocks)
    print(json.dumps(found, indent=2) if rest["json"] else as_text(found))


def noise_at(checkpoint: Path, blocks: int) -> dict[str, Any]:
    """The numbers that the command prints.

    Raises:
        RecipeError: it is no checkpoint with a training state, or its text cannot be read any more.
    """
    from recipe.checkpoint.files import read_state
    from recipe.checkpoint.resume import ResumePoint
    from recipe.checkpoint.verify import why_invalid
    from recipe.data.lanes import merge_ranges
    from recipe.step.frozen_noise import measure_frozen

    if reason := why_invalid(checkpoint):
        raise RecipeError(
            f"{checkpoint}: {reason}; give a checkpoint of a run, such as runs/NAME/checkpoints/step-000500"
        )
    state = read_state(checkpoint)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # Windows keeps a file that is mapped
        config = _config_of(state.config, Path(cache), checkpoint)
        point = ResumePoint(checkpoint, state, skipped_blocks=merge_ranges(state.skipped_blocks))
        noise = measure_frozen(*_model_and_blocks(config, point, blocks))
    tokens = make_plan(config, 1, 1).update_at(state.update).tokens_per_update
    return {
        **{"checkpoint": str(checkpoint), "update": state.update, "tokens": state.tokens},
        **{"blocks": blocks, "sequence_length": config.data.sequence_length},
        **{"noise_s2": noise.s2, "noise_g2": noise.g2, "tokens_per_update": tokens},
        **noise.scale.columns(tokens),
    }


def as_text(found: dict[str, Any]) -> str:
    """The same for a person."""
    length = found["sequence_length"]
    value, low, high = (found[f"gradient_noise_scale_tokens{end}"] for end in ("", "_low", "_high"))

    def interval(unit: int, name: str) -> str:
        if high is None:
            above = f"above {low / unit:,.4g} {name}, " if low else ""
            return f"{above}not determined yet: give more --blocks"
        return f"{value / unit:,.4g} {name} (95 %: {low / unit:,.4g} to {high / unit:,.4g})"

    rows = [
        ("checkpoint", f"{found['checkpoint']}, after {found['update']:,} updates"),
        ("measured", f"{found['blocks']:,} blocks of {length:,} tokens, one by one"),
        ("gradient noise scale", interval(1, "tokens")),
        ("the same", interval(length, "blocks")),
        ("tokens per update", f"{found['tokens_per_update']:,}"),
    ]
    if snr := found["gradient_snr"]:
        rows.append(("of an update", f"signal to noise {snr:.3g}, expected cosine {found['expected_cosine']:.3f}"))
    return aligned(rows)


def _config_of(settings: dict[str, Any], cache: Path, checkpoint: Path) -> Config:
    """The run's settings, with its cache where that still is, and nothing that a measurement has no use for."""
    config, own = config_of_checkpoint(checkpoint, settings), checkpoint.resolve().parent.parent
    directory = own if (own / "config.yaml").is_file() else cache
    return replace(
        config,
        run=replace(config.run, directory=str(directory)),
        optimizer=OptimizerConfig(),  # parameters in float32
        performance=PerformanceConfig(compile=False, matmul=config.performance.matmul, tf32=config.performance.tf32),
    )


def _model_and_blocks(config: Config, point: Any, count: int) -> tuple[Any, Sequence[Any]]:
    """The model of a checkpoint, and the next blocks of its run, each as a micro-batch; evenly spread over an update's."""
    import numpy as np

    from recipe.checkpoint.resume import restore_lanes
    from recipe.checkpoint.same_text import open_text
    from recipe.data.blocks import make_lanes, next_update, to_tensors
    from recipe.data.tokenizer import load_tokenizer
    from recipe.model import build_model, choose_kernels

    precision, _ = choose_precision(config.precision, device_type())
    accelerator, plan = start_accelerator(precision), make_plan(config, 1, 1)
    console = Console(False, plan.planned_updates)
    run = Run(config, plan, accelerator, precision, StopRequest(), console, Ledger(config, accelerator, console.say))
    choose_kernels(run)
    sources = open_text(run, point)
    tokenizer = load_tokenizer(config, sources, str(point.checkpoint))
    model = accelerator.prepare(build_model(run, tokenizer, str(point.checkpoint)))
    lanes, update = make_lanes(run, sources, tokenizer), plan.update_at(point.update)
    restore_lanes(run, point, lanes)
    updates = range(-(-count // update.blocks_per_update))
    everything = np.concatenate([next_update(lanes, update.blocks_per_lane, run.device).blocks for _ in updates])
    chosen = everything[np.arange(count) * len(everything) // count]
    start = accelerator.unwrap_model(model).document_start
    return model.eval(), [to_tensors(block[None], run.device, start) for block in chosen]
