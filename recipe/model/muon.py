"""Muon for the blocks' matrices and AdamW for everything else, as one optimizer.

A matrix steps by its momentum, all of whose singular values are made about 1 (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/), times 0.2 x the root of its longer side: its elements then move about as far as
by AdamW, so rate and decay are AdamW's (Liu et al., 2025, https://arxiv.org/abs/2502.16982).

`torch.optim.Muon` takes the same step, but of whole parameters, and always in bf16. There the rounding of a gradient, which
every other split of the update changes, turns the step by up to 1e-2; and a CPU without units for bf16 takes 20 to 80 times
as long.
"""

import math
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
# Five steps of X -> a X + (b X X' + c (X X')^2) X bring singular values from 1e-3 on to between 0.7 and 1.2
_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Muon for groups of matrices, each of which says of how many `parts`, side by side, its matrices consist; and `adamw`.

    `dtype` is that of Muon's matrix products.
    """

    def __init__(self, matrices: list[dict[str, Any]], adamw: torch.optim.AdamW, dtype: torch.dtype) -> None:
        super().__init__([*matrices, *adamw.param_groups], {})
        self.adamw, self.dtype = adamw, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each parameter that has a gradient."""
        matrices = [group for group in self.param_groups if "parts" in group]
        # It works on the state of this optimizer, whose loading makes new groups and a new dictionary
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[len(matrices) :]
        self.adamw.step()
        for group in matrices:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_matrix(matrix, matrix.grad, group)

    def _step_matrix(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rate = self.state[matrix], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        tensors = (matrix, gradient, state["momentum_buffer"])
        for part, slope, momentum in zip(*(tensor.chunk(group["parts"], dim=1) for tensor in tensors), strict=True):
            momentum.lerp_(slope, 1 - MOMENTUM)
            direction = orthogonalised(slope.lerp(momentum, MOMENTUM), self.dtype)  # Nesterov's
            part.mul_(1 - rate * group["weight_decay"])
            part.add_(direction, alpha=-rate * 0.2 * math.sqrt(max(part.shape)))


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with all singular values about 1, by Newton and Schulz's iteration in `dtype`."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x
