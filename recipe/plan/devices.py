"""The devices that people train on: memory, its bandwidth, links and peak. Imports no torch."""

from dataclasses import dataclass

from recipe.errors import RecipeError


@dataclass(frozen=True)
class Device:
    """A device, as `--device` names it."""

    name: str
    type: str  # torch's: cpu, cuda
    memory_bytes: int | None  # None: a CPU, whose memory is the machine's
    bf16_flops: float | None  # dense peak in FLOP/s; None: not known
    memory_bytes_per_second: float | None  # None: not known
    link_bytes_per_second: (
        float | None
    )  # NVLink's in one direction; None: it has none, or a bridge to one or three others


# Name here; memory in GB (at least 10^9 bytes); dense bf16 peak in TFLOP/s, without sparsity and with float32 accumulation;
# memory bandwidth and NVLink (half of what both directions have together) in GB/s; all from the vendor's data sheets; all of
# torch's names for it. A part of one (MIG) and a slower variant have other names, and no peak.
_GPUS = (
    ("gb200", 186, 2500, 8000, 900, "NVIDIA GB200"),
    ("b200", 180, 2250, 8000, 900, "NVIDIA B200"),
    ("gh200", 96, 989, 4000, None, "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"),
    ("h200", 141, 989, 4800, 450, "NVIDIA H200"),
    ("h200-nvl", 141, 835, 4800, None, "NVIDIA H200 NVL"),
    ("h100", 80, 989, 3350, 450, "NVIDIA H100 80GB HBM3"),
    ("h100-nvl", 94, 835, 3900, None, "NVIDIA H100 NVL"),
    ("h100-pcie", 80, 756, 2000, None, "NVIDIA H100 PCIe"),
    ("a100", 80, 312, 2039, 300, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),  # that one 1,935 GB/s
    ("a100-40gb", 40, 312, 1555, 300, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ("l40s", 48, 362, 864, None, "NVIDIA L40S"),
    ("l40", 48, 181, 864, None, "NVIDIA L40"),
    ("l4", 24, 121, 300, None, "NVIDIA L4"),
    ("a40", 48, 150, 696, None, "NVIDIA A40"),
    ("a30", 24, 165, 933, None, "NVIDIA A30"),
    ("a10", 24, 125, 600, None, "NVIDIA A10"),
    ("a10g", 24, 70, 600, None, "NVIDIA A10G"),
    ("rtx4090", 24, 165, 1008, None, "NVIDIA GeForce RTX 4090"),
    ("rtx3090", 24, 71, 936, None, "NVIDIA GeForce RTX 3090"),
)
DEVICES = {
    name: Device(name, "cuda", memory * 10**9, tera_flops * 1e12, bandwidth * 1e9, None if link is None else link * 1e9)
    for name, memory, tera_flops, bandwidth, link, *_ in _GPUS
} | {"cpu": Device("cpu", "cpu", None, None, None, None)}
_BY_CUDA_NAME = {cuda_name: DEVICES[name] for name, _, _, _, _, *cuda_names in _GPUS for cuda_name in cuda_names}


def device_rows() -> list[tuple[str, ...]]:
    """The lines of `--device help`: name here, memory, peak, bandwidth of memory, torch's names."""
    rows = [
        (name, f"{gb} GB", f"{peak:,} TFLOP/s in bf16", f"{bandwidth:,} GB/s", ", ".join(known))
        for name, gb, peak, bandwidth, _, *known in _GPUS
    ]
    return [*rows, ("cpu", "this machine's", "", "", "any CPU")]


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
