"""What tools/bench/step.py measures in a step: the time of its parts, and the bytes that ranks send each other.

Parts are measured from outside, by wrappers around functions of DeepSpeed and ours. So the trainer needs no clock for each
part, and steps without wrappers are timed as they are.
"""

import contextlib
import time
from collections import Counter, defaultdict

import torch


class Stopwatch:
    """Seconds by part; time in an inner part is not counted for the outer one. `clock`: of the world, or time.process_time, which
    stands still while others have the cores."""

    def __init__(self, device: torch.device, *, detailed: bool = False, clock=time.perf_counter):
        self.device, self.detailed, self.seconds, self.inner = device, detailed, defaultdict(float), []
        self.clock = clock

    @contextlib.contextmanager
    def part(self, name: str):
        start = self.now()
        self.inner.append(0.0)
        try:
            yield
        finally:
            took = self.now() - start
            self.seconds[name] += took - self.inner.pop()
            if self.inner:
                self.inner[-1] += took

    def now(self) -> float:
        if self.device.type == "cuda":  # waits for the work of each part, so the sum of parts is longer than a step
            torch.cuda.synchronize(self.device)
        return self.clock()

    def around(self, function, name: str):
        def timed(*arguments, **named):
            with self.part(name):
                return function(*arguments, **named)

        return timed


@contextlib.contextmanager
def replaced(places: list[tuple], around):
    """Inside, `owner.method` is replaced by `around(method, name)`, for every (owner, method, name)."""
    before = [(owner, method, vars(owner).get(method)) for owner, method, _ in places]
    for owner, method, name in places:
        setattr(owner, method, around(getattr(owner, method), name))
    try:
        yield
    finally:
        for owner, method, own in before:
            setattr(owner, method, own) if own is not None else delattr(owner, method)


def places(engine, teacher) -> list[tuple]:
    """The functions that make up the parts of a step. Time in none of them is `the rest`, mostly hooks."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    student, zero = engine.module, engine.optimizer
    found = [(teacher.body, "forward", "teacher")] if hasattr(teacher, "body") else []
    found += [(student, "run_network", "student forward"), (student, "logit_losses", "losses")]
    found += [(student, "layer_loss", "losses"), (student, "filter_losses", "losses"), (engine, "backward", "backward")]
    gathers = ((Coordinator, "fetch_sub_module"), (Coordinator, "release_sub_module"))
    gathers += ((GatheredParameters, "__enter__"), (GatheredParameters, "__exit__"))
    found += [(owner, method, "gathers") for owner, method in gathers]
    reduction = ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue")
    found += [(zero, method, "reduction") for method in reduction]
    return [*found, (engine, "step", "optimizer")]


class Traffic:
    """What one rank receives: how often each weight was gathered, and the bytes of reductions."""

    def __init__(self, engine, teacher):
        sides = {"student": engine.module}
        sides |= {"teacher": teacher.body} if hasattr(teacher, "body") else {}
        self.times, self.calls, self.reduced = Counter(), Counter(), 0
        self.weights = {p: (s, n) for s, m in sides.items() for n, p in m.named_parameters() if hasattr(p, "ds_id")}

    def places(self) -> list[tuple]:
        from deepspeed.comm import comm

        reductions = [(comm.cdb, name, name) for name in ("reduce_scatter_tensor", "all_reduce")]
        return [(p, "all_gather_coalesced", "gather") for p in self.weights] + reductions

    def around(self, function, name: str):
        def counted(*arguments, **named):
            self.calls[name] += 1
            if name == "gather":
                weights = list(arguments[0])
                self.times.update(weights)
                return function(weights, *arguments[1:], **named)
            self.reduced += max(v.nbytes for v in (*arguments, *named.values()) if torch.is_tensor(v))
            return function(*arguments, **named)

        return counted

    def lines(self, micro_steps: int) -> list[str]:
        """Beside the minimum: each weight once a micro-step (a trained one twice if it cannot stay whole until backward), its
        fp32 gradient once."""
        least, gathered, gradients = Counter(), Counter(), 0
        for p, (side, _) in self.weights.items():
            whole = p.ds_numel * p.element_size()
            least[side] += whole
            gathered[side] += whole * self.times[p] / micro_steps
            gradients += 4 * p.ds_numel * p.requires_grad
        said = [f"{side} gathered {gathered[side] / 1e6:.1f} MB (least {least[side] / 1e6:.1f})" for side in least]
        said += [f"gradients reduced {self.reduced / micro_steps / 1e6:.1f} MB (least {gradients / 1e6:.1f})"]
        calls = ", ".join(f"{name} {count / micro_steps:.0f}" for name, count in self.calls.items())
        return [f"  a micro-step: {'; '.join(said)} | calls: {calls}", *self.more_often(micro_steps)]

    def more_often(self, micro_steps: int) -> list[str]:
        found = Counter()
        for p, (side, name) in self.weights.items():
            extra = self.times[p] / micro_steps - (2 if p.requires_grad else 1)
            if extra > 0:
                found[f"{side} {name}"] = extra * p.ds_numel * p.element_size()
        return [f"  more than once a pass: {name}, {extra / 1e6:.1f} MB more" for name, extra in found.most_common(8)]
