"""The plan of a run: every derived number, with its derivation. `python -m recipe.plan --config ...` needs no torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from recipe.budget import UpdatePlan
from recipe.command_line import load_config
from recipe.config import Config, ModelConfig
from recipe.errors import RecipeError, run_command
from recipe.footprint import _MOMENTS, parameter_count
from recipe.schedule import total_updates


def flops_per_token(model: ModelConfig, n_positions: int, sequence_length: int) -> int:
    """Forward and backward FLOPs of one target token: 6 N + 12 L d T (Chowdhery et al., 2022, appendix B)."""
    return 6 * parameter_count(model, n_positions) + 12 * model.n_layer * model.n_embd * sequence_length


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a configuration and a number of ranks."""

    update: UpdatePlan
    parameters: int
    flops_per_token: int
    optimizer_moments: int
    total_updates: int
    planned_updates: int

    @property
    def total_tokens(self) -> int:
        """Target tokens of the whole run, over which the schedules stretch."""
        return self.total_updates * self.update.tokens_per_update

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with its derivation) of each line of the table."""
        update = self.update
        shares = sorted({len(update.lanes_of_rank(rank)) for rank in range(update.world_size)})
        share = f"{shares[0]} to {shares[-1]} lanes each" if len(shares) > 1 else f"{shares[0]} lanes each"
        size = self.parameters * 4
        moments = size * self.optimizer_moments
        stops = f", stops after {self.planned_updates:,}" if self.planned_updates < self.total_updates else ""
        return [
            ("tokens per update", f"{update.tokens_per_update:,}"),
            ("blocks", f"{update.tokens_per_update:,} / {update.sequence_length:,} = {update.blocks_per_update:,}"),
            ("lanes", f"{update.lanes}, {update.blocks_per_lane} blocks of each in an update"),
            ("ranks", f"{update.world_size}, {share}"),
            ("micro-batch", f"{update.micro_batch_size} x {update.sequence_length:,} tokens at most"),
            ("accumulation steps", update.division),
            ("parameters", f"{self.parameters:,}"),
            ("total tokens", f"{self.total_tokens:,} = {self.total_tokens / self.parameters:.1f} per parameter"),
            ("updates", f"{self.total_tokens:,} / {update.tokens_per_update:,} = {self.total_updates:,}{stops}"),
            (
                "memory",
                f"{size_text(size)} parameters + {size_text(size)} gradients + {size_text(moments)} optimizer "
                f"= {size_text(2 * size + moments)} per rank, before activations",
            ),
        ]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in self.rows())


def make_plan(config: Config, world_size: int) -> RunPlan:
    """The plan of `config` on `world_size` ranks.

    Raises:
        RecipeError: a budget that does not divide, or a warm-up longer than the run.
    """
    update = UpdatePlan(
        tokens_per_update=config.batch.tokens_per_update,
        sequence_length=config.data.sequence_length,
        lanes=config.batch.lanes,
        world_size=world_size,
        micro_batch_size=1 if config.batch.micro_batch_size == "auto" else config.batch.micro_batch_size,
    )
    parameters = parameter_count(config.model, config.n_positions)
    updates = total_updates(config.schedule, parameters, update.tokens_per_update)
    if config.schedule.warmup_tokens >= updates * update.tokens_per_update:
        raise RecipeError(
            f"schedule.warmup_tokens = {config.schedule.warmup_tokens:,} leaves nothing of the run's "
            f"{updates * update.tokens_per_update:,} tokens: set --schedule.warmup_tokens to less, or a longer run"
        )
    return RunPlan(
        update=update,
        parameters=parameters,
        flops_per_token=flops_per_token(config.model, config.n_positions, config.data.sequence_length),
        optimizer_moments=_MOMENTS[config.optimizer.name],
        total_updates=updates,
        planned_updates=min(updates, config.run.max_updates or updates),
    )


def size_text(size_bytes: float) -> str:
    """Bytes in kB, MB or GB, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB" if size_bytes else "0"


def world_size_of_launcher() -> int:
    """WORLD_SIZE, which launchers set; 1 without one.

    Raises:
        RecipeError: it is no number of ranks.
    """
    announced = os.environ.get("WORLD_SIZE", "1")
    if not announced.isdigit() or int(announced) < 1:
        raise RecipeError(f"WORLD_SIZE = {announced!r} is no number of ranks: launch with accelerate or torchrun")
    return int(announced)


def main() -> None:
    """Print the plan for WORLD_SIZE ranks (default 1)."""
    print(make_plan(load_config(sys.argv[1:]), world_size_of_launcher()))


if __name__ == "__main__":
    run_command(main)
