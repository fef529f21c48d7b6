"""The plan of a run: every derived number, with its derivation. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from recipe.config.settings import Config, ModelConfig
from recipe.errors import RecipeError
from recipe.format import aligned, size_text
from recipe.plan.budget import UpdatePlan
from recipe.plan.memory import parameter_count, state_bytes
from recipe.plan.schedule import total_updates


def flops_per_token(model: ModelConfig, n_positions: int, sequence_length: int) -> int:
    """Forward and backward FLOPs of one target token: 6 N + 12 L d T (Chowdhery et al., 2022, appendix B)."""
    return 6 * parameter_count(model, n_positions) + 12 * model.n_layer * model.n_embd * sequence_length


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a configuration and a number of ranks.

    Args:
        update: how an update is cut; in micro-batches of one block while `micro_batch_is_auto`.
        parameters: of the model.
        flops_per_token: forward and backward.
        state_bytes: of (parameters, gradients, optimizer) on a rank.
        total_updates: over which the schedules stretch.
        planned_updates: after which the run stops.
        micro_batch_is_auto: the micro-batch is `auto`, and its size not found yet.
    """

    update: UpdatePlan
    parameters: int
    flops_per_token: int
    state_bytes: tuple[int, int, int]
    total_updates: int
    planned_updates: int
    micro_batch_is_auto: bool = False

    @property
    def total_tokens(self) -> int:
        """Target tokens of the whole run, over which the schedules stretch."""
        return self.total_updates * self.update.tokens_per_update

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with its derivation) of each line of the table."""
        update = self.update
        shares = sorted({len(update.lanes_of_rank(rank)) for rank in range(update.world_size)})
        share = f"{shares[0]} to {shares[-1]} lanes each" if len(shares) > 1 else f"{shares[0]} lanes each"
        size = f"{update.micro_batch_size} x {update.sequence_length:,} tokens at most"
        weights, gradients, moments = self.state_bytes
        stops = f", stops after {self.planned_updates:,}" if self.planned_updates < self.total_updates else ""
        return [
            ("tokens per update", f"{update.tokens_per_update:,}"),
            ("blocks", f"{update.tokens_per_update:,} / {update.sequence_length:,} = {update.blocks_per_update:,}"),
            ("lanes", f"{update.lanes}, {update.blocks_per_lane} blocks of each in an update"),
            ("ranks", f"{update.world_size}, {share}"),
            ("micro-batch", "auto: as many blocks as fit into memory" if self.micro_batch_is_auto else size),
            ("accumulation steps", f"1 to {update.largest_share}" if self.micro_batch_is_auto else update.division),
            ("parameters", f"{self.parameters:,}"),
            ("total tokens", f"{self.total_tokens:,} = {self.total_tokens / self.parameters:.1f} per parameter"),
            ("updates", f"{self.total_tokens:,} / {update.tokens_per_update:,} = {self.total_updates:,}{stops}"),
            (
                "memory",
                f"{size_text(weights)} parameters + {size_text(gradients)} gradients + {size_text(moments)} optimizer "
                f"= {size_text(weights + gradients + moments)} per rank, before activations",
            ),
        ]

    def __str__(self) -> str:
        return aligned(self.rows())


def make_plan(config: Config, world_size: int, micro_batch_size: int | None = None) -> RunPlan:
    """The plan of `config` on `world_size` ranks.

    Args:
        config: the settings.
        world_size: ranks.
        micro_batch_size: what `batch.micro_batch_size: auto` came to, where that is known.

    Raises:
        RecipeError: a budget that does not divide, or a warm-up longer than the run.
    """
    configured = config.batch.micro_batch_size
    size = micro_batch_size if configured == "auto" else configured
    update = UpdatePlan(
        tokens_per_update=config.batch.tokens_per_update,
        sequence_length=config.data.sequence_length,
        lanes=config.batch.lanes,
        world_size=world_size,
        micro_batch_size=size or 1,
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
        state_bytes=state_bytes(config),
        total_updates=updates,
        planned_updates=min(updates, config.run.max_updates or updates),
        micro_batch_is_auto=size is None,
    )


def world_size_of_launcher() -> int:
    """WORLD_SIZE, which launchers set; 1 without one.

    Raises:
        RecipeError: it is no number of ranks.
    """
    announced = os.environ.get("WORLD_SIZE", "1")
    if not announced.isdigit() or int(announced) < 1:
        raise RecipeError(f"WORLD_SIZE = {announced!r} is no number of ranks: launch with accelerate or torchrun")
    return int(announced)
