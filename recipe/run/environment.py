"""What a run is computed on, for the ledger: a run has as many parts as it was started, each perhaps somewhere else."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


def describe_machine(accelerator: Any, precision: str, peak_flops: float | None) -> dict[str, Any]:
    """JSON values: when and on what this part of the run begins.

    Args:
        accelerator: knows the device and the ranks.
        precision: in use, after `auto` was decided.
        peak_flops: FLOP/s of one device that `mfu` is relative to; None where unknown.
    """
    import torch

    return {
        "time_utc": utc_now(),
        "device": _device_name(accelerator.device),
        "device_type": accelerator.device.type,
        "world_size": accelerator.num_processes,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...: which kernels it gets
        "precision": precision,
        "peak_flops": peak_flops,
        "versions": {"python": platform.python_version(), **installed_versions(_LIBRARIES)},
        "recipe_commit": _recipe_commit(),
    }


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Version of each of these distributions that is installed."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def utc_now() -> str:
    """The wall clock, to the second: 2026-11-23T12:00:00Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _device_name(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else str(device.type).upper()


def _cpu_name() -> str:
    """As the kernel calls it: `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _recipe_commit() -> str | None:
    """Commit of this checkout, `-dirty` where files have changed; None where it is none or git is missing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
