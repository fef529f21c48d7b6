"""On this device: the gradient of one update does not depend on how it is cut up, scaled, or computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_trial import Trial, free_memory, synthetic_batch, with_settings
from recipe.config.settings import Config
from recipe.model.kernels import set_kernels
from recipe.step.parity import TOLERANCE, relative_difference, update_gradient
from recipe.step.update import Scaling

MICRO_BATCH_SIZES = (1, 4, 8)
PADDING = 3  # rows of the embedding without a token


def parity_config(config: Config, is_cuda: bool) -> Config:
    """A small model, still deep and wide enough for each kernel to do real work; without TF32."""
    layers, width, heads, length, blocks = (4, 512, 4, 512, 64) if is_cuda else (2, 64, 1, 32, 16)
    return with_settings(
        config,
        {
            "model.n_layer": layers,
            "model.n_embd": width,
            "model.n_head": heads,
            "model.n_positions": None,
            "model.vocab_size": 8192 if is_cuda else 512,
            "data.sequence_length": length,
            "batch.tokens_per_update": blocks * length,
            "batch.lanes": blocks,
            "batch.micro_batch_size": 4,
            "performance.tf32": False,
        },
    )


def measure_parity(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Relative differences of gradients to the one of `accumulate` in micro-batches of 4, in fp32 and in bf16.

    Returns: JSON values, one for each precision: its reference, the tolerance, and {way: difference, or why there is none}.
    """
    return [_of_precision(config, precision, device) for precision in ("fp32", "bf16")]


def _of_precision(config: Config, precision: str, device: torch.device) -> dict[str, Any]:
    config = with_settings(parity_config(config, device.type == "cuda"), {"precision": precision})
    vocabulary = config.model.vocab_size - PADDING
    batch = synthetic_batch(config, vocabulary, device)
    trial = Trial(config, vocabulary, batch)
    reference = _gradient(trial, batch, 4, "accumulate")
    found: dict[str, float | str] = {}
    for way, size, scaling, settings in _ways(device):
        try:
            trial.model.loss = settings.get("performance.loss", "chunked")
            set_kernels(with_settings(config, settings), device, precision)
            found[way] = relative_difference(_gradient(trial, batch, size, scaling), reference)
        except Exception as error:
            found[way] = " ".join(str(error).split())[:200] or type(error).__name__
    del trial
    free_memory(device)
    numbers = [difference for difference in found.values() if isinstance(difference, float)]
    return {
        "precision": precision,
        "reference": "accumulate, micro-batch 4, chunked loss, attention auto",
        "tolerance": TOLERANCE[precision],
        "differences": found,
        "agree": all(difference <= TOLERANCE[precision] for difference in numbers),  # not where one is not a number
    }


def _ways(device: torch.device) -> Iterator[tuple[str, int, Scaling, dict[str, Any]]]:
    """(name, micro-batch size, scaling path, settings) of each other way."""
    scalings: tuple[Scaling, Scaling] = ("accumulate", "manual")
    for scaling in scalings:
        for size in MICRO_BATCH_SIZES:
            if (scaling, size) != ("accumulate", 4):
                yield f"{scaling}, micro-batch {size}", size, scaling, {}
    for loss in ("plain", *(["liger"] if device.type == "cuda" else [])):
        yield f"loss {loss}", 4, "accumulate", {"performance.loss": loss}
    for kernel in ("flash", "math", *(["cudnn", "efficient"] if device.type == "cuda" else [])):
        yield f"attention {kernel}", 4, "accumulate", {"performance.attention": kernel}


def _gradient(trial: Trial, batch: tuple[Tensor, Tensor], micro_batch_size: int, scaling: Scaling) -> list[Tensor]:
    cut = replace(trial.plan.update, micro_batch_size=micro_batch_size)
    return update_gradient(trial.model, batch, cut, accelerator=trial.accelerator, scaling=scaling)
