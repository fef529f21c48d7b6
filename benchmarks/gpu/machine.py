"""The device: what it is, which attention kernels it may use, its memory, and a limit on the time that it takes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from recipe.run import Run
from recipe.run.environment import describe_environment, installed_versions

ATTENTION = ("flash", "cudnn", "mem_efficient", "math")  # kernels of scaled_dot_product_attention
CUDA_ATTENTION = ("cudnn", "mem_efficient")


def use_attention(kernel: str | None) -> None:
    """Let attention use this kernel alone; None: torch chooses among all."""
    for name in ATTENTION:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(kernel in (None, name))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Free what nothing refers to any more, also compiled code, and count the peak anew."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after a kernel that failed for good there is nothing to free
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.reset_accumulated_memory_stats(device)


def describe_machine(run: Run) -> dict[str, Any]:
    """Where and on what, as JSON values."""
    described = describe_environment(run.accelerator, run.precision)
    described["versions"] |= installed_versions(("triton", "torchao", "numpy"))
    if run.device.type == "cuda":
        described |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        described["memory_bytes"] = torch.cuda.get_device_properties(run.device).total_memory
        described["nvidia_smi"] = nvidia_smi("driver_version,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current")
    names = sorted(name for name in os.environ if name.startswith(("PYTORCH_", "TORCHINDUCTOR_")))
    return described | {"environment": {name: os.environ[name] for name in names}}


def nvidia_smi(query: str) -> dict[str, str] | None:
    """What the driver says of the first GPU; None if it cannot be asked."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(query.split(","), map(str.strip, answer.split(",")), strict=False))


class OutOfTime(BaseException):
    """The time is over in the middle of a row. Not an Exception, since compilers catch those."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after `seconds`, also in what does not look at a clock, such as a compiler."""

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # again, should somebody have caught the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
