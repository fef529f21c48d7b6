"""What a run takes on a device: bytes, time, cost. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.format import duration, percent, short_count, size_text
from recipe.plan.budget import UpdatePlan
from recipe.plan.memory import (
    USABLE_SHARE,
    LossMethod,
    MemoryEstimate,
    choose_loss,
    estimate_memory,
    largest_micro_batch,
    parameter_count,
    rows_at_once,
)


@dataclass(frozen=True)
class Memory:
    """What a rank holds during an update.

    Args:
        precision: `bf16` or `fp32`.
        loss: how it is computed.
        footprints: of `optimizer.state` as it is set, first, and as it might be.
        memory_bytes: of the device; None where none is given.
        largest: blocks of the largest micro-batch that fits, for each of the states; 0 where not one block does.
    """

    precision: str
    loss: LossMethod
    footprints: dict[str, MemoryEstimate]
    memory_bytes: float | None
    largest: dict[str, int]

    def as_dictionary(self) -> dict[str, Any]:
        """For JSON."""
        states = {
            state: {**asdict(of), "state_bytes": of.state_bytes, "peak_bytes": of.peak_bytes}
            | ({"largest_micro_batch": self.largest[state]} if self.largest else {})
            for state, of in self.footprints.items()
        }
        usable = self.memory_bytes and USABLE_SHARE * self.memory_bytes
        return {
            "precision": self.precision,
            "loss": self.loss,
            "memory_bytes": self.memory_bytes,
            "usable_bytes": usable,
            "states": states,
        }


def plan_memory(
    config: Config, micro_batch_size: int, world_size: int, device_type: str, memory_bytes: float | None
) -> Memory:
    """The bytes of micro-batches of `micro_batch_size` blocks, for both states where both are possible.

    Raises:
        RecipeError: the memory is too small for one block.
    """
    precision = planned_precision(config, device_type)
    states: list[Literal["fp32", "bf16"]] = [config.optimizer.state]
    if precision == "bf16" and config.optimizer.name == "adamw":
        states.append("fp32" if config.optimizer.state == "bf16" else "bf16")
    footprints: dict[str, MemoryEstimate] = {}
    largest: dict[str, int] = {}
    for state in states:
        other = replace(config, optimizer=replace(config.optimizer, state=state))
        footprints[state] = estimate_memory(other, micro_batch_size, device_type, precision, world_size)
        if memory_bytes is not None:
            try:
                largest[state] = largest_micro_batch(other, world_size, memory_bytes, device_type, precision)
            except RecipeError:
                if state == config.optimizer.state:
                    raise
                largest[state] = 0
    loss = choose_loss(config.performance.loss, device_type, precision)
    return Memory(precision, loss, footprints, memory_bytes, largest)


def planned_precision(config: Config, device_type: str) -> str:
    """What `precision: auto` comes to: bf16 on a GPU, fp32 on a CPU, whose abilities nobody has asked for yet."""
    if config.precision != "auto":
        return config.precision
    return "fp32" if device_type == "cpu" else "bf16"


@dataclass(frozen=True)
class Time:
    """How long a run takes, and what it costs.

    Args:
        flops: peak FLOP/s of a device.
        mfu: share of it that the model's own arithmetic uses.
        flops_per_token: of the model, forward and backward.
        balance: blocks of the mean share of a rank over those of the largest, for which the others wait.
        tokens: of the run.
        world_size: devices.
        price_per_hour: of a device; None where none is given.
    """

    flops: float
    mfu: float
    flops_per_token: int
    balance: float
    tokens: int
    world_size: int
    price_per_hour: float | None

    @property
    def tokens_per_second(self) -> float:
        """On all devices."""
        return self.mfu * self.flops * self.world_size * self.balance / self.flops_per_token

    @property
    def hours(self) -> float:
        """Of training alone: no evaluation, no checkpoints, no start."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.hours * self.world_size

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_hour is None else self.device_hours * self.price_per_hour

    def as_dictionary(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("tokens_per_second", "hours", "device_hours", "cost")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with its derivation) of each line."""
        wait = f" x {percent(self.balance)}, the largest share being waited for" if self.balance < 1 else ""
        rows = [
            (
                "tokens per second",
                f"{self.mfu:g} MFU (assumed) x {self.flops / 1e12:,.3g} TFLOP/s x {self.world_size} / "
                f"{self.flops_per_token / 1e9:,.3g} GFLOP per token{wait} = {self.tokens_per_second:,.0f}",
            ),
            ("time", f"{self.tokens:,} / {self.tokens_per_second:,.0f} = {duration(self.hours * 3600)}"),
            ("device-hours", f"{self.hours:,.2f} h x {self.world_size} = {self.device_hours:,.2f}"),
        ]
        if self.price_per_hour is not None:
            rows.append(("cost", f"{self.device_hours:,.2f} x {self.price_per_hour:,.2f} = {self.cost:,.2f}"))
        return rows


def memory_rows(memory: Memory, config: Config, update: UpdatePlan) -> list[tuple[str, ...]]:
    """The table of bytes: a header, then (name, a size for each state, how it comes about)."""
    footprints = list(memory.footprints.values())
    of, layers = footprints[0], config.model.n_layer
    parameters = parameter_count(config.model, config.n_positions)
    per_parameter = " or ".join(f"{other.parameters_bytes // parameters}" for other in footprints)
    tokens = update.largest_micro_batch * update.sequence_length
    at_once = rows_at_once(memory.loss, tokens, config.model)
    every = config.performance.activation_checkpointing
    again = f", {'each block' if every == 1 else f'one block in {every}'} again in backward" if every else ""
    copies = ", autocast's copy of weights" if every and memory.precision == "bf16" else ""

    def row(name: str, field: str, derivation: str) -> tuple[str, ...]:
        return name, *(size_text(getattr(other, field)) for other in footprints), derivation

    table = [
        ("", *(f"{state} state" for state in memory.footprints), ""),
        row("parameters", "parameters_bytes", f"{parameters:,} x {per_parameter} bytes"),
        row("gradients", "gradients_bytes", "as many"),
        row("optimizer", "optimizer_bytes", "two moments of each" if of.optimizer_bytes else ""),
        row("= state", "state_bytes", ""),
        row("DDP buckets", "buckets_bytes", "the gradients once more, as they are sent"),
        row(
            "activations",
            "activations_bytes",
            f"{update.largest_micro_batch} x {update.sequence_length:,} tokens x {layers} layers x "
            f"{size_text(of.activations_bytes / tokens / layers)}{again}",
        ),
        row("bf16 weights", "casts_bytes", "autocast's copy of the blocks' matrices"),
        row(
            "logits",
            "logits_bytes",
            f"{memory.loss} loss: {at_once:,} tokens at once x {config.model.vocab_size:,}{copies}",
        ),
        row("= peak", "peak_bytes", _peak_text(of)),
    ]
    empty = {"DDP buckets": not of.buckets_bytes, "bf16 weights": not any(other.casts_bytes for other in footprints)}
    return [line for line in table if not empty.get(line[0])]


def _peak_text(of: MemoryEstimate) -> str:
    """Where the peak is."""
    if of.embedding_bytes > of.early_bytes:
        return f"at the end of backward, with {size_text(of.embedding_bytes)} for the embedding's gradient"
    without = "" if of.accumulates else ", before there are gradients"
    if of.backward_bytes > of.logits_bytes:
        return f"in the last block's backward, with {size_text(of.backward_bytes)} instead of the logits{without}"
    return f"in the loss{without}"


def classic_bytes(parameters: int) -> dict[str, float]:
    """The table that everybody knows: all in 16 bits, of a number of parameters rounded as in the model's name."""
    rounded = float(f"{parameters:.2g}")
    return {"parameters": 2 * rounded, "moments": 4 * rounded, "gradients": 2 * rounded}


def classic_rows(parameters: int, of: MemoryEstimate) -> list[tuple[str, str]]:
    """The classic table, and what this run has instead."""
    here = {"parameters": of.parameters_bytes, "moments": of.optimizer_bytes, "gradients": of.gradients_bytes}

    def in_words(parts: dict[str, float]) -> str:
        return f"{' + '.join(f'{size_text(v)} {k}' for k, v in parts.items())} = {size_text(sum(parts.values()))}"

    classic = classic_bytes(parameters)
    rounded = short_count(classic["parameters"] / 2)
    return [("all in 16 bits", f"{in_words(classic)} for {rounded}"), ("this run", in_words({**here}))]


def fit_rows(memory: Memory, largest_share: int) -> list[tuple[str, str]]:
    """Whether the micro-batch fits into the device, and the largest that does; nothing where no device is given."""
    if memory.memory_bytes is None:
        return []
    peak, usable = next(iter(memory.footprints.values())).peak_bytes, USABLE_SHARE * memory.memory_bytes
    largest = [
        (f"{size} block{'s' * (size > 1)}" if size else "none") + f" with {state} state"
        for state, size in memory.largest.items()
    ]
    return [
        (
            "memory",
            f"{100 * USABLE_SHARE:.0f} % of {size_text(memory.memory_bytes)} = {size_text(usable)}; "
            f"{size_text(peak)} {'fit' if peak <= usable else 'DO NOT FIT'}",
        ),
        ("largest micro-batch", f"{', '.join(largest)}, of a rank's {largest_share}"),
    ]
