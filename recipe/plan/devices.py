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


# Name here; memory in GB (at least 10^9 bytes); dense bf16 peak in TFLOP/s, without sparsity and with float32 accumulation,
# from the vendor's data sheets; all of torch's names for it. A part of one (MIG) and a slower variant have other names, and no
# peak.
_GPUS = (
    ("gb200", 186, 2500, "NVIDIA GB200"),
    ("b200", 180, 2250, "NVIDIA B200"),
    ("gh200", 96, 989, "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"),
    ("h200", 141, 989, "NVIDIA H200"),
    ("h200-nvl", 141, 835, "NVIDIA H200 NVL"),
    ("h100", 80, 989, "NVIDIA H100 80GB HBM3"),
    ("h100-nvl", 94, 835, "NVIDIA H100 NVL"),
    ("h100-pcie", 80, 756, "NVIDIA H100 PCIe"),
    ("a100", 80, 312, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    ("a100-40gb", 40, 312, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ("l40s", 48, 362, "NVIDIA L40S"),
    ("l40", 48, 181, "NVIDIA L40"),
    ("l4", 24, 121, "NVIDIA L4"),
    ("a40", 48, 150, "NVIDIA A40"),
    ("a30", 24, 165, "NVIDIA A30"),
    ("a10", 24, 125, "NVIDIA A10"),
    ("a10g", 24, 70, "NVIDIA A10G"),
    ("rtx4090", 24, 165, "NVIDIA GeForce RTX 4090"),
    ("rtx3090", 24, 71, "NVIDIA GeForce RTX 3090"),
)
DEVICES = {name: Device(name, "cuda", memory * 10**9, tera_flops * 1e12) for name, memory, tera_flops, *_ in _GPUS} | {
    "cpu": Device("cpu", "cpu", None, None)
}
_BY_CUDA_NAME = {cuda_name: DEVICES[name] for name, _, _, *cuda_names in _GPUS for cuda_name in cuda_names}


def device_rows() -> list[tuple[str, ...]]:
    """The lines of `--device help`: name here, memory, peak, torch's names."""
    rows = [(name, f"{gb} GB", f"{peak:,} TFLOP/s in bf16", ", ".join(known)) for name, gb, peak, *known in _GPUS]
    return [*rows, ("cpu", "this machine's", "", "any CPU")]


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
    """Dense bf16 peak in FLOP/s of the device that torch calls `cuda_name`, exactly; None if it is not known."""
    device = _BY_CUDA_NAME.get(cuda_name)
    return device.bf16_flops if device else None
