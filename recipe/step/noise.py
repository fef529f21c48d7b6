"""Squared norms of micro-batches' gradients as they go by in backward: what the gradient noise scale is computed from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn

from recipe.data.blocks import IGNORED_TARGET, MicroBatch
from recipe.model.sharding import hook_gradients
from recipe.plan.budget import UpdatePlan
from recipe.run.noise_scale import GroupSums

GROUPS_PER_UPDATE = 16  # over all ranks: more cost more, and the gradient's own noise is the larger error soon
COUNT = len(fields(GroupSums))


class GradientNoise:
    """Hooks on a model's parameters: each sees the gradient of a micro-batch before it is added to `.grad` or to other ranks'.

    A hook returns nothing and writes nothing, so the update stays bit for bit what it is; nothing waits for the device.

    Attributes:
        update: which one is open. Every `every`-th is measured, in other micro-batches each time.
        sums: `GroupSums` of the last update as a tensor; zeros if it was not measured.
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        self.every, self.update = every, 0
        self.sums: Tensor | None = None
        # Of the open group: squared norms of matrices, and vectors, most of the gradients but small, to take together
        self._open: tuple[list[Tensor], list[Tensor]] | None = None
        hook_gradients(model, self._see)

    def steps(self, plan: UpdatePlan, rank: int) -> tuple[list[int], int]:
        """Which of a rank's micro-batches to measure in the open update, from 1, and the one that is measured alone too.

        They are evenly spread, and none if the update is not measured. Alone is one of all ranks', each in its turn; else 0.
        """
        measured, rest = divmod(self.update, self.every)
        if rest:
            return [], 0
        steps = plan.gradient_accumulation_steps
        count = min(steps, -(-GROUPS_PER_UPDATE // plan.world_size))
        sample = [(number * steps + measured % steps) // count + 1 for number in range(count)]
        turn, rank_of_turn = divmod(measured, plan.world_size)
        return sample, sample[turn % count] if rank == rank_of_turn else 0

    @contextmanager
    def group(self, micro_batch: MicroBatch, sums: Tensor, is_alone: bool) -> Iterator[None]:
        """Around the backward of a micro-batch: add to `sums` what its gradient comes to. A fully masked one adds nothing."""
        squares: list[Tensor] = []
        vectors: list[Tensor] = []
        self._open = squares, vectors
        try:
            yield
        finally:
            self._open = None
        if vectors:
            squares.append(squared_norm(torch.cat(vectors)))
        targets = (micro_batch[1] != IGNORED_TARGET).sum()
        square = torch.stack(squares).sum(dtype=sums.dtype) / targets.clamp(min=1)
        added = torch.stack([square, *(number.to(sums.dtype) for number in (targets, targets > 0))])
        sums[:3] += added
        if is_alone:
            sums[3:] += added[:2]

    def _see(self, gradient: Tensor) -> None:
        if self._open is None:
            return
        squares, vectors = self._open
        if gradient.dim() == 1:
            vectors.append(gradient)
        else:
            squares.append(squared_norm(gradient))


def squared_norm(gradient: Tensor) -> Tensor:
    """In float32, or float64 if it is: 0-d, on the device."""
    precision = torch.promote_types(gradient.dtype, torch.float32)
    if not gradient.is_cpu:
        return torch.linalg.vector_norm(gradient, dtype=precision).square()
    # In pieces that fit into a cache, bf16's copies too. Of a whole one the sum in float32 is off by up to 5e-3, and a product
    # with itself waits in every matrix for MKL's second thread, 2 % of an update (docs/batch.md).
    pieces = gradient.reshape(-1).split(1 << 16)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=precision) for piece in pieces]).square().sum()
