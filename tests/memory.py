"""A meter of live bytes on the CPU, fed by the allocator itself: what an operator needs inside counts, too."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable) -> int:
    """The most that was alive at once during `action`, beyond what was alive before it; its result is kept until the
    end."""
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
