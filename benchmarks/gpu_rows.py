"""The combinations that the GPU benchmark measures, in order: what tells most comes first."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from recipe.config.settings import Config


@dataclass(frozen=True)
class Row:
    """One combination to measure.

    Args:
        name: of the row.
        settings: what is set otherwise than in the row that it starts from.
        on_best: start from the fastest row so far that the recipe can be set to; else from the preset.
        factor: micro-batches this many times as large.
        by_block: compile each transformer block by itself.
        compile_options: of `torch.compile`.
        whole_updates: to run if the row is the fastest so far.
        seconds: that it takes on an H100, at least: it is skipped where less are left.
        is_candidate: whether it may become the one that later rows start from.
        instead_of: measure it only where the row of this name could not be.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_best: bool = True
    factor: int = 1
    by_block: bool = False
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    whole_updates: int = 0
    seconds: float = 8
    is_candidate: bool = True
    instead_of: str | None = None


COMPILE = {"performance.compile": True}
CHECKPOINTED = {"performance.activation_checkpointing": 1}
LEAN = {"optimizer.state": "bf16"}
BY_BLOCK: dict[str, Any] = {"by_block": True, "is_candidate": False, "seconds": 25}
EAGER = [
    Row("baseline", on_best=False),
    *(Row(f"micro-batch {n}", {"batch.micro_batch_size": n}, on_best=False) for n in (8, 16, 2, 32)),
    *(Row(f"loss {way}", {"performance.loss": way}) for way in ("plain", "chunked", "liger")),
    Row("loss linear_cross_entropy", {"performance.loss": "linear_cross_entropy"}, is_candidate=False),  # not for bf16
    *(Row(f"attention {kernel}", {"performance.attention": kernel}) for kernel in ("cudnn", "flash", "efficient")),
]
COMPILED = [
    Row("compiled", COMPILE, whole_updates=2, seconds=60),
    Row(
        "compiled, chunked loss",
        COMPILE | {"performance.loss": "chunked"},
        whole_updates=2,
        seconds=60,
        instead_of="compiled",
    ),
    Row("proposal: compiled block by block", **BY_BLOCK),
    Row("activation checkpointing", CHECKPOINTED),
    Row("lean optimizer", LEAN, seconds=20, is_candidate=False),
    Row("compiled, twice the micro-batch", COMPILE, factor=2, whole_updates=2, seconds=60),
    Row("activation checkpointing, twice the micro-batch", CHECKPOINTED, factor=2),
    Row("micro-batch 1", {"batch.micro_batch_size": 1}, on_best=False),
    Row("proposal: coordinate descent", compile_options={"options": {"coordinate_descent_tuning": True}}, **BY_BLOCK),
    Row("proposal: tuned matrix products", compile_options={"options": {"max_autotune_gemm": True}}, **BY_BLOCK),
]


def unavailable(config: Config, device_type: str) -> str | None:
    """Why a combination cannot be measured here, where that is known beforehand."""
    loss, attention = config.performance.loss, config.performance.attention
    if device_type != "cuda" and (loss == "liger" or attention in ("cudnn", "efficient")):
        return "needs CUDA"
    if loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if loss == "linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    if config.optimizer.state == "bf16" and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    return None
