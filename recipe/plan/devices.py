"""The devices that people train on: memory and peak. Imports no torch."""

from dataclasses import dataclass

from recipe.errors import RecipeError


@dataclass(frozen=True)
class Device:
    """A device, as `--device` names it."""

    name: str
    type: str  # torch's: cpu, cuda
    memory_bytes: int | None  # None: a CPU, whose memory is the machine's
    bf16_flops: float | None  # dense peak in FLOP/s; None: not known


# Part of torch's name for the device, the most specific first; name here; memory in GB (at least 10^9 bytes); dense bf16 peak
# in TFLOP/s, without sparsity and with float32 accumulation. From the vendor's data sheets.
_GPUS = (
    ("H100 PCIe", "h100-pcie", 80, 756),
    ("H100 NVL", "h100-nvl", 94, 835),
    ("H100", "h100", 80, 989),
    ("H200", "h200", 141, 989),
    ("B200", "b200", 180, 2250),  # also GB200, as H200 is GH200
    ("A100-SXM4-40GB", "a100-40gb", 40, 312),
    ("A100", "a100", 80, 312),
    ("L40S", "l40s", 48, 362),
    ("A10G", "a10g", 24, 70),
    ("RTX 4090", "rtx4090", 24, 165),
    ("RTX 3090", "rtx3090", 24, 71),
)
DEVICES = {name: Device(name, "cuda", memory * 10**9, tera_flops * 1e12) for _, name, memory, tera_flops in _GPUS} | {
    "cpu": Device("cpu", "cpu", None, None)
}


def find_device(name: str) -> Device:
    """The device that `--device` names.

    Raises:
        RecipeError: it is not in the table.
    """
    if name.lower() not in DEVICES:
        raise RecipeError(
            f"--device {name} is not in the table: choose among {', '.join(DEVICES)}; for another one give its memory with "
            "--memory_gb, and its peak with --flops"
        )
    return DEVICES[name.lower()]


def bf16_peak_flops(cuda_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the device that torch calls `cuda_name`; None if it is not known."""
    return next((DEVICES[name].bf16_flops for part, name, *_ in _GPUS if part in cuda_name), None)
