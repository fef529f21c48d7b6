"""The machine: start accelerate on it, refuse ranks that do not see each other, and describe what the run is computed on."""

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recipe.errors import RecipeError
from recipe.plan.devices import bf16_peak_flops
from recipe.plan.run_plan import world_size_of_launcher
from recipe.run.stop import INTERFACE
from recipe.text import one_line

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


def start_accelerator(precision: str) -> Any:
    """An Accelerator on the device at hand, whose accumulation steps `recipe.step.update` sets.

    Raises:
        RecipeError: the ranks do not see each other.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    try:
        accelerator = Accelerator(
            cpu=device_type() == "cpu",
            mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
            dynamo_backend="no",  # the recipe compiles the model itself
            # The plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the plain argument; no dataloader is prepared.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            # As long as gloo waits: NCCL's 10 minutes would be over while one rank tries again to read (data.retry_seconds).
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        )
    except Exception as error:  # of accelerate, or of one of the libraries that ranks talk through
        reason = one_line(str(error))[:300] or type(error).__name__
        advice = f"; {INTERFACE}" if "onnect" in reason or "esolve" in reason or "address" in reason.lower() else ""
        raise RecipeError(f"accelerate cannot start this rank: {reason}{advice}", on_this_rank_only=True) from error
    announced = world_size_of_launcher()
    if accelerator.num_processes != announced:
        raise RecipeError(
            f"the launcher started {announced} ranks but this one sees {accelerator.num_processes}: they would train alone; "
            "launch with a file of accelerate_configs/ or with torchrun",
            on_this_rank_only=True,
        )
    return accelerator


def device_type() -> str:
    """`cpu` if accelerate was told so or torch finds no accelerator, else the accelerator's type (`cuda`, `mps`, ...)."""
    import torch

    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("y", "yes", "t", "true", "on", "1")  # as accelerate
    if use_cpu or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def choose_precision(requested: str, device: str) -> tuple[str, str]:
    """(`bf16` or `fp32`, the reason) for `precision: auto|bf16|fp32` on a device type.

    Raises:
        RecipeError: bf16 on a CUDA device that has none.
    """
    import torch

    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if requested == "bf16" and not has_bf16:
            raise RecipeError(f"precision = bf16: {torch.cuda.get_device_name()} has no bf16; use --precision fp32")
        reason = "the GPU has bf16 matrix units" if has_bf16 else "the GPU has no bf16 matrix units"
    elif device == "cpu":
        has_bf16 = torch.cpu._is_amx_tile_supported()
        reason = "the CPU has AMX tiles" if has_bf16 else "the CPU has no AMX tiles, so bf16 gains little or loses much"
    else:
        has_bf16, reason = False, f"bf16 is not tested on {device}"
    auto = ("bf16" if has_bf16 else "fp32"), reason
    return auto if requested == "auto" else (requested, "as configured")


def available_bytes(device: Any) -> int:
    """Memory that this rank can have: the free memory of a GPU, or its part of the CPU's available memory.

    Raises:
        RecipeError: another kind of device.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    raise RecipeError(f"batch.micro_batch_size = auto does not know the memory of {device.type}: give a number")


def peak_flops(device: Any, precision: str) -> float | None:
    """Peak FLOP/s of one device in `precision`; None if unknown."""
    import torch

    has_peak = device.type == "cuda" and precision == "bf16"
    return bf16_peak_flops(torch.cuda.get_device_name(device)) if has_peak else None


def describe_environment(accelerator: Any, precision: str) -> dict[str, Any]:
    """JSON values: on what this part of the run is computed. `precision` is the one in use."""
    import torch

    return {
        "device": _device_name(accelerator.device),
        "device_type": accelerator.device.type,
        "world_size": accelerator.num_processes,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...: which kernels it gets
        "precision": precision,
        "peak_flops": peak_flops(accelerator.device, precision),  # of one device; mfu is relative to it
        **installation(),
    }


def hosts_of(accelerator: Any) -> list[dict[str, Any]]:
    """JSON values: name, kind of device, and ranks of each machine. Collective."""
    from accelerate.utils import gather_object

    own = [(platform.node(), _device_name(accelerator.device))]
    found = Counter(gather_object(own) if accelerator.num_processes > 1 else own)
    return [{"host": host, "device": device, "ranks": ranks} for (host, device), ranks in found.items()]


@cache
def installation() -> dict[str, Any]:
    """JSON values: the versions of Python and of what the result depends on, and the commit of the recipe."""
    versions = {"python": platform.python_version(), **installed_versions(_LIBRARIES)}
    return {"versions": versions, "recipe_commit": _recipe_commit()}


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Version of each of these distributions, if it is installed."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else str(device.type).upper()


def _cpu_name() -> str:
    """As the kernel calls it: `platform.processor()` is empty on most Linux systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _recipe_commit() -> str | None:
    """Commit of this checkout, `-dirty` if files have changed; None if it is none or git is missing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    return None
