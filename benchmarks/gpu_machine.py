"""What the benchmark runs on."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from benchmarks.gpu_trial import fresh_accelerator
from recipe.config.settings import Config
from recipe.run.environment import describe_machine, installed_versions


def machine(config: Config, device: torch.device, peak: float | None) -> dict[str, Any]:
    """Where and on what, as JSON values."""
    described = describe_machine(fresh_accelerator(config), config.precision, peak)
    described["versions"] |= installed_versions(["triton", "liger-kernel", "torchao", "numpy"])
    environment = {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith(("PYTORCH_", "TORCHINDUCTOR_"))
    }
    described |= {"environment": environment, "cuda": torch.version.cuda}
    if device.type == "cuda":
        described |= {
            "cudnn": torch.backends.cudnn.version(),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "allow_bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "nvidia_smi": nvidia_smi("driver_version,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current"),
        }
    return described


def nvidia_smi(query: str) -> dict[str, str] | None:
    """What the driver says of the first GPU; None where it is not to be asked."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(query.split(","), map(str.strip, answer.split(",")), strict=False))
