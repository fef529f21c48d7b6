"""What a step holds in memory, and which way of computing it is taken for that. Pure arithmetic; imports no torch."""

from __future__ import annotations

from typing import Literal

from recipe.errors import RecipeError

LossMethod = Literal["plain", "chunked", "linear_cross_entropy", "liger"]
# Rows of logits alive at once. 2,048 x 50,304 in fp32 are 412 MB, and as much again for their gradient. On a CPU 512 rows
# were the fastest for linear_cross_entropy at widths 128 to 768 and vocabularies 2,048 to 50,304 (docs/decisions.md).
ROWS_PER_CHUNK: dict[LossMethod, int] = {"chunked": 2048, "linear_cross_entropy": 512}


def choose_loss(requested: str, device_type: str, precision: str) -> LossMethod:
    """The way to compute the loss, for `performance.loss` on a device type (`cpu`, `cuda`, ...) in `bf16` or `fp32`.

    Raises:
        RecipeError: a way that the device or the precision does not allow.
    """
    if requested == "linear_cross_entropy" and precision != "fp32":
        raise RecipeError(
            "performance.loss = linear_cross_entropy gives its sum in the precision of its inputs, 8 bits in bf16: set "
            "--precision fp32, or --performance.loss chunked"
        )
    if requested == "liger" and device_type != "cuda":
        raise RecipeError(
            f"performance.loss = liger runs on CUDA only, and this is {device_type}: set --performance.loss auto"
        )
    if requested != "auto":
        return requested  # type: ignore[return-value]
    return "linear_cross_entropy" if device_type == "cpu" and precision == "fp32" else "chunked"
