"""Results of torch's profiler for two steps: the longest operations, how often the host waited for the device, and how long
the device was idle. On a CPU the operations are the host's, and nothing waits."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STEPS, LONGEST = 2, 20
MARK = "one of the steps"
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def write_trace(step: Callable, device: torch.device, write) -> None:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            with record_function(MARK):
                step()
        if on_gpu:
            torch.cuda.synchronize()
    events = list(recorded.events())
    host = [event for event in events if event.device_type == DeviceType.CPU]
    waits = waits_of(host)
    write("synchronizations a step", len(waits) / STEPS, "")
    spans = kernels(events, host) if on_gpu else []
    if spans:
        write("idle share of the device", idle_share([(start, end) for _, start, end in spans]), "")
    else:
        write("idle share of the device", None, "", status="skipped", reason="the profiler saw no device at work")
    for place, (name, (milliseconds, calls)) in enumerate(longest(spans) if spans else longest_on_host(recorded), 1):
        write(f"op {place:02}", milliseconds / STEPS, "ms", reason=f"{calls / STEPS:g} x {name}")


def waits_of(host) -> list:
    """Without the profiler's own operations before and after the steps."""
    steps = [event.time_range for event in host if event.name == MARK]
    waits = [event for event in host if event.name in WAITS]
    return [w for w in waits if any(step.start <= w.time_range.start <= step.end for step in steps)]


def kernels(events, host) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds; ranges that the host marks appear on the device under the host's names."""
    marked = {event.name for event in host}
    found = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in marked]
    return [(e.name, e.time_range.start, e.time_range.end) for e in found]


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end, over all streams."""
    spans = sorted(spans)
    busy, (start, end) = 0.0, spans[0]
    for begins, ends in spans[1:]:
        if begins > end:
            busy, start = busy + end - start, begins
        end = max(end, ends)
    whole = end - spans[0][0]
    return 1 - (busy + end - start) / whole if whole else 0.0


def longest(spans) -> list[tuple[str, tuple[float, int]]]:
    """By name, (milliseconds, calls)."""
    total: dict[str, tuple[float, int]] = {}
    for name, start, end in spans:
        spent, calls = total.get(name, (0.0, 0))
        total[name] = spent + (end - start) / 1e3, calls + 1
    return sorted(total.items(), key=lambda item: -item[1][0])[:LONGEST]


def longest_on_host(recorded) -> list[tuple[str, tuple[float, int]]]:
    means = sorted(recorded.key_averages(), key=lambda mean: -mean.self_cpu_time_total)
    return [(mean.key, (mean.self_cpu_time_total / 1e3, mean.count)) for mean in means[:LONGEST]]
