"""The devices that people train on: memory, its bandwidth, links and peak. Imports no torch."""

from dataclasses import dataclass

from recipe.errors import RecipeError

RANKS_OF_A_HOST = 8  # as GPU servers have
# Of what data sheets say of links, an assumption. Of an H100's 450 GB/s copies reach 376 to 380
# (github.com/NVIDIA/nccl/issues/1264); of 8 adapters of 50 GB/s all-reduces on 248 hosts reach 300 to 350
# (github.com/NVIDIA/nccl-tests/issues/283).
LINK_SHARE = 0.8


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
    network_bytes_per_second: float | None  # of its adapter, to other hosts, in one direction; None: not known


@dataclass(frozen=True)
class Links:
    """Bus bandwidths of collectives in bytes a second, as nccl-tests defines them (its doc/PERFORMANCE.md).

    An all-reduce of B bytes on n ranks takes 2 (n - 1) / n x B / bandwidth, to gather them or to reduce them to shares half of
    that. Between hosts it is what all adapters of a host carry together, as rings leave a host through each of them
    (github.com/NVIDIA/nccl-tests/issues/160).
    """

    in_host: float
    between_hosts: float  # as `in_host` if there is one host

    @property
    def of_all(self) -> float:
        """Of a collective of all ranks."""
        return min(self.in_host, self.between_hosts)


@dataclass(frozen=True)
class Machine:
    """What the plan's flags say of the devices."""

    device: Device | None
    flops_per_second: float | None  # of a device, at the share that the model uses
    link_bytes_per_second: float | None  # bus bandwidth of all ranks, as measured

    def links(self, ranks: int, ranks_of_host: int) -> Links | None:
        """Those of `ranks`: what was measured, or `LINK_SHARE` of the data sheets; None if there is neither."""
        measured = self.link_bytes_per_second
        nvlink = self.device.link_bytes_per_second if self.device else None
        network = self.device.network_bytes_per_second if self.device else None
        in_host = LINK_SHARE * nvlink if nvlink else measured
        if ranks <= ranks_of_host:
            in_host = between_hosts = measured or in_host
        else:
            between_hosts = measured or (LINK_SHARE * ranks_of_host * network if network else None)
        return Links(in_host, between_hosts) if in_host and between_hosts else None


# Name here; memory in GB (at least 10^9 bytes); dense bf16 peak in TFLOP/s, without sparsity and with float32 accumulation;
# memory bandwidth and NVLink (half of what both directions have together) in GB/s; network in GB/s of each of the eight
# adapters of the vendor's own server (of 400 Gb/s in DGX H100, H200 and B200, of 200 Gb/s in DGX A100); all from the vendor's
# data sheets; all of torch's names for it. A part of one (MIG) and a slower variant have other names, and no peak.
_GPUS = (
    ("gb200", 186, 2500, 8000, 900, None, "NVIDIA GB200"),
    ("b200", 180, 2250, 8000, 900, 50, "NVIDIA B200"),
    ("gh200", 96, 989, 4000, None, None, "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"),
    ("h200", 141, 989, 4800, 450, 50, "NVIDIA H200"),
    ("h200-nvl", 141, 835, 4800, None, None, "NVIDIA H200 NVL"),
    ("h100", 80, 989, 3350, 450, 50, "NVIDIA H100 80GB HBM3"),
    ("h100-nvl", 94, 835, 3900, None, None, "NVIDIA H100 NVL"),
    ("h100-pcie", 80, 756, 2000, None, None, "NVIDIA H100 PCIe"),
    ("a100", 80, 312, 2039, 300, 25, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),  # that one 1,935 GB/s
    ("a100-40gb", 40, 312, 1555, 300, 25, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ("l40s", 48, 362, 864, None, None, "NVIDIA L40S"),
    ("l40", 48, 181, 864, None, None, "NVIDIA L40"),
    ("l4", 24, 121, 300, None, None, "NVIDIA L4"),
    ("a40", 48, 150, 696, None, None, "NVIDIA A40"),
    ("a30", 24, 165, 933, None, None, "NVIDIA A30"),
    ("a10", 24, 125, 600, None, None, "NVIDIA A10"),
    ("a10g", 24, 70, 600, None, None, "NVIDIA A10G"),
    ("rtx4090", 24, 165, 1008, None, None, "NVIDIA GeForce RTX 4090"),
    ("rtx3090", 24, 71, 936, None, None, "NVIDIA GeForce RTX 3090"),
)
DEVICES = {
    name: Device(
        name, "cuda", memory * 10**9, peak * 1e12, bandwidth * 1e9, link and link * 1e9, network and network * 1e9
    )
    for name, memory, peak, bandwidth, link, network, *_ in _GPUS
} | {"cpu": Device("cpu", "cpu", None, None, None, None, None)}
_BY_CUDA_NAME = {cuda_name: DEVICES[name] for name, _, _, _, _, _, *cuda_names in _GPUS for cuda_name in cuda_names}


def device_rows() -> list[tuple[str, ...]]:
    """The lines of `--device help`: name here, memory, peak, bandwidth of memory, torch's names."""
    rows = [
        (name, f"{gb} GB", f"{peak:,} TFLOP/s in bf16", f"{bandwidth:,} GB/s", ", ".join(known))
        for name, gb, peak, bandwidth, _, _, *known in _GPUS
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
