"""Peak memory during an action, beyond the memory in use before it. On CPU a meter in the allocator measures it, also inside
operators; on CUDA the caching allocator counts it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable, device: str = "cpu") -> int:
    """The result of the action is kept until the end."""
    return cuda_peak_bytes(action) if device == "cuda" else cpu_peak_bytes(action)


def cpu_peak_bytes(action: Callable) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = action()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no allocation: the meter is blind"
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def cuda_peak_bytes(action: Callable) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = action()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
