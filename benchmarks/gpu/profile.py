"""Where the time of an update goes: kernels by kind, the largest ones, idle time, and which attention kernel ran."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that a kernel's name matches. Names are those of cuBLAS (nvjet, xmma, gemm), CUTLASS, cuDNN, PyTorch's own CUDA
# kernels, inductor (triton_...), and, for a CPU, those of the operators.
KINDS = [
    ("matrix products", r"triton_tem|triton_mm"),
    ("fused by the compiler", r"^triton_|^cpp_fused|^graph_\d+_cpp_fused"),
    ("attention, backward", r"fmha_cutlassB|(flash|fmha|sdpa|attention).*(bwd|bprop|backward|dot_do_o|convert_dq)"),
    ("attention, forward", r"flash|fmha|sdpa|scaled_dot_product"),
    ("loss", r"cross_entropy|nll_loss|log_?softmax"),
    ("attention, by hand", r"softmax"),
    ("layer norm", r"layer_?norm|GammaBeta"),
    ("gelu", r"gelu"),
    ("optimizer and clipping", r"adam|multi_tensor|foreach|lp_?norm|::norm|linalg_vector_norm"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|wgmma|split_?k|::(b|add|badd)?mm$|::linear$"),
    ("embedding", r"embedding|index_?select|indexSelect"),
    ("copies and casts", r"memcpy|memset|copy|::to$|::fill_|FillFunctor"),
    ("sums and other elementwise", r"elementwise|reduce_kernel|::(add|mul|sum|div)_?$"),
]
_ATTENTION = re.compile(r"aten::_scaled_dot_product_(flash|cudnn|efficient|fused|attention_math)(?!.*backward)")
_RANGES = ("ProfilerStep", "Optimizer.", "Torch-Compiled Region", "## ", "CompiledFunction")  # they cover kernels
_TOP = 15


@cache
def kind_of(name: str) -> str:
    """What a kernel of this name is for."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_update(action: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Run `action` under torch's profiler, which slows down the CPU's side, so that idle time is an upper bound.

    Returns: JSON values. On CUDA the seconds are those of kernels; on a CPU those of operators, without what they call.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    started = time.perf_counter()
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        action()
        if is_cuda:
            torch.cuda.synchronize(device)
        wall_seconds = time.perf_counter() - started
    return summarize(list(profiler.events() or []), wall_seconds, is_cuda)


def summarize(events: Sequence[Any], wall_seconds: float, is_cuda: bool) -> dict[str, Any]:
    """What `profile_update` returns, of torch's profiler events."""
    if is_cuda:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(_RANGES)]
        kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]
        spans = [(e.time_range.start, e.time_range.end) for e in kernels]
        named = [(e.name, (end - start) / 1e6) for e, (start, end) in zip(kernels, spans, strict=True)]
    else:
        spans = []  # operators call each other
        named = [(e.name, e.self_cpu_time_total / 1e6) for e in events if e.device_type == DeviceType.CPU]
    span_seconds, idle_share = wall_seconds, None
    if spans:
        span_seconds = (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6
        idle_share = 1 - covered(spans) / 1e6 / span_seconds
    return {"span_seconds": span_seconds, "idle_share": idle_share, **by_kind(named), **_attention(events, named)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def by_kind(named: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Seconds of (kernel, seconds) by kind, the largest first, and the kernels that took the most."""
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for name, seconds in named:
        kinds[kind_of(name)] += seconds
        kernels[name].append(seconds)
    largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:_TOP]
    return {
        "seconds_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "largest_kernels": [
            {"name": name[:160], "kind": kind_of(name), "calls": len(seconds), "seconds": sum(seconds)}
            for name, seconds in largest
        ],
    }


def _attention(events: Iterable[Any], named: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """The operators that scaled_dot_product_attention chose, its kernels, and whether one got a mask (a fourth tensor)."""
    operators, has_mask = set(), False
    for event in events:
        if match := _ATTENTION.match(event.name):
            operators.add({"attention_math": "math"}.get(match[1], match[1]))
            has_mask = has_mask or any(len(shape) > 0 for shape in (event.input_shapes or [])[3:])
    return {
        "attention_ran": sorted(operators),
        "attention_kernels": sorted({name[:100] for name, _ in named if kind_of(name).startswith("attention")}),
        "mask_reached_attention": has_mask if operators else None,
    }
