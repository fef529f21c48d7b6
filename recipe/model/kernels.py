"""Which kernels compute the update: TF32, determinism, compilation."""

import logging
import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._triton import has_triton

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.model.onednn import choose_matmul
from recipe.run.run import Run


def choose_kernels(run: Run) -> None:
    """Decide before anything is built which kernels compute the update; `run.kernels` says which.

    Raises:
        RecipeError: a setting needs what this device or installation does not have.
    """
    performance, device = run.config.performance, run.device
    set_kernels(run.config, device)
    matmul = choose_matmul(performance, device.type, run.precision)
    run.kernels = {"matmul": matmul, "is_compiled": is_compiled(performance.compile, device.type)}


def set_kernels(config: Config, device: torch.device) -> None:
    """Set what torch keeps for the whole process, before the first kernel runs.

    Raises:
        RecipeError: there is no compiler, or no torchao, and a setting needs it.
    """
    performance = config.performance
    torch.backends.cuda.matmul.fp32_precision = "tf32" if performance.tf32 else "ieee"
    if performance.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, costs a pass over every new tensor
    if config.optimizer.state == "bf16":
        if find_spec("torchao") is None:
            raise RecipeError(
                "optimizer.state = bf16 needs torchao: pip install --editable '.[bf16-state]', or leave it out"
            )
        # torchao says of each of its CUDA libraries that this CPU cannot load it, and torch that torchao is old-fashioned.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        check_compiler(device.type, "optimizer.state = bf16")
    if performance.compile is True:
        check_compiler(device.type, "performance.compile")


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
    elif not has_triton():
        raise RecipeError(f"{what} needs Triton on {device_type}, and there is none: pip install triton")


def is_compiled(setting: bool | str, device_type: str) -> bool:
    """Whether the model is compiled, for `performance.compile` on a device type: auto is on CUDA with Triton."""
    return bool(setting) if setting != "auto" else device_type == "cuda" and bool(has_triton())


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
