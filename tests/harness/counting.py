"""What a device would be asked for: DeepSpeed runs on the CPU and is told that it is on CUDA.

On a CPU DeepSpeed never waits for the device and asks for no stream, so that nothing of it could be counted. Here its
accelerator answers as CUDA's does; streams and events are stand-ins that count who waits for them.
"""

import contextlib
from dataclasses import dataclass, field

import torch


@dataclass
class Counts:
    """Since the last `clear`: waits for the whole device and for a stream, and what was sent."""

    device_waits: int = 0
    stream_waits: int = 0
    gathered: list[int] = field(default_factory=list)  # bytes of each all-gather's result
    crossed: list[int] = field(default_factory=list)  # of these, between nodes of two ranks
    late: list[str] = field(default_factory=list)  # modules whose weights were not asked for before they were needed
    reduced: list[int] = field(default_factory=list)

    def clear(self) -> None:
        self.__init__()


class Stand:
    """A stream or an event of a device that is always done."""

    def __init__(self, counts: Counts):
        self.counts = counts

    def synchronize(self) -> None:
        self.counts.stream_waits += 1

    def query(self) -> bool:
        return True

    def record(self, *_) -> None: ...

    def wait_stream(self, _) -> None: ...


@contextlib.contextmanager
def as_on_cuda():
    """Counts of what the engines that are built and run inside ask of a CUDA device."""
    import deepspeed.comm.comm as comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    counts = Counts()
    accelerator, network = get_accelerator(), comm.cdb
    fetch = PartitionedParameterCoordinator._fetch_sub_module_impl
    gather, gather_list, reduce = network.all_gather_into_tensor, network.all_gather, network.reduce_scatter_tensor

    def synchronize(*_):
        counts.device_waits += 1

    def fetched(coordinator, module, forward, is_leaf):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if any(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in module.parameters(recurse=is_leaf)):
            counts.late.append(f"{type(module).__name__} {'forward' if forward else 'backward'}")
        return fetch(coordinator, module, forward, is_leaf)

    def count(size: int, group=None, **_) -> None:
        counts.gathered.append(size)
        if len({rank // 2 for rank in torch.distributed.get_process_group_ranks(group)}) > 1:
            counts.crossed.append(size)

    def gathering(output_tensor, input_tensor, **named):
        count(output_tensor.nbytes, **named)
        return gather(output_tensor, input_tensor, **named)

    def gathering_list(tensor_list, tensor, **named):
        count(sum(t.nbytes for t in tensor_list), **named)
        return gather_list(tensor_list, tensor, **named)

    def reducing(output_tensor, input_tensor, **named):
        counts.reduced.append(input_tensor.nbytes)
        return reduce(output_tensor, input_tensor, **named)

    answers = {
        "is_synchronized_device": lambda: False, "resolves_data_dependency": lambda: False,
        "handles_memory_backpressure": lambda: False, "use_host_timers": lambda: True, "synchronize": synchronize,
        "current_stream": lambda *_: Stand(counts), "default_stream": lambda *_: Stand(counts),
    }  # fmt: skip
    kind = type(accelerator)
    properties = {name: getattr(kind, name) for name in ("Stream", "Event")}
    record_stream = torch.Tensor.record_stream
    try:
        for name, answer in answers.items():
            setattr(accelerator, name, answer)
        for name in properties:
            setattr(kind, name, property(lambda _: lambda *_, **__: Stand(counts)))
        torch.Tensor.record_stream = lambda *_: None
        PartitionedParameterCoordinator._fetch_sub_module_impl = fetched
        network.all_gather_into_tensor, network.all_gather = gathering, gathering_list
        network.reduce_scatter_tensor = reducing
        yield counts
    finally:
        for name in answers:
            delattr(accelerator, name)
        for name, was in properties.items():
            setattr(kind, name, was)
        torch.Tensor.record_stream = record_stream
        PartitionedParameterCoordinator._fetch_sub_module_impl = fetch
        network.all_gather_into_tensor, network.all_gather, network.reduce_scatter_tensor = gather, gather_list, reduce
