"""What a run comes to before it is started: the division, the bytes, the time and the cost. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipe.config.checks import check_bounds, validate
from recipe.config.command_line import make_parser, parse
from recipe.config.settings import Config
from recipe.errors import RecipeError, run_command
from recipe.format import aligned
from recipe.plan.devices import Device, find_device
from recipe.plan.estimate import (
    Memory,
    Time,
    classic_bytes,
    classic_rows,
    fit_rows,
    memory_rows,
    plan_memory,
    planned_precision,
)
from recipe.plan.memory import largest_micro_batch
from recipe.plan.run_plan import RunPlan, make_plan, world_size_of_launcher


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run, and what it is planned for."""

    world_size: int | None = None
    """Ranks, one device each. Null: WORLD_SIZE, or 1."""
    device: str | None = None
    """h100, a100, ..., cpu: its memory and its peak. An unknown name lists all. Null: no limit and no time."""
    memory_gb: float | None = None
    """Memory of a device, 10^9 bytes. Null: the device's; of cpu, a rank's share of this machine."""
    mfu: float = 0.4
    """Share of the peak that the model's own arithmetic uses: an assumption until the run's ledger has it."""
    flops: float | None = None
    """Peak FLOP/s of a device. Null: the device's in bf16."""
    price_per_hour: float | None = None
    """Price of a device for an hour."""


_BOUNDS: dict[str, tuple[float, bool]] = {
    "world_size": (1, False),
    "memory_gb": (0, True),
    "mfu": (0, True),
    "flops": (0, True),
    "price_per_hour": (0, False),
}


def memory_of(config: PlanConfig, device: Device | None, world_size: int) -> float | None:
    """Bytes that a rank has; None where no device is given."""
    if config.memory_gb is not None:
        return config.memory_gb * 1e9
    if device is not None and device.memory_bytes is None:
        import psutil

        return psutil.virtual_memory().total / world_size
    return device.memory_bytes if device else None


def plan_everything(config: PlanConfig) -> tuple[RunPlan, Memory, Time | None]:
    """The division, the bytes and, where the peak is known, the time.

    Raises:
        RecipeError: settings that cannot be used, a device that is not known, or one too small for one block.
    """
    validate(config)
    check_bounds(config, _BOUNDS)
    if config.mfu > 1:
        raise RecipeError(f"--mfu {config.mfu:g}: a share of the peak, at most 1; 0.4 is 40 %")
    world_size = config.world_size or world_size_of_launcher()
    device = None if config.device is None else find_device(config.device)
    device_type = device.type if device else "cuda"
    memory_bytes = memory_of(config, device, world_size)
    precision = planned_precision(config, device_type)
    found = None
    if config.batch.micro_batch_size == "auto" and memory_bytes is not None:
        found = largest_micro_batch(config, world_size, memory_bytes, device_type, precision)
    plan = make_plan(config, world_size, found)
    update = plan.update
    memory = plan_memory(config, update.micro_batch_size, world_size, device_type, memory_bytes)
    flops = config.flops or (device and device.bf16_flops if precision == "bf16" else None)
    time = flops and Time(
        flops=flops,
        mfu=config.mfu,
        flops_per_token=plan.flops_per_token,
        balance=update.blocks_per_update / (update.largest_share * world_size),
        tokens=plan.planned_updates * update.tokens_per_update,
        world_size=world_size,
        price_per_hour=config.price_per_hour,
    )
    return plan, memory, time or None


def as_text(config: PlanConfig, plan: RunPlan, memory: Memory, time: Time | None) -> str:
    """Three tables: the division, a rank's memory, and the run on the device."""
    update = plan.update
    masked = sum(len(rows) == 0 for rank in range(update.world_size) for rows in update.micro_batches(rank))
    padding = f"0 tokens{f'; {masked} masked blocks, where ranks have fewer than steps' if masked else ''}"
    division = [*plan.rows()[:-1], ("padding", padding)]
    run = fit_rows(memory, update.largest_share) + (time.rows() if time else [])
    if memory.memory_bytes is None:
        run.append(("not given", "--device h100, or another one, for the largest micro-batch, time and cost"))
    elif time is None:
        run.append(("not given", f"--flops for time and cost: the {memory.precision} peak is not known"))
    elif time.price_per_hour is None:
        run.append(("not given", "--price_per_hour for the cost"))
    parts = {
        "plan": aligned(division),
        f"memory of a rank{', for micro-batches of one block' if plan.micro_batch_is_auto else ''}": aligned(
            memory_rows(memory, config, update)
        ),
        "classic table, before activations": aligned(
            classic_rows(plan.parameters, memory.footprints[config.optimizer.state])
        ),
        f"run{f' on {config.device}' if config.device else ''}": aligned(run),
    }
    return "\n\n".join(f"{title}\n{lines}" for title, lines in parts.items())


def as_dictionary(plan: RunPlan, memory: Memory, time: Time | None) -> dict[str, Any]:
    """The numbers of `as_text`, in bytes, tokens, FLOP and hours."""
    update = plan.update
    return {
        **asdict(update),
        "blocks_per_update": update.blocks_per_update,
        "micro_batch_size": None if plan.micro_batch_is_auto else update.micro_batch_size,
        "gradient_accumulation_steps": None if plan.micro_batch_is_auto else update.gradient_accumulation_steps,
        "padding_tokens": 0,
        "parameters": plan.parameters,
        "total_tokens": plan.total_tokens,
        "updates": plan.total_updates,
        "planned_updates": plan.planned_updates,
        "classic_bytes": classic_bytes(plan.parameters),
        "memory": memory.as_dictionary(),
        "time": time and time.as_dictionary(),
    }


def forecast(arguments: Sequence[str]) -> str:
    """What `python -m recipe plan ARGUMENTS` prints.

    Raises:
        RecipeError: settings that cannot be used.
    """
    parser = make_parser(PlanConfig, "python -m recipe plan", "What a run comes to, before it is started.")
    parser.add_argument("--json", action="store_true", help="Print the same numbers as JSON.")
    config, rest = parse(parser, PlanConfig, arguments)
    plan, memory, time = plan_everything(config)
    return (
        json.dumps(as_dictionary(plan, memory, time), indent=2) if rest["json"] else as_text(config, plan, memory, time)
    )


def main() -> None:
    """The command."""
    print(forecast(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
