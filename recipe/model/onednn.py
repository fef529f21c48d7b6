"""Matrix products of all linear layers by oneDNN instead of MKL, on a CPU in float32.

Where the CPU has AVX-512 but is not Intel's, MKL's float32 products use half of it (docs/decisions.md). torch has no setting
that would send them to oneDNN in float32, so the operator that its compiler uses for them is called here.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from recipe.config.settings import PerformanceConfig
from recipe.errors import RecipeError


def choose_matmul(performance: PerformanceConfig, device_type: str, precision: str) -> str:
    """`torch` or `onednn`, for `performance.matmul` on a device type in `bf16` or `fp32`.

    Raises:
        RecipeError: oneDNN cannot be called here, or in a compiled model, for which torch's compiler chooses.
    """
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    can = is_there and device_type == "cpu" and precision == "fp32" and performance.compile is not True
    if performance.matmul == "onednn" and not can:
        raise RecipeError(
            f"performance.matmul = onednn needs fp32, a CPU, a model that is not compiled, and a torch with oneDNN; this is "
            f"{precision} on {device_type}: set --performance.matmul auto"
        )
    if performance.matmul != "auto":
        return performance.matmul
    return "onednn" if can and torch.backends.cpu.get_cpu_capability() == "AVX512" else "torch"


def use_onednn(model: Any) -> None:
    """Let every Conv1D and the output layer of a `CausalLanguageModel` compute in oneDNN; float64 and bf16 stay torch's."""
    from transformers.pytorch_utils import Conv1D

    model.matmul = onednn_matmul
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: Tensor) -> Tensor:
    rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
    return rows.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """x W + b, for x [rows, inputs], W [inputs, outputs], b [outputs]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return onednn_matmul(gradient, weight.t()), onednn_matmul(x.t(), gradient), gradient.sum(0)


def onednn_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, for a [rows, inner], b [inner, columns], bias [columns]; by torch if they are not float32."""
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result
