"""One way to compute the update on this device: built from settings as `recipe/train.py` builds it, and measured.

An update of 524,288 tokens takes eight seconds and more, so most trials run some of its micro-batches and one optimizer step,
timed apart: the seconds of an update are micro-batches x their mean + step. `whole_updates` runs the real thing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from recipe.run.launch import start_accelerator
from torch import Tensor

from recipe.config.checks import validate
from recipe.config.settings import Config, value_of
from recipe.data.blocks import split_into_micro_batches, to_tensors
from recipe.errors import RecipeError
from recipe.model.gpt2 import build_gpt2, build_optimizer, set_learning_rate
from recipe.model.kernels import compile_model, set_kernels
from recipe.plan.memory import choose_loss, estimate_memory
from recipe.plan.run_plan import make_plan
from recipe.plan.schedule import learning_rate
from recipe.run.ledger import peak_memory_bytes
from recipe.step.update import MicroBatch, accumulate_gradient, run_update

REPEATS = 3


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """`config` with other values: `{"performance.compile": True}`, or as nested as a preset's YAML is."""
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        old = getattr(config, section)
        if rest:
            value = with_settings(old, {rest: value})
        elif is_dataclass(old) and not isinstance(old, type):
            value = with_settings(old, value)
        elif isinstance(old, float):
            value = float(value)  # YAML takes 2e-4 for text
        config = replace(config, **{section: value})
    return config


def read_preset(path: str) -> Config:
    """A preset without the command line's parser. A key that is no setting is a TypeError or AttributeError."""
    import yaml

    with open(path, encoding="utf-8") as file:
        return with_settings(Config(), yaml.safe_load(file))


def differences(config: Config, preset: Config) -> dict[str, Any]:
    """Dotted names of what is not as in the preset, with their values."""
    found: dict[str, Any] = {}
    for section in fields(config):
        ours, theirs = getattr(config, section.name), getattr(preset, section.name)
        names = [f"{section.name}.{f.name}" for f in fields(ours)] if is_dataclass(ours) else [section.name]
        if ours != theirs:
            found |= {n: value_of(config, n) for n in names if value_of(config, n) != value_of(preset, n)}
    return found


def synthetic_batch(config: Config, vocabulary: int, device: torch.device) -> MicroBatch:
    """Blocks of one update on the device. Tokens are drawn independently, by Zipf's law, as words of a text are frequent."""
    chances = 1 / (np.arange(vocabulary) + 2.7)
    rows, length = config.batch.tokens_per_update // config.data.sequence_length, config.data.sequence_length
    draw = np.random.default_rng(config.run.seed)
    tokens = draw.choice(vocabulary, size=(rows, length + 1), p=chances / chances.sum())
    return to_tensors(tokens.astype(np.int32), device)


def fresh_accelerator(config: Config) -> Any:
    """An Accelerator whose precision is that of `config`, whatever an earlier one of this process had."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    return start_accelerator(config, config.precision)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, also compiled code, and count the peak anew."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after a kernel that failed for good there is nothing to free
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.reset_accumulated_memory_stats(device)


class Trial:
    """Model and optimizer of `config`, on the device and prepared, with an update's micro-batches.

    Args:
        config: the settings; `performance.compile` compiles the whole model, as the recipe does.
        vocabulary: tokens of the tokenizer that it would have.
        batch: the blocks of one update, on the device: inputs and targets, int64 [blocks, tokens].
        by_block: compile each transformer block by itself; all of them then share one graph. Not a setting of the recipe.
        compile_options: of `torch.compile`.

    Raises:
        RecipeError: a kernel that the device has not, or what an optional extra installs is not there.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: int,
        batch: MicroBatch,
        *,
        by_block: bool = False,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        validate(config)
        self.config, self.plan = config, make_plan(config, world_size=1)
        self.device = batch[0].device
        self.accelerator = fresh_accelerator(config)
        set_kernels(config, self.device, config.precision)
        requested = config.performance.loss
        # One that is named is measured, also where the recipe would advise against it.
        loss: Any = choose_loss(requested, self.device.type, config.precision) if requested == "auto" else requested
        with self.device:  # initialised there: a CPU needs ten seconds for 1.3 billion normal numbers
            model: Any = build_gpt2(config, vocabulary, vocabulary - 1, loss=loss)
        if config.performance.compile is True:
            compile_model(model, **(compile_options or {}))
        if by_block:
            for block in model.gpt2.transformer.h:
                block.compile(dynamic=False, fullgraph=True, **(compile_options or {}))
        optimizer = build_optimizer(model, config.optimizer, config.run.seed)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        tokens = config.batch.tokens_per_update
        set_learning_rate(
            self.optimizer, learning_rate(tokens, self.plan.total_tokens, config.optimizer, config.schedule)
        )
        self.micro_batches = split_into_micro_batches(batch, self.plan.update, rank=0)
        self.model.train()

    def accumulate(self, micro_batches: int) -> Tensor:
        """Leave the gradient of the first micro-batches' mean loss in `.grad`; returns that loss, 0-d, on the device."""
        some = self.micro_batches[:micro_batches]
        accumulated = accumulate_gradient(
            self.model,
            some,
            accelerator=self.accelerator,
            scaling="accumulate",
            target_tokens=sum(targets.numel() for _, targets in some),
        )
        assert accumulated is not None  # nobody asks to stop
        return accumulated[0]

    def step(self) -> Tensor:
        """Clip, look whether the gradient is finite, step: what `run_update` does behind `accumulate_gradient`."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def fingerprint(self) -> dict[str, Tensor]:
        """Gradients of what makes queries, keys and values in the first, middle and last block: float32, on the CPU.

        At initialisation the loss hardly depends on attention, and neither do the gradients of biases; these do.
        """
        blocks = self.model.gpt2.transformer.h
        chosen = [blocks[number].attn.c_attn.weight.grad for number in {0, len(blocks) // 2, len(blocks) - 1}]
        parts = [torch.cat(part).float().cpu() for part in zip(*(g.chunk(3, dim=-1) for g in chosen), strict=True)]
        return dict(zip(("query", "key", "value"), parts, strict=True))

    def measure(self, check_blocks: int, seconds: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Loss and gradient of the first `check_blocks` blocks with the initial weights, then times and memory.

        Args:
            check_blocks: a whole number of micro-batches.
            seconds: to measure for, about.

        Returns: (JSON values, fingerprint of that first gradient).
        """
        first_seconds, loss = self._timed(partial(self.accumulate, check_blocks // self._rows))
        fingerprint = self.fingerprint()
        first_norm = self.step()
        one_seconds, _ = self._timed(partial(self.accumulate, 1))
        self._timed(self.step)
        steps = len(self.micro_batches)
        count = max(1, min(steps, round(seconds / REPEATS / one_seconds)))
        micro_batch_seconds, step_seconds = [], []
        for _ in range(REPEATS):
            micro_batch_seconds.append(self._timed(partial(self.accumulate, count))[0] / count)
            step_seconds.append(self._timed(self.step)[0])
        update_seconds = median(micro_batch_seconds) * steps + median(step_seconds)
        values = {
            "first_loss": loss.item(),
            "first_grad_norm": first_norm.item(),
            "first_seconds": first_seconds,  # compilation and the choice of algorithms included
            "micro_batch_seconds": micro_batch_seconds,
            "micro_batches_per_repeat": count,
            "update_seconds": update_seconds,
            "micro_batches_per_update": steps,
            **self.speed(update_seconds),
            **self.memory(),
        }
        return values, fingerprint

    def whole_updates(self, updates: int) -> list[dict[str, Any]]:
        """Run whole updates as the training does, all of the same blocks."""
        done = []
        for _ in range(updates):
            seconds, result = self._timed(
                partial(
                    run_update,
                    self.model,
                    self.optimizer,
                    self.micro_batches,
                    accelerator=self.accelerator,
                    scaling=self.config.batch.scaling,
                    max_grad_norm=self.config.optimizer.max_grad_norm,
                    target_tokens=self.config.batch.tokens_per_update,
                )
            )
            values = {"loss": result.loss.item(), "grad_norm": result.grad_norm.item(), "is_finite": result.is_finite}
            done.append(values | self.speed(seconds))
        return done

    def speed(self, update_seconds: float) -> dict[str, float]:
        """Tokens per second and FLOP/s of an update that takes so long."""
        tokens_per_second = self.config.batch.tokens_per_update / update_seconds
        flops = self.plan.flops_per_token * tokens_per_second
        return {"update_seconds": update_seconds, "tokens_per_second": tokens_per_second, "flops_per_second": flops}

    def memory(self) -> dict[str, int | None]:
        """Bytes at the peak, and as planned; on CUDA what the allocator took, and how often it had to give back first."""
        peak: dict[str, int | None] = {
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "planned_memory_bytes": None,
        }
        with suppress(RecipeError):  # a loss that the recipe would not take
            planned = estimate_memory(self.config, self._rows, self.device.type, self.config.precision)
            peak["planned_memory_bytes"] = planned.peak_bytes
        if self.device.type == "cuda":
            peak["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            peak["allocation_retries"] = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        return peak

    @property
    def _rows(self) -> int:
        return len(self.micro_batches[0][0])

    def _timed(self, action: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        started = time.perf_counter()
        result = action()
        synchronize(self.device)
        return time.perf_counter() - started, result
