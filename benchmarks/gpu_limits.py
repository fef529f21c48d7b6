"""What the device can do at best with this model's shapes: matrix products, attention, and moving weights through memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_trial import synchronize, with_settings
from recipe.config.settings import Config
from recipe.model.kernels import set_kernels
from recipe.plan.memory import parameter_count

# torch's names of the kernels, as `performance.attention` has them.
ATTENTION_KERNELS = ("flash", "cudnn", "efficient")


def seconds_of(action: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Mean time of `action`, repeated for about `seconds` after two runs to warm up."""
    action()
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    repeats = max(3, round(seconds / max(time.perf_counter() - started, 1e-6)))
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def matrix_products(config: Config, micro_batch_size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """bf16 `torch.mm` in the shapes and layouts of a micro-batch's forward and backward.

    The weights of transformers' GPT-2 are [in, out], the embedding [vocabulary, width]; no product is computed twice and
    none is left out. Returns: JSON values; `seconds` are of one micro-batch.
    """
    width, rows = config.model.n_embd, micro_batch_size * config.data.sequence_length
    layers = config.model.n_layer
    shapes = [
        ("attention in", width, 3 * width, layers),
        ("attention out", width, width, layers),
        ("feed-forward in", width, 4 * width, layers),
        ("feed-forward out", 4 * width, width, layers),
        ("logits", width, config.model.vocab_size, 1),
    ]
    products: list[dict[str, Any]] = []
    for name, inner, outer, count in shapes:
        inputs = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        gradient = torch.randn(rows, outer, device=device, dtype=torch.bfloat16)
        if name == "logits":
            weight = torch.randn(outer, inner, device=device, dtype=torch.bfloat16).t()
            of_weight: tuple[Tensor, Tensor] = (gradient.t(), inputs)
        else:
            weight = torch.randn(inner, outer, device=device, dtype=torch.bfloat16)
            of_weight = (inputs.t(), gradient)
        operands = {"forward": (inputs, weight), "to inputs": (gradient, weight.t()), "to weight": of_weight}
        for direction, (left, right) in operands.items():
            spent = seconds_of(lambda left=left, right=right: torch.mm(left, right), device, seconds)  # type: ignore[misc]
            flops = 2 * rows * inner * outer
            products.append(
                {
                    "name": name,
                    "direction": direction,
                    "count": count,
                    "seconds": spent,
                    "flops_per_second": flops / spent,
                }
            )
    total_seconds = sum(product["seconds"] * product["count"] for product in products)
    total_flops = 3 * 2 * rows * sum(inner * outer * count for _, inner, outer, count in shapes)
    return {
        "micro_batch_size": micro_batch_size,
        "products": products,
        "seconds": total_seconds,
        "flops_per_second": total_flops / total_seconds,
    }


def square_product(size: int, device: torch.device, seconds: float) -> float:
    """FLOP/s of a bf16 product of two square matrices."""
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds_of(lambda: torch.mm(left, left), device, seconds)


def attention(config: Config, micro_batch_size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of all layers' causal attention, forward and backward, of one micro-batch, by each kernel; or why it has none.

    `flops_per_second` counts what a causal mask leaves of the products: 2 of 4 T² d forward, 2.5 times as much backward.
    """
    model, length = config.model, config.data.sequence_length
    shape = (micro_batch_size, length, model.n_head, model.n_embd // model.n_head)
    query, key, value = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)
    flops = 3.5 * 2 * micro_batch_size * length**2 * model.n_embd * model.n_layer
    found: dict[str, Any] = {}

    def both() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), gradient)

    for kernel in ATTENTION_KERNELS:
        try:
            set_kernels(with_settings(config, {"performance.attention": kernel}), device, "bf16")
            spent = seconds_of(both, device, seconds) * model.n_layer
            found[kernel] = {"seconds": spent, "flops_per_second": flops / spent}
        except Exception as error:
            found[kernel] = " ".join(str(error).split())[:200]
    set_kernels(config, device, "bf16")
    return {"micro_batch_size": micro_batch_size, **found}


def weight_traffic(config: Config, device: torch.device, seconds: float, largest: int) -> dict[str, float]:
    """What fp32 parameters under bf16 autocast cost in each micro-batch, whatever its size.

    Forward: each weight is read in fp32 and written in bf16. Backward: its gradient comes in bf16, is written in fp32 and added
    to the sum. Measured on `largest` elements and scaled up to the model.
    """
    parameters = parameter_count(config.model, config.n_positions)
    weight = torch.randn(min(parameters, largest), device=device)
    total, gradient = torch.zeros_like(weight), weight.to(torch.bfloat16)
    scale = parameters / weight.numel()
    copy_seconds = seconds_of(lambda: total.copy_(weight), device, seconds)
    return {
        "memory_bytes_per_second": 2 * 4 * weight.numel() / copy_seconds,
        "cast_seconds": scale * seconds_of(lambda: weight.to(torch.bfloat16), device, seconds),
        "gradient_sum_seconds": scale * seconds_of(lambda: total.add_(gradient.to(torch.float32)), device, seconds),
    }


def measure_limits(config: Config, device: torch.device, micro_batch_sizes: list[int]) -> dict[str, Any]:
    """All of the above as JSON values, with the seconds and tokens/s that would follow if all else were free."""
    is_cuda = device.type == "cuda"
    seconds = 0.1 if is_cuda else 0.002  # long enough for a GPU to reach the clock that its power allows
    products = [matrix_products(config, size, device, seconds) for size in micro_batch_sizes]
    kernels = [attention(config, size, device, seconds) for size in micro_batch_sizes]
    traffic = weight_traffic(config, device, seconds, 2**28 if is_cuda else 2**20)
    best = []
    for of_products, of_kernels in zip(products, kernels, strict=True):
        tokens = of_products["micro_batch_size"] * config.data.sequence_length
        attention_seconds = min((k["seconds"] for k in of_kernels.values() if isinstance(k, dict)), default=0.0)
        both = of_products["seconds"] + attention_seconds
        weights = traffic["cast_seconds"] + traffic["gradient_sum_seconds"]
        best.append(
            {
                "micro_batch_size": of_products["micro_batch_size"],
                "tokens_per_second_of_matrix_products": tokens / of_products["seconds"],
                "tokens_per_second_with_attention": tokens / both,
                "tokens_per_second_with_weight_traffic": tokens / (both + weights),
            }
        )
    return {
        "square_flops_per_second": square_product(8192 if is_cuda else 512, device, seconds),
        "matrix_products": products,
        "attention": kernels,
        "weight_traffic": traffic,
        "if_all_else_were_free": best,
    }
