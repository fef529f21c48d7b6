"""The plan of a run: every derived number, with its derivation. Imports no torch."""

import os
from dataclasses import dataclass, replace

from recipe.config.settings import Config, ModelConfig
from recipe.errors import RecipeError
from recipe.format import Number, aligned, percent, short_count, size_text
from recipe.plan.budget import UpdatePlan
from recipe.plan.memory import (
    USABLE_SHARE,
    largest_micro_batch,
    largest_update,
    parameter_count,
    ranks_with_parts,
    rows_per_chunk,
    state_bytes,
)
from recipe.plan.phases import Phase, make_phases, phase_at, tokens_after, updates_for
from recipe.plan.schedule import decay_start, stated_tokens


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a configuration and a number of ranks."""

    phases: tuple[Phase, ...]  # in micro-batches of one block while `micro_batch_is_auto`
    parameters: int
    flops_per_token: int  # forward and backward
    state_bytes: tuple[int, int, int]  # of (parameters, gradients, optimizer) on a rank
    total_updates: int  # over which the schedules stretch
    planned_updates: int  # after which the run stops
    micro_batch_is_auto: bool = False  # and its size not known yet

    @property
    def update(self) -> UpdatePlan:
        """The division of the first update. Ranks, lanes and micro-batch are those of all; for its size see `update_at`."""
        return self.phases[0].update

    @property
    def reached_phases(self) -> tuple[Phase, ...]:
        """Those of which the whole run has an update."""
        return tuple(phase for phase in self.phases if phase.first_update <= self.total_updates)

    @property
    def total_tokens(self) -> int:
        """Target tokens of the whole run, over which the schedules stretch."""
        return self.tokens_after(self.total_updates)

    def phase_at(self, update: int) -> Phase:
        """The phase of an update, from 1."""
        return phase_at(self.phases, update)

    def update_at(self, update: int) -> UpdatePlan:
        """The division of an update, from 1."""
        return self.phase_at(update).update

    def tokens_after(self, update: int) -> int:
        """Target tokens seen when so many updates are done."""
        return tokens_after(self.phases, update)

    def with_micro_batch_size(self, size: int) -> "RunPlan":
        """The same updates in other micro-batches."""
        phases = [replace(phase, update=replace(phase.update, micro_batch_size=size)) for phase in self.phases]
        return replace(self, phases=tuple(phases), micro_batch_is_auto=False)

    def numbers(self) -> list[Number]:
        """The division of an update, the length of the run, and the state of a rank."""
        update, tokens, length = self.update, self.update.tokens_per_update, self.update.sequence_length
        shares = sorted({share // update.blocks_per_lane for share in (update.smallest_share, update.largest_share)})
        known = not self.micro_batch_is_auto
        size, steps = (update.micro_batch_size, update.gradient_accumulation_steps) if known else (None, None)
        micro_batch = f"{{}} x {length:,} tokens at most" if known else "auto: as many blocks as fit into memory"
        division = update.division if known else f"1 to {update.largest_share}"
        ratio = f"{{}} = {self.total_tokens / self.parameters:.1f} per parameter"
        reached = self.reached_phases
        until = f"{{}}, until update {reached[1].first_update - 1:,}" if len(reached) > 1 else "{}"
        ends = [*(phase.tokens_before for phase in reached[1:]), self.total_tokens]
        sizes = [
            f"{end - phase.tokens_before:,} / {phase.update.tokens_per_update:,}"
            for phase, end in zip(reached, ends, strict=True)
        ]
        stops = f", stops after update {self.planned_updates:,}" if self.planned_updates < self.total_updates else ""
        return [
            Number("tokens_per_update", tokens, "tokens", until),
            *(self._phase_number(number) for number in range(1, len(self.phases))),
            Number("blocks_per_update", update.blocks_per_update, "blocks", f"{tokens:,} / {length:,} = {{}}"),
            Number("lanes", update.lanes, "lanes", f"{{}}, {update.blocks_per_lane} blocks of each in an update"),
            Number("world_size", update.world_size, "ranks", f"{{}}, {' to '.join(map(str, shares))} lanes each"),
            Number("micro_batch_size", size, "blocks", micro_batch),
            Number("gradient_accumulation_steps", steps, "micro-batches", division),
            Number("parameters", self.parameters, "parameters"),
            Number("total_tokens", self.total_tokens, "tokens", ratio),
            Number("updates", self.total_updates, "updates", f"{' + '.join(sizes)} = {{}}{stops}"),
            state_number("state_bytes", self.state_bytes, " per rank, before activations"),
        ]

    def _phase_number(self, number: int) -> Number:
        phase, known = self.phases[number], not self.micro_batch_is_auto
        update = phase.update
        begins = f"from update {phase.first_update:,} ({phase.tokens_before:,} tokens) on"
        if phase not in self.reached_phases:
            begins += ", which is not reached"
        steps = f", {update.gradient_accumulation_steps} accumulation steps" if known else ""
        beta2 = f", beta2 {phase.beta2:.6g}" if phase.beta2 is not None else ""
        text = (
            f"{{}} {begins}: {update.blocks_per_lane} blocks of each lane{steps}, rate x {phase.rate_factor:.3g}{beta2}"
        )
        return Number(f"phase_{number + 1}", update.tokens_per_update, "tokens", text)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with its derivation) of each line of the table."""
        return [(number.name, str(number)) for number in self.numbers()]

    def __str__(self) -> str:
        return aligned(self.rows())


def make_plan(config: Config, world_size: int, micro_batch_size: int | None = None) -> RunPlan:
    """The plan of `config` on `world_size` ranks; `micro_batch_size` is what `batch.micro_batch_size: auto` came to.

    Raises:
        RecipeError: a budget that does not divide, or a warm-up longer than the run.
    """
    batch, length = config.batch, config.data.sequence_length
    size = micro_batch_size if batch.micro_batch_size == "auto" else batch.micro_batch_size
    phases = make_phases(config, world_size, size or 1)
    parameters = parameter_count(config.model, config.n_positions)
    updates = updates_for(phases, stated_tokens(config.schedule, parameters))
    total = tokens_after(phases, updates)
    if config.schedule.warmup_tokens >= total:
        raise RecipeError(
            f"schedule.warmup_tokens = {config.schedule.warmup_tokens:,} leaves nothing of the run's "
            f"{total:,} tokens: set --schedule.warmup_tokens to less, or a longer run"
        )
    if decay_start(total, config.schedule) < config.schedule.warmup_tokens:
        decay = total - decay_start(total, config.schedule)
        raise RecipeError(
            f"schedule.warmup_tokens = {config.schedule.warmup_tokens:,} and a decay of {decay:,} tokens "
            f"(schedule.decay_tokens; null is a fifth) do not fit into the run's {total:,} tokens: set one of them to less, or "
            "a longer run"
        )
    return RunPlan(
        phases=phases,
        parameters=parameters,
        flops_per_token=flops_per_token(config.model, length),
        state_bytes=state_bytes(config, ranks_with_parts(config, world_size)),
        total_updates=updates,
        planned_updates=min(updates, config.run.max_updates or updates),
        micro_batch_is_auto=size is None,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Forward and backward FLOPs of one target token: 6 N + 12 L d T (Chowdhery et al., 2022, appendix B).

    N leaves out the position embeddings, which are only added, as nanoGPT does; the token embedding is the output layer too.
    """
    return 6 * parameter_count(model, n_positions=0) + 12 * model.n_layer * model.n_embd * sequence_length


def world_size_of_launcher() -> int:
    """WORLD_SIZE, which launchers set; 1 without one.

    Raises:
        RecipeError: it is no number of ranks.
    """
    announced = os.environ.get("WORLD_SIZE", "1")
    if not announced.isdigit() or int(announced) < 1:
        raise RecipeError(f"WORLD_SIZE = {announced!r} is no number of ranks: launch with accelerate or torchrun")
    return int(announced)


def state_number(key: str, sizes: tuple[float, float, float], note: str) -> Number:
    """Bytes of (parameters, gradients, optimizer), with their sum."""
    parts = zip(sizes, ("parameters", "gradients", "optimizer"), strict=True)
    return Number(key, sum(sizes), "bytes", f"{' + '.join(f'{size_text(b)} {part}' for b, part in parts)} = {{}}{note}")


def classic_number(parameters: int) -> Number:
    """The table that everybody knows: all in 16 bits, of a number of parameters rounded as in the model's name."""
    rounded = float(f"{parameters:.2g}")
    return state_number("all_in_16_bits", (2 * rounded, 2 * rounded, 4 * rounded), f" for {short_count(rounded)}")


def planned_precision(config: Config, device_type: str) -> str:
    """What `precision: auto` comes to, as far as a plan can know: bf16 on a GPU, fp32 on a CPU."""
    if config.precision != "auto":
        return config.precision
    return "fp32" if device_type == "cpu" else "bf16"


def memory_numbers(config: Config, update: UpdatePlan, device_type: str, memory_bytes: float | None) -> list[Number]:
    """What a rank holds during an update, and the largest micro-batch for `memory_bytes`: 0 if not one block fits."""
    model, every = config.model, config.performance.activation_checkpointing
    is_muon = config.optimizer.name == "muon"
    precision = planned_precision(config, device_type)
    update, estimate = largest_update(config, update.micro_batch_size, device_type, precision, update.world_size)
    size, length = update.largest_micro_batch, update.sequence_length
    per_token = size_text(estimate.activations_bytes / (size * length) / model.n_layer)
    again = f", {'each block' if every == 1 else f'one block in {every}'} again in backward" if every else ""
    rows = min(size * length, rows_per_chunk(device_type))
    copies = ", and autocast's copy of weights" if every and precision == "bf16" else ""
    peak = "in the last block's backward" if estimate.backward_bytes > estimate.logits_bytes else "in the loss"
    peak += "" if estimate.accumulates else ", before there are gradients"
    texts = {
        "parameters_bytes": f"{parameter_count(model, config.n_positions):,} x 4 bytes, or 2 in bf16",
        "gradients_bytes": "as many",
        "optimizer_bytes": "two moments of each" + (", one of the blocks' matrices" if is_muon else ""),
        "state_bytes": "the sum of these",
        "buckets_bytes": "the gradients once more, as DDP sends them",
        "gathered_bytes": "parameters that are whole while they are computed with: the embedding, and two blocks",
        "reduced_bytes": "a block's gradients, whole, on their way to the ranks",
        "activations_bytes": f"{size} x {length:,} tokens x {model.n_layer} layers x {per_token}{again}",
        "casts_bytes": "autocast's bf16 copy of the blocks' matrices",
        "logits_bytes": f"{rows:,} tokens at once x {model.vocab_size:,}{copies}",
        "backward_bytes": "of the last block, in place of the logits",
        "embedding_bytes": "its gradient at the end of backward, when the activations are gone",
        "step_bytes": "Muon's matrix products, when the activations are gone",
        "workspaces_bytes": "cuBLAS's, of forward and of backward",
        "peak_bytes": "at the end of backward" if estimate.embedding_bytes > estimate.early_bytes else peak,
    }
    numbers = [Number(key, getattr(estimate, key), "bytes", text) for key, text in texts.items()]
    largest, text = None, "give --device h100, or another one, or --memory_gb"
    if memory_bytes is not None:
        usable, share = USABLE_SHARE * memory_bytes, f"{100 * USABLE_SHARE:.0f} % of {size_text(memory_bytes)}"
        verdict = "fits" if estimate.peak_bytes <= usable else "DOES NOT FIT"
        numbers.append(Number("usable_bytes", usable, "bytes", f"{share}: the peak {verdict}"))
        try:
            largest = largest_micro_batch(config, update.world_size, memory_bytes, device_type, precision)
        except RecipeError:
            largest = 0
        text = f"blocks that fit, of a rank's {update.largest_share}"
    return [*numbers, Number("largest_micro_batch", largest, "blocks", text)]


def time_numbers(plan: RunPlan, flops: float | None, mfu: float, price_per_hour: float | None) -> list[Number]:
    """How long the updates of a run take at a share `mfu` of a peak of `flops` FLOP/s per device, and what they cost."""
    work = Number("flops_per_token", plan.flops_per_token, "FLOP", "6 N + 12 L d T = {}, N without position embeddings")
    if flops is None:
        text = "give --flops, or a --device whose peak in this precision is known"
        return [work, Number("hours", None, "hours", text)]
    update, ranks = plan.update, plan.update.world_size
    speed = mfu * flops * ranks * update.busy_share / plan.flops_per_token
    tokens = plan.tokens_after(plan.planned_updates)
    hours = tokens / speed / 3600
    cost = None if price_per_hour is None else hours * ranks * price_per_hour
    rate = f"{mfu:g} MFU (assumed) x {flops / 1e12:,.3g} TFLOP/s x {ranks} / {plan.flops_per_token / 1e9:,.3g} GFLOP per token"
    wait = f" x {percent(update.busy_share)}, as ranks wait for the largest share" if update.busy_share < 1 else ""
    price = "give --price_per_hour" if cost is None else f"{hours * ranks:,.2f} x {price_per_hour:,.2f} = {{}}"
    return [
        work,
        Number("tokens_per_second", speed, "tokens/s", f"{rate}{wait} = {{}}"),
        Number("hours", hours, "hours", f"{tokens:,} / {speed:,.0f} = {{}}"),
        Number("device_hours", hours * ranks, "device-hours", f"{hours:,.2f} h x {ranks} = {{}}"),
        Number("cost", cost, "money", price),
    ]
