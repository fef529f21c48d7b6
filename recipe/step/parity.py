"""The parity check: the first update's gradient, computed in other ways, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recipe.data.blocks import split_into_micro_batches
from recipe.errors import RecipeError
from recipe.model.kernels import eager
from recipe.plan.budget import UpdatePlan
from recipe.step.update import MicroBatch, Scaling, accumulate_gradient

# Largest relative difference allowed, in the 2-norm of the gradient. float32 rounds at 6e-8, and sums of thousands of
# tokens differ by some times that; under bf16 autocast each micro-batch's gradient is rounded at 4e-3.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class ParityCheck:
    """Relative differences to the gradient of the configured path.

    Args:
        reference: the configured way.
        differences: (way, ||g - reference|| / ||reference||) of each other way.
        tolerance: what they are held to.
    """

    reference: str
    differences: list[tuple[str, float]]
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        return max(difference for _, difference in self.differences)

    def __str__(self) -> str:
        rows = [f"  {way:<40} {difference:.1e}" for way, difference in self.differences]
        verdict = "agree" if self.largest <= self.tolerance else "DO NOT AGREE"
        return "\n".join(
            [
                f"first update's gradient, relative to {self.reference}:",
                *rows,
                f"  they {verdict}: largest difference {self.largest:.1e}, tolerance {self.tolerance:.0e}",
            ]
        )


def parity_check(
    model: nn.Module, batch: MicroBatch, plan: UpdatePlan, *, accelerator: Any, scaling: Scaling, precision: str
) -> ParityCheck:
    """Compute the gradient of this rank's `batch` in up to four ways, without dropout; gradients are cleared afterwards.

    Raises:
        RecipeError: a difference above the tolerance: the update would depend on how it is cut up.
    """
    other: Scaling = "manual" if scaling == "accumulate" else "accumulate"
    was_training = model.training
    model.eval()

    def gradient(micro_batch_size: int, path: Scaling) -> tuple[str, list[Tensor]]:
        cut = replace(plan, micro_batch_size=micro_batch_size)
        name = f"{path}, micro-batch {micro_batch_size} x {cut.gradient_accumulation_steps} steps"
        return name, update_gradient(model, batch, cut, accelerator=accelerator, scaling=path)

    with eager(model):
        reference_name, reference = gradient(plan.micro_batch_size, scaling)
        compared = [gradient(size, scaling) for size in _other_micro_batch_sizes(plan)]
        compared.append(gradient(plan.micro_batch_size, other))
    differences = [(name, relative_difference(gradients, reference)) for name, gradients in compared]
    model.train(was_training)
    parity = ParityCheck(reference_name, differences, TOLERANCE[precision])
    if not parity.largest <= parity.tolerance:  # also where it is not a number
        raise RecipeError(f"parity check: {parity}; do not train with this installation")
    return parity


def update_gradient(
    model: nn.Module, batch: MicroBatch, cut: UpdatePlan, *, accelerator: Any, scaling: Scaling
) -> list[Tensor]:
    """The gradient of an update, of which this rank has `batch`, cut as `cut` says: float64 on the CPU, by parameter."""
    micro_batches = split_into_micro_batches(batch, cut, accelerator.process_index)
    accumulate_gradient(  # no stop request: it is a moment
        model, micro_batches, accelerator=accelerator, scaling=scaling, target_tokens=cut.tokens_per_update
    )
    gradients = [p.grad.detach().cpu().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def relative_difference(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """||g - reference|| / ||reference||, over all tensors together."""
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients, reference, strict=True)]).norm()
    return float(apart / torch.stack([g.norm() for g in reference]).norm())


def _other_micro_batch_sizes(plan: UpdatePlan) -> list[int]:
    """Up to two sizes that cut the update otherwise: smaller ones first, since they fit in memory, and ragged ones."""
    configured = plan.micro_batch_size
    steps = {plan.gradient_accumulation_steps}
    sizes = []
    for size in (
        configured - 1,
        configured // 2,
        *range(1, configured),
        *range(configured + 1, plan.largest_share + 1),
    ):
        if size >= 1 and (other := replace(plan, micro_batch_size=size).gradient_accumulation_steps) not in steps:
            steps.add(other)
            sizes.append(size)
    return sizes[:2]
