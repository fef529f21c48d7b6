"""The parity check: the first update's gradient, computed in other ways, and how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from recipe.config.settings import Scaling
from recipe.data.blocks import MicroBatch, split_into_micro_batches
from recipe.errors import RecipeError
from recipe.model.kernels import eager
from recipe.model.sharding import whole
from recipe.plan.budget import UpdatePlan
from recipe.run.run import Run
from recipe.run.stop import StopRequest
from recipe.step.update import accumulate_gradient

# Largest relative difference allowed, in the 2-norm of the gradient. float32 rounds at 6e-8, and sums of thousands of
# tokens differ by some times that; under bf16 autocast each micro-batch's gradient is rounded at 4e-3.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class ParityCheck:
    """Relative differences to the gradient of the configured path."""

    reference: str  # the configured way
    differences: list[tuple[str, float]]  # (way, ||g - reference|| / ||reference||) of each other way
    tolerance: float  # the largest that is allowed

    @property
    def largest(self) -> float:
        """Of the differences."""
        return max(difference for _, difference in self.differences)

    def __str__(self) -> str:
        lines = [f"first update's gradient, relative to {self.reference}:"]
        lines += [f"  {way:<40} {difference:.1e}" for way, difference in self.differences]
        verdict = "agree" if self.largest <= self.tolerance else "DO NOT AGREE"
        return "\n".join([*lines, f"  they {verdict}: largest {self.largest:.1e}, tolerance {self.tolerance:.0e}"])


def check_parity(run: Run, model: nn.Module, batch: MicroBatch) -> ParityCheck:
    """Compute the gradient of this rank's `batch` in up to four ways, without dropout; clears the gradients afterwards.

    Raises:
        RecipeError: a difference above the tolerance: the update would depend on how it is split.
    """
    plan, scaling = run.plan.update, run.config.batch.scaling
    was_training = model.training
    model.eval()

    def gradient(micro_batch_size: int, scaling: Scaling) -> tuple[str, list[Tensor]]:
        other = split_otherwise(run, micro_batch_size, scaling)
        steps = other.plan.update.gradient_accumulation_steps
        return f"{scaling}, micro-batch {micro_batch_size} x {steps} steps", update_gradient(other, model, batch)

    with eager(model):
        reference_name, reference = gradient(plan.micro_batch_size, scaling)
        compared = [gradient(size, scaling) for size in _other_micro_batch_sizes(plan)]
        compared.append(gradient(plan.micro_batch_size, "manual" if scaling == "accumulate" else "accumulate"))
    differences = [(name, relative_difference(gradients, reference)) for name, gradients in compared]
    model.train(was_training)
    check = ParityCheck(reference_name, differences, TOLERANCE[run.precision])
    if not check.largest <= check.tolerance:  # also if it is not a number
        raise RecipeError(f"parity check: {check}; do not train with this installation")
    return check


def split_otherwise(run: Run, micro_batch_size: int, scaling: Scaling) -> Run:
    """The run with another micro-batch and scaling path, and deaf to signals: it is only for a moment."""
    config = replace(run.config, batch=replace(run.config.batch, scaling=scaling))
    plan = run.plan.with_micro_batch_size(micro_batch_size)
    return replace(run, config=config, plan=plan, stop=StopRequest(), noise=None)


def update_gradient(run: Run, model: nn.Module, batch: MicroBatch) -> list[Tensor]:
    """The gradient of an update, of which this rank has `batch`: float64 on the CPU, by parameter."""
    micro_batches = split_into_micro_batches(batch, run.plan.update, run.rank)
    accumulate_gradient(run, model, micro_batches, run.plan.update.tokens_per_update)
    gradients = [whole(p.grad).detach().cpu().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def relative_difference(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """||g - reference|| / ||reference||, over all tensors together."""
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients, reference, strict=True)]).norm()
    return float(apart / torch.stack([g.norm() for g in reference]).norm())


def _other_micro_batch_sizes(plan: UpdatePlan) -> list[int]:
    """Up to two sizes that give other numbers of steps: smaller ones first, since they fit in memory, and ragged ones."""
    size = plan.micro_batch_size
    sizes = {plan.gradient_accumulation_steps: size}  # by number of steps
    for other in (size - 1, size // 2, *range(1, size), *range(size + 1, plan.largest_share + 1)):
        if other >= 1:
            sizes.setdefault(replace(plan, micro_batch_size=other).gradient_accumulation_steps, other)
    return list(sizes.values())[1:3]
