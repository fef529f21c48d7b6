"""One way to compute the update on this device: the recipe's own training with the settings of a row, and its measurements.

An update of 524,288 tokens takes eight seconds and more, so most trials run some of its micro-batches and one optimizer step,
timed apart: the seconds of an update are micro-batches x their mean + step. `whole_updates` runs the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import synchronize, use_attention
from benchmarks.results import timed
from benchmarks.training import Training
from recipe.config.settings import Config
from recipe.data.blocks import split_into_micro_batches
from recipe.model import set_learning_rate
from recipe.model.kernels import compile_model
from recipe.model.sharding import shard, whole
from recipe.plan.memory import estimate_memory
from recipe.step.metrics import peak_memory_bytes
from recipe.step.update import accumulate_gradient, clip_and_step

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One combination to measure.

    Args:
        name: of the row.
        settings: what is set otherwise than in the row that it starts from.
        on_best: start from the fastest row so far that the recipe can be set to; else from the preset.
        factor: micro-batches this many times as large.
        attention: the only kernel that attention may use; None: torch chooses. Not a setting of the recipe.
        is_candidate: whether later rows may start from it.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_best: bool = True
    factor: int = 1
    attention: str | None = None
    is_candidate: bool = True


class Trial(Training):
    """A training of `config` on the device, for a tokenizer of `vocabulary` tokens, with the kernel of attention of a row.

    Raises:
        RecipeError: the device has no such kernel, or an optional extra is not installed.
    """

    def __init__(self, config: Config, vocabulary: int, row: Row) -> None:
        super().__init__(config, vocabulary)
        self.device = self.run.device
        use_attention(row.attention)
        if config.performance.compile and self.device.type == "cpu":
            compile_model(self.model, backend="aot_eager")  # to generate code takes minutes on a small CPU
        set_learning_rate(self.run, self.optimizer, 1)
        self.steps = split_into_micro_batches(self.first_blocks().batch, self.run.plan.update, rank=0)
        self.loss = torch.zeros(())

    def prepared(self, model: Any) -> Any:
        """Cut as FSDP2 cuts it, if a row says so, over one rank: what its hooks, copies and calls cost, without a network."""
        model = super().prepared(model)
        if self.run.config.performance.sharding == "none":
            return model
        if not torch.distributed.is_initialized():
            backend = "nccl" if self.run.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        return shard(model, torch.distributed.init_device_mesh(self.run.device.type, (1,)))

    def accumulate(self, micro_batches: int) -> Tensor:
        """Leave the gradient of the first micro-batches' mean loss in `.grad`; returns that loss, 0-d, on the device."""
        some = self.steps[:micro_batches]
        self.loss, _ = accumulate_gradient(self.run, self.model, some, sum(targets.numel() for _, targets in some))
        return self.loss

    def step(self) -> Tensor:
        """Clip and step after `accumulate`; returns the norm before clipping."""
        return clip_and_step(self.run, self.model, self.optimizer, self.loss)[0]

    def fingerprint(self) -> dict[str, Tensor]:
        """The loss, and gradients of what makes queries, keys and values in the first, middle and last block, on the CPU.

        At initialisation the loss hardly depends on attention, and neither do the gradients of biases; these do.
        """
        blocks = self.model.gpt2.transformer.h
        chosen = [whole(blocks[number].attn.c_attn.weight.grad) for number in {0, len(blocks) // 2, len(blocks) - 1}]
        parts = [torch.cat(part).float().cpu() for part in zip(*(g.chunk(3, dim=-1) for g in chosen), strict=True)]
        return {"loss": self.loss.cpu(), **dict(zip(("query", "key", "value"), parts, strict=True))}

    def measure(self, check_blocks: int, seconds: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Loss and gradient of the first `check_blocks` blocks with the initial weights, then times and memory.

        Args:
            check_blocks: a whole number of micro-batches.
            seconds: to measure for, about.

        Returns: (JSON values, fingerprint before the first step).
        """
        size, steps = self.run.plan.update.micro_batch_size, len(self.steps)
        first_seconds = self._timed(partial(self.accumulate, check_blocks // size))
        fingerprint, first_norm = self.fingerprint(), self.step()
        one_seconds = self._timed(partial(self.accumulate, 1))
        self._timed(self.step)
        # Two at least, if an update has them: the gradient of the first is there in the second, as in a training.
        count = min(steps, max(2, round(seconds / REPEATS / one_seconds)))
        micro_batch_seconds, step_seconds = [], []
        for _ in range(REPEATS):
            micro_batch_seconds.append(self._timed(partial(self.accumulate, count)) / count)
            step_seconds.append(self._timed(self.step))
        planned = estimate_memory(self.run.config, size, self.device.type, self.run.precision)
        values = {
            "first_loss": fingerprint["loss"].item(),
            "first_grad_norm": first_norm.item(),
            "first_seconds": first_seconds,  # compilation and the choice of algorithms included
            "micro_batch_seconds": micro_batch_seconds,
            "micro_batches_per_repeat": count,
            "step_seconds": step_seconds,
            "micro_batches_per_update": steps,
            **self.speed(median(micro_batch_seconds) * steps + median(step_seconds)),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "planned_memory_bytes": planned.peak_bytes,
        }
        if self.device.type == "cuda":
            # What the allocator took, and how often it had to give back before that sufficed.
            values["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            values["allocation_retries"] = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        return values, fingerprint

    def whole_updates(self, count: int) -> list[dict[str, Any]]:
        """Whole updates, as the training does them."""
        done = []
        for _ in range(count):
            entry = self.update()[1]
            assert entry.update_seconds is not None
            names = ("loss", "grad_norm", "micro_batch_size", "data_wait_seconds", "is_finite")
            done.append({name: getattr(entry, name) for name in names} | self.speed(entry.update_seconds))
        self.reader.close()
        return done

    def speed(self, update_seconds: float) -> dict[str, float]:
        """Tokens per second and FLOP/s of an update that takes so long."""
        tokens_per_second = self.run.plan.update.tokens_per_update / update_seconds
        flops = self.run.plan.flops_per_token * tokens_per_second
        return {"update_seconds": update_seconds, "tokens_per_second": tokens_per_second, "flops_per_second": flops}

    def _timed(self, action: Callable[[], object]) -> float:
        def whole() -> None:
            action()
            synchronize(self.device)

        synchronize(self.device)
        return timed(whole)
