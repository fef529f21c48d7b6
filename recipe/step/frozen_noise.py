"""The gradient noise scale at frozen weights, from the gradients of single blocks: a check of the one in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipe.data.blocks import MicroBatch
from recipe.run.noise_scale import NoiseScale, student


@dataclass(frozen=True)
class FrozenNoise:
    """Of one token, as in the ledger, and the scale with its interval."""

    s2: float  # trace of the covariance of a token's gradient
    g2: float  # squared norm of the true gradient
    scale: NoiseScale


def measure_frozen(model: Any, blocks: Sequence[MicroBatch]) -> FrozenNoise:
    """From two passes over single blocks with equally many targets: their norms and sum, and then each one's product with that.

    With both the estimate without any one of the blocks is known, whose scatter is its error (jackknife).
    """
    totals, squares = [torch.zeros_like(parameter) for parameter in model.parameters()], []
    for gradients in _gradients(model, blocks):
        squares.append(_products(gradients, gradients))
        torch._foreach_add_(totals, gradients)
    products = [_products(gradients, totals) for gradients in _gradients(model, blocks)]
    return from_products(np.array(squares), np.array(products), blocks[0][1].numel())


def from_products(squares: np.ndarray, products: np.ndarray, tokens: int) -> FrozenNoise:
    """The scale from each block's gradient of the summed loss: its product with itself, and with the sum of all.

    `tokens` are the targets of a block.
    """
    blocks = len(squares)

    def estimate(blocks: int, sum_of_squares: Any, square_of_sum: Any) -> tuple[Any, Any]:
        s2 = (sum_of_squares - square_of_sum / blocks) / (blocks - 1) / tokens
        return s2, square_of_sum / (blocks * tokens) ** 2 - s2 / (blocks * tokens)

    s2, g2 = estimate(blocks, squares.sum(), products.sum())
    without = estimate(blocks - 1, squares.sum() - squares, products.sum() - 2 * products + squares)
    inverse = without[1] / without[0]
    error = np.sqrt((blocks - 1) * inverse.var())
    return FrozenNoise(float(s2), float(g2), NoiseScale.of(float(g2 / s2), float(error * student(blocks - 1))))


def _gradients(model: Any, blocks: Sequence[MicroBatch]) -> Iterator[list[Tensor]]:
    parameters = list(model.parameters())
    for block in blocks:
        yield list(torch.autograd.grad(model(*block), parameters))


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of the products, each row's in the precision of the gradients."""
    rows = [torch.linalg.vecdot(a, b).flatten() for a, b in zip(left, right, strict=True)]
    return float(torch.cat(rows).sum(dtype=torch.float64))
