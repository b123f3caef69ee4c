"""What tools/bench/step.py looks at: a step's parts on a stopwatch, the bytes that ranks send each other, and plain torch.

The surprise: parts are told apart from outside, by functions put around DeepSpeed's and ours while a step is looked at, so
that the trainer has no clock for each of them and its undisturbed steps are timed without.
"""

import contextlib
import time
from collections import Counter, defaultdict

import torch
from torch.nn import functional


class Stopwatch:
    """Seconds by part; what a part spends inside another is the other's."""

    def __init__(self, device: torch.device, *, detailed: bool = False):
        self.device, self.detailed, self.seconds, self.inner = device, detailed, defaultdict(float), []

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
        if self.device.type == "cuda":  # a part ends when its work has: so the sum of parts is longer than a step
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def around(self, function, name: str):
        def timed(*arguments, **named):
            with self.part(name):
                return function(*arguments, **named)

        return timed


@contextlib.contextmanager
def replaced(places: list[tuple], around):
    """`owner.method` stands behind `around(method, name)` inside, for every (owner, method, name)."""
    before = [(owner, method, vars(owner).get(method)) for owner, method, _ in places]
    for owner, method, name in places:
        setattr(owner, method, around(getattr(owner, method), name))
    try:
        yield
    finally:
        for owner, method, own in before:
            setattr(owner, method, own) if own is not None else delattr(owner, method)


def places(engine, teacher) -> list[tuple]:
    """Where the parts of a step begin and end; what is in none of them is `the rest`, hooks above all."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    student, zero = engine.module, engine.optimizer
    found = [(teacher.engine.module, "forward", "teacher")] if hasattr(teacher, "engine") else []
    found += [(student, "run_network", "student forward"), (student, "logit_losses", "losses")]
    found += [(student, "layer_loss", "losses"), (student, "filter_losses", "losses"), (engine, "backward", "backward")]
    gathers = ((Coordinator, "fetch_sub_module"), (Coordinator, "release_sub_module"))
    gathers += ((GatheredParameters, "__enter__"), (GatheredParameters, "__exit__"))
    found += [(owner, method, "gathers") for owner, method in gathers]
    reduction = ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue")
    found += [(zero, method, "reduction") for method in reduction]
    return [*found, (engine, "step", "optimizer")]


class Traffic:
    """What one rank is sent: how often each weight was gathered, and the bytes of reductions."""

    def __init__(self, engine, teacher):
        sides = {"student": engine.module}
        sides |= {"teacher": teacher.engine.module} if hasattr(teacher, "engine") else {}
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
        """Beside the least there is: a weight once a micro-step (one that trains twice where it is too much to stay whole until
        backward), its fp32 gradient once."""
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


class PlainTorch:
    """The same step as people write it: transformers' models with SDPA, losses on whole fp32 logits, fused AdamW."""

    def __init__(self, run, teacher: str, student: str, device: torch.device):
        from transformers import AutoModelForCausalLM

        def load(path: str):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
            return model.to(device)

        self.run, self.teacher, self.student = run, load(teacher).requires_grad_(False).eval(), load(student).train()
        train = run.train
        settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
        self.optimizer = torch.optim.AdamW(self.student.parameters(), **settings, fused=True)

    def step(self, micro_batches, watch: Stopwatch) -> float:
        count = sum((b.labels_BT >= 0).sum() for b in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with watch.part("teacher"), torch.no_grad():
                logits_t = self.teacher(batch.tokens_BT, use_cache=False).logits
            with watch.part("student forward"):
                logits_s = self.student(batch.tokens_BT, use_cache=False).logits
            with watch.part("losses"):
                loss = plain_loss(logits_s, logits_t, batch.labels_BT) / count
            with watch.part("backward"):
                loss.backward()
            total += loss.item()
        with watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.run.train.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


def plain_loss(logits_s, logits_t, labels_BT):
    log_q, log_p = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (logits_s, logits_t))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    labels = labels_BT.flatten()
    return kl[labels >= 0].sum() + functional.nll_loss(log_q, labels, ignore_index=-100, reduction="sum")


class Alone:
    """The parts that a step of kd cannot do without, each by itself on plain modules: bodies, our losses, AdamW."""

    def __init__(self, plain: PlainTorch):
        self.plain = plain

    def step(self, micro_batches, watch: Stopwatch) -> None:
        student, teacher = self.plain.student, self.plain.teacher
        for batch in micro_batches:
            with watch.part("teacher"), torch.no_grad():
                last_t = teacher.model(batch.tokens_BT, use_cache=False)[0].flatten(0, 1)
            with watch.part("student body"):
                last_s = student.model(batch.tokens_BT, use_cache=False)[0]
            states = last_s.detach().flatten(0, 1).requires_grad_()
            with watch.part("KL + CE"):
                self.losses(states, last_t, batch)
            with watch.part("student body"):
                last_s.backward(states.grad.view_as(last_s))
        with watch.part("AdamW"):
            self.plain.optimizer.step()
            self.plain.optimizer.zero_grad(set_to_none=True)

    def losses(self, states, last_t, batch) -> None:
        from ted_scale.kernels import linear_kl_ce

        heads = [model.get_output_embeddings().weight for model in (self.plain.student, self.plain.teacher)]
        labels, weights = batch.labels_BT.flatten(), batch.weights_BT.flatten()
        linear_kl_ce(states, heads[0], last_t, heads[1], labels, weights, denom=weights.sum())[0].backward()
