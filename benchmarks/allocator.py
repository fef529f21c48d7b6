"""The peak of torch's allocator during an action: what tensors take, on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def allocator_peak(action: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, int]:
    """Run `action` and give (its result, the most bytes that torch's allocator had handed out during it).

    On CUDA this is what the caching allocator counts, tensors from before included. On a CPU nothing is counted unless the
    profiler runs: every allocation and release becomes an event, and the peak is that of their running sum, so tensors from
    before do not count (build the model inside `action`), and what another thread lets go of is not seen. Neither sees what
    libraries take for themselves (MKL's and oneDNN's buffers, cuBLAS's workspace), nor what an allocator holds back; the
    CPU's is malloc, which rounds up.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = action()
        return result, torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = action()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return result, max(accumulate(event.nbytes() for event in events), default=0)
