"""One update: the gradient of `tokens_per_update` targets by either of two paths, clipped once, stepped once.

The loss of an update is (sum of token losses over all micro-batches and ranks) / (unmasked targets over all of them). DDP
averages gradients over ranks, and `accelerator.backward` divides by the accumulation steps, always. So the sum of a
micro-batch is scaled by ranks / targets where we call `backward` ourselves, and by steps x ranks / targets where accelerate
does:

    accelerate: sum_ranks sum_steps [loss_sum x steps x ranks / targets] / steps / ranks = sum(loss_sum) / targets
    manual:     sum_ranks sum_steps [loss_sum x ranks / targets] / ranks                 = sum(loss_sum) / targets
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipe.errors import RecipeError
from recipe.model.loss import IGNORED_TARGET
from recipe.run.stop import StopRequest

Scaling = Literal["accumulate", "manual"]
MicroBatch = tuple[Tensor, Tensor]  # inputs and targets, int64 [rows, sequence_length], on the model's device


@dataclass(frozen=True)
class UpdateResult:
    """Statistics of one update over all ranks; 0-d tensors on the device, so that reading them is the caller's choice.

    Args:
        loss: mean over the update's unmasked targets, in nats per token, float64.
        grad_norm: 2-norm of the whole gradient before clipping.
        target_tokens: unmasked targets.
        is_finite: whether loss and gradient are; the optimizer has stepped only then.
    """

    loss: Tensor
    grad_norm: Tensor
    target_tokens: Tensor
    is_finite: bool = True


def run_update(
    model: nn.Module,
    optimizer: Any,
    micro_batches: Sequence[MicroBatch],
    *,
    accelerator: Any,
    scaling: Scaling,
    max_grad_norm: float | None,
    target_tokens: int | None = None,
    stop: StopRequest | None = None,
) -> UpdateResult | None:
    """Accumulate the gradient of all micro-batches on all ranks, clip it once, and step the optimizer once.

    Where the loss or the gradient is not finite, on any rank, no rank steps: parameters and optimizer stay bit for bit.

    Args:
        model: prepared; called as `model(inputs, targets)`, gives the summed token loss.
        optimizer: prepared.
        micro_batches: this rank's; the same number on every rank.
        accelerator: its accumulation steps are set here, since they may change between updates.
        scaling: which of the two paths scales the loss.
        max_grad_norm: None for no clipping.
        target_tokens: unmasked targets of the update over all ranks where known in advance, else None: they are counted,
            at the cost of one integer all-reduce.
        stop: looked at between micro-batches.

    Returns: the statistics, or None where a rank was asked to stop or ran out of memory: the open update is then abandoned on
    all ranks, and can be run again.
    """
    accumulated = accumulate_gradient(
        model, micro_batches, accelerator=accelerator, scaling=scaling, target_tokens=target_tokens, stop=stop
    )
    if accumulated is None:
        model.zero_grad(
            set_to_none=True
        )  # the prepared optimizer's zero_grad does nothing in the middle of an accumulation
        return None
    loss, targets = accumulated
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf")).detach()
    is_finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))  # both are those of all ranks, so all agree
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return UpdateResult(loss=loss, grad_norm=grad_norm, target_tokens=targets, is_finite=is_finite)


def accumulate_gradient(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    accelerator: Any,
    scaling: Scaling,
    target_tokens: int | None = None,
    stop: StopRequest | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Leave the gradient of the update's loss in `.grad` of every parameter, the same on all ranks.

    Arguments as in `run_update`. Returns: (loss of the update, float64 0-d; its unmasked targets, int64 0-d), or None where
    a rank was asked to stop or ran out of memory.

    Raises:
        RecipeError: out of memory while the ranks add up their gradients: it is too late to agree then.
    """
    targets = _count_targets(micro_batches, accelerator, target_tokens)
    path = _accumulate_path if scaling == "accumulate" else _manual_path
    agreements = stop.agreements if stop else 0
    try:
        loss_sum = path(model, micro_batches, accelerator, targets, stop)
    except RuntimeError as error:
        if stop is None or not is_out_of_memory(error):
            raise
        has_agreed = stop.agreements > agreements
        if has_agreed and accelerator.num_processes > 1:
            raise RecipeError(
                f"rank {accelerator.process_index} ran out of memory while the ranks added up their gradients: the same "
                "command goes on from the last checkpoint; give it a smaller --batch.micro_batch_size",
                on_this_rank_only=True,
            ) from None
        stop.rank_out_of_memory = accelerator.process_index + 1
        if not has_agreed:
            stop.should_stop()
        return None
    return None if loss_sum is None else (accelerator.reduce(loss_sum, reduction="sum") / targets, targets)


def _abandoned(stop: StopRequest | None, is_last: bool) -> bool:
    """Whether to abandon the update before this micro-batch.

    Ranks agree once per update: before the last micro-batch, in which they wait for each other anyway, or, on a rank that
    was asked to stop, at once: it then waits there for the others to come to theirs.
    """
    return stop is not None and (is_last or stop.signal > 0) and stop.should_stop()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator has failed, of a GPU or of the CPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _count_targets(micro_batches: Sequence[MicroBatch], accelerator: Any, known: int | None) -> Tensor:
    device = micro_batches[0][1].device
    if known is not None:
        return torch.full((), known, device=device)  # torch.tensor would wait for the device
    counts = [(targets != IGNORED_TARGET).sum() for _, targets in micro_batches]
    return accelerator.reduce(torch.stack(counts).sum(), reduction="sum").clamp(min=1)


def _accumulate_path(
    model: nn.Module, micro_batches: Sequence[MicroBatch], accelerator: Any, targets: Tensor, stop: StopRequest | None
) -> Tensor | None:
    """Accelerate decides when to reduce over ranks, and divides by the steps."""
    steps = len(micro_batches)
    accelerator.gradient_accumulation_steps = steps
    accelerator.step = 0  # a counter left by another number of steps would cut this update short
    scale = steps * accelerator.num_processes / targets.to(_sum_dtype(targets.device))
    loss_sum = torch.zeros_like(scale)
    for step, (inputs, labels) in enumerate(micro_batches, start=1):
        if _abandoned(stop, is_last=step == steps):
            return None
        with accelerator.accumulate(model):
            loss = model(inputs, labels)
            accelerator.backward(loss * scale)
            loss_sum += loss.detach()
    return loss_sum


def _manual_path(
    model: nn.Module, micro_batches: Sequence[MicroBatch], accelerator: Any, targets: Tensor, stop: StopRequest | None
) -> Tensor | None:
    """The reference: scale by hand, plain `backward()`, reduce over ranks with the last micro-batch only."""
    if accelerator.scaler is not None or not accelerator.sync_gradients:
        raise RecipeError("batch.scaling = manual needs precision bf16 or fp32, and an update that starts from zero")
    scale = accelerator.num_processes / targets.to(_sum_dtype(targets.device))
    loss_sum = torch.zeros_like(scale)
    for step, (inputs, labels) in enumerate(micro_batches, start=1):
        if _abandoned(stop, is_last=step == len(micro_batches)):
            return None
        with nullcontext() if step == len(micro_batches) else accelerator.no_sync(model):
            loss = model(inputs, labels)
            (loss * scale).backward()
            loss_sum += loss.detach()
    return loss_sum


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Where losses are added up and scaled: float64, so that thousands of micro-batches lose nothing; MPS has only float32."""
    return torch.float32 if device.type == "mps" else torch.float64
