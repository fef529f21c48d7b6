"""One update: the gradient of `tokens_per_update` targets by either of two paths, clipped once, stepped once.

The loss of an update is (sum of token losses over all micro-batches and ranks) / (unmasked targets over all of them). DDP
averages gradients over ranks, and `accelerator.backward` divides by the accumulation steps, always. So the sum of a
micro-batch is scaled by ranks / targets if we call `backward` ourselves, and by steps x ranks / targets if accelerate does:

    accumulate: sum_ranks sum_steps [loss_sum x steps x ranks / targets] / steps / ranks = sum(loss_sum) / targets
    manual:     sum_ranks sum_steps [loss_sum x ranks / targets] / ranks                 = sum(loss_sum) / targets
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipe.data.blocks import IGNORED_TARGET, MicroBatch
from recipe.errors import OUT_OF_MEMORY_EXIT_CODE, RecipeError
from recipe.model.sharding import add_up_parts, local
from recipe.run.memory_limit import halve_for_next_start
from recipe.run.run import Run
from recipe.run.stop import DoesNotFit, Stopped
from recipe.step.noise import COUNT


@dataclass(frozen=True)
class UpdateResult:
    """Statistics of one update over all ranks; 0-d tensors on the device, so the caller chooses when to wait for them."""

    loss: Tensor  # mean over the update's unmasked targets, in nats per token, float64
    grad_norm: Tensor  # 2-norm of the whole gradient before clipping
    target_tokens: Tensor  # unmasked targets
    is_finite: bool = True  # whether loss and gradient are; the optimizer has stepped only then
    noise: Tensor | None = None  # `GroupSums`, if the gradients of micro-batches are measured


def run_update(
    run: Run, model: nn.Module, optimizer: Any, micro_batches: Sequence[MicroBatch], target_tokens: int | None = None
) -> UpdateResult:
    """Accumulate the gradient of all micro-batches on all ranks, clip it once, and step the optimizer once.

    If the loss or the gradient is not finite, on any rank, no rank steps: parameters and optimizer stay bit for bit.

    Args:
        run: its accelerator and settings.
        model: prepared; `model(*micro_batch)` gives the summed token loss.
        optimizer: prepared.
        micro_batches: this rank's; the same number on every rank.
        target_tokens: unmasked targets of the update over all ranks if known in advance. None: count them, at the cost of one
            integer all-reduce.

    Raises:
        Stopped, DoesNotFit: the ranks have abandoned the open update; no gradient is left, and it can be run again.
    """
    try:
        loss, targets = accumulate_gradient(run, model, micro_batches, target_tokens)
    except (Stopped, DoesNotFit):
        model.zero_grad(set_to_none=True)  # the prepared optimizer's does nothing in the middle of an accumulation
        raise
    grad_norm, is_finite = clip_and_step(run, model, optimizer, loss)
    noise = run.noise.sums if run.noise else None
    return UpdateResult(loss=loss, grad_norm=grad_norm, target_tokens=targets, is_finite=is_finite, noise=noise)


def clip_and_step(run: Run, model: nn.Module, optimizer: Any, loss: Tensor) -> tuple[Tensor, bool]:
    """Clip the gradient, step if it and the loss are finite, and clear it.

    Returns: (2-norm of the gradient before clipping, whether the optimizer has stepped).
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = gradient_norm([local(gradient) for gradient in gradients], loss.dtype)
    grad_norm = add_up_parts(grad_norm**2, gradients[0]).sqrt() if run.is_sharded else grad_norm
    values = torch.stack((loss, grad_norm)).tolist()  # the update's one wait for the device
    is_finite = all(map(math.isfinite, values))  # both are those of all ranks, so all agree
    if is_finite:
        limit = run.config.optimizer.max_grad_norm
        scale = 1.0 if limit is None else limit / (values[1] + 1e-6)  # as torch's clip_grad_norm_ has it
        if scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, is_finite


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """2-norm of all gradients together: each row is added up in float32, or float64 if it is, and all rows in `dtype`.

    torch's own norm adds up a whole tensor in float32 on a CPU, and of bf16 gradients keeps 8 bits (docs/decisions.md).
    """
    norms = []
    for gradient in gradients:
        precision = torch.promote_types(gradient.dtype, torch.float32)
        is_copied = gradient.is_cpu and gradient.dtype != precision  # so in pieces that fit into a cache
        for rows in gradient.split(256) if is_copied and gradient.dim() > 1 else (gradient,):
            norms.append(torch.linalg.vector_norm(rows, dim=-1, dtype=precision).flatten())
    return torch.linalg.vector_norm(torch.cat(norms).to(dtype))


def accumulate_gradient(
    run: Run, model: nn.Module, micro_batches: Sequence[MicroBatch], target_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the update's loss in `.grad` of every parameter, the same on all ranks.

    Ranks agree on stopping once: before the last micro-batch, in which they wait for each other anyway, or, on a rank that was
    asked to stop, at once: it then waits there for the others to come to theirs. With sharding every forward waits for all, so
    they agree before the first and before the last, and nowhere else.

    Arguments as in `run_update`. Returns: (loss of the update, float64 0-d; its unmasked targets, int64 0-d).

    Raises:
        Stopped: a rank was asked to stop.
        DoesNotFit: a rank ran out of memory.
        RecipeError: out of memory while the ranks add up their gradients: too late to agree.
    """
    accelerator, stop, steps = run.accelerator, run.stop, len(micro_batches)
    if run.is_sharded and steps > 1:  # a forward waits for all ranks, so none leaves between two
        stop.agree()
    is_manual = run.config.batch.scaling == "manual"
    backward = Tensor.backward if is_manual else accelerator.backward
    targets = _count_targets(micro_batches, accelerator, target_tokens)
    accelerator.gradient_accumulation_steps = steps
    accelerator.step = 0  # a counter left by another number of steps would end this update early
    factor = accelerator.num_processes * (1 if is_manual else steps)  # derived above
    scale = factor / targets.to(torch.float32 if targets.device.type == "mps" else torch.float64)  # MPS has no float64
    sums = scale.new_zeros(1 + COUNT)  # reduced at once: the loss, and what is measured of the gradients
    measured, alone = run.noise.steps(run.plan.update_at(run.noise.update), run.rank) if run.noise else ([], 0)
    loss_sum, agreements, ran_out = sums[0], stop.agreements, False
    try:
        for step, micro_batch in enumerate(micro_batches, start=1):
            if step == steps or (stop.signal and not run.is_sharded):
                stop.agree()
            with _manual_context(accelerator, model, step == steps) if is_manual else accelerator.accumulate(model):
                loss = model(*micro_batch)
                with run.noise.group(micro_batch, sums[1:], step == alone) if step in measured else nullcontext():
                    backward(loss * scale)
                loss_sum += loss.detach()
    except RuntimeError as error:
        if isinstance(error, DoesNotFit) or not is_out_of_memory(error):
            raise
        ran_out = True
    if ran_out:  # after `except`, whose error holds what is to be freed
        _agree_on_memory(run, has_agreed=stop.agreements > agreements)
    sums = accelerator.reduce(sums, reduction="sum")
    if run.noise:
        run.noise.sums = sums[1:]
    return sums[0] / targets, targets


def _manual_context(accelerator: Any, model: nn.Module, is_last: bool) -> Any:
    """The reference path reduces over ranks with the last micro-batch only."""
    assert accelerator.sync_gradients, "an accumulation was left open: the optimizer would not step"
    return nullcontext() if is_last else accelerator.no_sync(model)


def _agree_on_memory(run: Run, has_agreed: bool) -> None:
    """Tell the other ranks that this one ran out of memory. Always raises."""
    if run.is_sharded:
        size = run.plan.update.largest_micro_batch
        smaller = halve_for_next_start(run, size)
        goes_on = (
            f"the same command goes on from the last checkpoint with {smaller}"
            if size > 1
            else "set a shorter --data.sequence_length, --performance.activation_checkpointing 1, or take more devices"
        )
        raise RecipeError(
            f"rank {run.rank} ran out of memory in micro-batches of {size} blocks, and the others wait for it: {goes_on}",
            on_this_rank_only=True,
            exit_code=OUT_OF_MEMORY_EXIT_CODE,
        )
    if has_agreed and run.accelerator.num_processes > 1:
        raise RecipeError(
            f"rank {run.rank} ran out of memory while the ranks added up their gradients: the same command goes on from the "
            "last checkpoint; give it a smaller --batch.micro_batch_size",
            on_this_rank_only=True,
        )
    if not has_agreed:
        run.stop.rank_out_of_memory = run.rank + 1
        run.stop.agree()
    raise DoesNotFit(run.rank)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator has failed, of a GPU or of the CPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _count_targets(micro_batches: Sequence[MicroBatch], accelerator: Any, known: int | None) -> Tensor:
    device = micro_batches[0][1].device
    if known is not None:
        return torch.full((), known, device=device)  # torch.tensor would wait for the device
    counts = [(targets != IGNORED_TARGET).sum() for _, targets, *_ in micro_batches]
    return accelerator.reduce(torch.stack(counts).sum(), reduction="sum").clamp(min=1)
