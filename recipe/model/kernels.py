"""Which kernels compute the step: attention, TF32, determinism, compilation."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from recipe.config.settings import Config, PerformanceConfig
from recipe.errors import RecipeError


def set_kernels(config: Config, device: torch.device, precision: str) -> None:
    """Set what torch keeps for the whole process, before the first kernel runs.

    Raises:
        RecipeError: an attention kernel that cannot compute this model's attention on this device, no compiler, or what an
            optional extra installs is not there.
    """
    performance = config.performance
    torch.backends.cuda.matmul.fp32_precision = "tf32" if performance.tf32 else "ieee"
    if performance.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, costs a pass over every new tensor
    _set_attention(performance, device)
    if performance.attention != "auto":
        _check_attention(config, device, precision)
    if config.optimizer.state == "bf16":
        _check_extra("optimizer.state", "bf16", "torchao")
        # torchao says of each of its CUDA libraries that this CPU cannot load it, and torch that torchao is old-fashioned.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        check_compiler(device.type, "optimizer.state = bf16")
    if performance.loss == "liger" and device.type == "cuda":  # elsewhere it is refused, installed or not
        _check_extra("performance.loss", "liger", "liger_kernel")
    if performance.compile is True:
        check_compiler(device.type, "performance.compile")


def _check_extra(setting: str, extra: str, module: str) -> None:
    if find_spec(module) is None:
        raise RecipeError(f"{setting} = {extra} needs {module}: pip install --editable '.[{extra}]', or leave it out")


def _set_attention(performance: PerformanceConfig, device: torch.device) -> None:
    kernel = performance.attention
    torch.backends.cuda.enable_flash_sdp(kernel in ("auto", "flash"))
    torch.backends.cuda.enable_cudnn_sdp(kernel in ("auto", "cudnn"))
    torch.backends.cuda.enable_mem_efficient_sdp(kernel in ("auto", "efficient"))
    torch.backends.cuda.enable_math_sdp(kernel in ("auto", "math"))


def _check_attention(config: Config, device: torch.device, precision: str) -> None:
    width = config.model.n_embd // config.model.n_head
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query = torch.zeros(1, 1, 16, width, device=device, dtype=dtype, requires_grad=True)
    try:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    except RuntimeError:
        raise RecipeError(
            f"performance.attention = {config.performance.attention}: this {device.type} device has no such kernel for "
            f"{precision} and heads of width {width}; set --performance.attention auto"
        ) from None


def check_compiler(device_type: str, what: str) -> None:
    """Look for what torch.compile generates code for.

    Raises:
        RecipeError: there is no C++ compiler, or no Triton on CUDA.
    """
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            raise RecipeError(
                f"{what} needs a C++ compiler, and there is none: install g++, or set CXX, or leave it out"
            ) from None
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RecipeError(f"{what} needs Triton on {device_type}, and there is none: pip install triton")


def is_compiled(setting: bool | str, device_type: str) -> bool:
    """Whether the model is compiled, for `performance.compile` on a device type: auto is on CUDA where there is Triton."""
    if setting != "auto":
        return bool(setting)
    from torch.utils._triton import has_triton

    return device_type == "cuda" and bool(has_triton())


def compile_model(model: Any, **options: Any) -> None:
    """Compile `model` in place, so that its parameters keep their names; a graph for each size of micro-batch.

    `options` are those of `torch.compile`.
    """
    # Under DDP, dynamo would cut the graph at the buckets, so that their reduction overlaps with backward; it then refuses
    # checkpointed parts. Ranks add up in one micro-batch of an update only, so the overlap is worth little.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 64  # each time that memory does not suffice brings two sizes more
    model.compile(dynamic=False, fullgraph=True, **options)


def eager(model: Any) -> Any:
    """Context in which `model` runs uncompiled if it is compiled: shapes that come once are not worth a graph."""
    has_graphs = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if has_graphs else nullcontext()
