"""What the device can do at best with this model's shapes: matrix products, attention, and moving weights through memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from benchmarks.training import linear_products
from recipe.config.settings import Config
from recipe.plan.memory import parameter_count


def measure_limits(config: Config, device: torch.device) -> dict[str, Any]:
    """All of what follows for a micro-batch of the preset, as JSON values, with the tokens/s if all else were free."""
    is_cuda, rows = device.type == "cuda", int(config.batch.micro_batch_size) * config.data.sequence_length
    seconds = 0.1 if is_cuda else 0.002  # long enough for a GPU to reach the clock that its power allows
    products, pairs = matrix_products(config, rows, device, seconds), attention(config, device, seconds)
    traffic = weight_traffic(config, device, seconds, 2**28 if is_cuda else 2**20)
    alone = sum(product["seconds"] * product["count"] for product in products)
    both = alone + pairs["seconds"]
    length = 8192 if is_cuda else 512
    square = torch.randn(length, length, device=device, dtype=torch.bfloat16)
    square_seconds = seconds_of(lambda: torch.mm(square, square), seconds)
    return {
        "matrix_products": products,
        "square_product": {"seconds": square_seconds, "flops_per_second": 2 * length**3 / square_seconds},
        "attention": pairs,
        "weight_traffic": traffic,
        "tokens_per_second_if_all_else_were_free": {
            "matrix_products": rows / alone,
            "with_attention": rows / both,
            "with_weight_traffic": rows / (both + traffic["cast_seconds"] + traffic["gradient_sum_seconds"]),
        },
    }


def seconds_of(action: Callable[[], Any], seconds: float) -> float:
    """Mean time of `action`, repeated for about `seconds` after a warm-up."""
    timer = Timer("action()", globals={"action": action}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).mean)


def matrix_products(config: Config, rows: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """bf16 `torch.mm` in the shapes and layouts of the forward and backward of `rows` tokens."""
    products = []
    for name, count, left, right in linear_products(config.model, rows, device=device, dtype=torch.bfloat16):
        spent = seconds_of(lambda a=left, b=right: torch.mm(a, b), seconds)  # type: ignore[misc]
        rate = 2 * left.numel() * right.shape[1] / spent
        products.append({"name": name, "count": count, "seconds": spent, "flops_per_second": rate})
    return products


def attention(config: Config, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of all layers' causal attention, forward and backward, of one micro-batch, by the kernel that torch chooses.

    `flops_per_second` counts what a causal mask leaves of the products: 2 of 4 T² d forward, 2.5 times as much backward.
    """
    model, length, size = config.model, config.data.sequence_length, int(config.batch.micro_batch_size)
    shape = (size, length, model.n_head, model.n_embd // model.n_head)
    query, key, value, gradient = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(4)
    )

    def both() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), gradient)

    spent = seconds_of(both, seconds) * model.n_layer
    flops = 3.5 * 2 * size * length**2 * model.n_embd * model.n_layer
    return {"seconds": spent, "flops_per_second": flops / spent}


def weight_traffic(config: Config, device: torch.device, seconds: float, largest: int) -> dict[str, float]:
    """What fp32 parameters under bf16 autocast cost in each micro-batch, whatever its size.

    Forward: each weight is read in fp32 and written in bf16. Backward: its gradient comes in bf16, is written in fp32 and added
    to the sum. Measured on `largest` elements and scaled up to the model.
    """
    parameters = parameter_count(config.model, config.n_positions)
    weight = torch.randn(min(parameters, largest), device=device)
    total, gradient = torch.zeros_like(weight), weight.to(torch.bfloat16)
    scale = parameters / weight.numel()
    copy_seconds = seconds_of(lambda: total.copy_(weight), seconds)
    return {
        "memory_bytes_per_second": 2 * 4 * weight.numel() / copy_seconds,
        "cast_seconds": scale * seconds_of(lambda: weight.to(torch.bfloat16), seconds),
        "gradient_sum_seconds": scale * seconds_of(lambda: total.add_(gradient.to(torch.float32)), seconds),
    }
