"""Measures a sample of tokens of a step, on rank 0: one pair or a part of the output at a time, so that `vitals.every` steps share
the cost. The head is the larger part of a small model, so the tokens of the output are those of PARTS steps.

The student's forward gives it what is whole there anyway, and hooks in the ordinary backward the gradients. So it asks no other
rank, and changes no number of the run. Note: results go to the host without a wait. The guard's read of the step, which comes
after them on the same stream, is what makes them there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ted_scale.config.run import Run
from ted_scale.data.order import mix
from ted_scale.kernels.formulas.logits import LogitLoss
from ted_scale.kernels.products import project
from ted_scale.kernels.tokens import valid_weights
from ted_scale.vitals import alarms, head, pairs

PARTS, TOKENS_OF_PART = 16, 32  # of the output
OUTPUT = range(-PARTS, 0)  # the items beside the pairs
TOKENS_OF_PAIR = 256
RANKS = ("rank_states", "rank_filter_s", "rank_filter_t")


class Sample(NamedTuple):
    """Of a micro-batch: what is measured, and the tokens; those that count come first."""

    items: list[int]
    rows: torch.Tensor
    counted: torch.Tensor
    labels: torch.Tensor

    @property
    def parts(self) -> list[int]:
        return [item for item in self.items if item in OUTPUT]

    def of(self, states, tokens: int) -> torch.Tensor:
        """0 where a token does not count, so that not even a NaN in it reaches a number."""
        return torch.where(self.counted[:tokens, None], states.detach()[self.rows[:tokens]], 0)


class Vitals:
    """`begin` a step, `open` each of its micro-batches, `send` after its last backward, and `read` after the guard."""

    def __init__(self, run: Run, count: int, *, learns_filters: bool):
        first = not dist.is_initialized() or dist.get_rank() == 0
        on = first and run.vitals.every and run.method != "ce" and not learns_filters
        self.run, self.items = run, [*OUTPUT, *range(count)] if on else []
        self.waiting: list[int] = []
        self.now: Sample | None = None
        self.taken: list[int] = []  # in this step
        self.found: dict[str, torch.Tensor] = {}
        self.sent: torch.Tensor | None = None  # `found` as it comes to the host
        self.sums: torch.Tensor | None = None
        self.f: LogitLoss | None = None  # what the sums' gradients are of
        self.grams: dict[int, torch.Tensor] = {}
        self.parts: dict[int, torch.Tensor] = {}  # sums of the output's parts in this interval, on the host
        self.history: dict[str, list[float]] = {}
        self.uniform, self.raised, self.seed = math.inf, set[str](), 0

    def begin(self, step: int) -> None:
        """What is due at this step, and what could not be measured when it was: the teacher was not asked, a term was off, or the
        update was dropped."""
        due = due_at(step, self.run.vitals.every, self.items)
        self.waiting = list(dict.fromkeys([*self.waiting, *due]))
        self.seed, self.taken, self.now = mix(self.run.seed, step), [], None
        self.found, self.sent, self.sums, self.grams = {}, None, None, {}

    def open(self, batch, weights) -> None:
        """Before the forward of a micro-batch. The first of a step that has the terms is the one that is measured."""
        self.now = None
        able = [item for item in self.waiting if (weights.kl if item in OUTPUT else weights.layer)]
        if not able or self.taken or not torch.is_grad_enabled():
            return
        self.taken = able[: a_step(len(self.items), self.run.vitals.every)]
        self.waiting = [item for item in self.waiting if item not in self.taken]
        labels, valid = batch.labels_BT.flatten(), valid_weights(batch.labels_BT, batch.weights_BT).flatten() > 0
        rows = drawn(valid, PARTS * TOKENS_OF_PART, self.seed)
        self.now = Sample(self.taken, rows, valid[rows], labels[rows])

    # In the student's forward

    def watch(self, states: list, flat: list) -> None:
        """`flat` are what the layer losses read of the matched `states`, and nothing else reads: what arrives at them is the layer
        loss's own gradient."""
        for k in self.now.items if self.now else ():
            if k not in OUTPUT and flat[k].requires_grad:
                self.hook(k, self.now, states[k], flat[k])

    def hook(self, k: int, sample: Sample, state, flat) -> None:
        own: list[torch.Tensor] = []

        def take(gradient):
            own.append(sample.of(gradient, TOKENS_OF_PAIR))

        @torch.no_grad()
        def compare(gradient):
            if own:
                total = sample.of(gradient.flatten(0, 1), TOKENS_OF_PAIR)
                self.keep(pairs.pull(own.pop(), total, sample.counted[:TOKENS_OF_PAIR]), f"/{k}")

        flat.register_hook(take)
        state.register_hook(compare)

    @torch.no_grad()
    def pair(self, k: int, states, student: tuple, teacher: tuple) -> None:
        """`student` and `teacher` are (states, filter's weight, bias), with whole weights; None for what is filtered already."""
        if not self.now or k not in self.now.items:
            return
        s, t = (project(self.now.of(h, TOKENS_OF_PAIR), w, b) for h, w, b in (student, teacher))
        counted = self.now.counted[:TOKENS_OF_PAIR]
        self.keep(pairs.closeness(s, t, counted), f"/{k}")
        sides = (self.now.of(states, TOKENS_OF_PAIR), s, t)
        self.grams[k] = torch.stack([pairs.gram(x, counted) for x in sides])

    @torch.no_grad()
    def output(self, h_s, w_s, h_t, w_t, settings: dict, weights) -> None:
        """With both heads whole; `settings` are those of linear_kl_ce."""
        if not self.now or not self.now.parts:
            return
        names, tokens = ("head_bias", "softcap", "logit_scale"), TOKENS_OF_PART * len(self.now.parts)
        student, teacher = (
            head.Side(self.now.of(h, tokens), w, *(settings[f"{name}_{side}"] for name in names))
            for h, w, side in ((h_s, w_s, "s"), (h_t, w_t, "t"))
        )
        loss, self.uniform = self.run.loss, math.log(len(w_t))
        caps, scales = (student.softcap or 0.0, teacher.softcap or 0.0), (student.scale, teacher.scale)
        covers = len(w_t) >= len(w_s)
        f = LogitLoss(loss.temperature, weights.kl, weights.ce, *caps, *scales, covers, loss.divergence, loss.top_k)
        floor = weights.floor if loss.skip_low_entropy else None
        self.f = f
        self.sums = head.sums(student, teacher, self.now.labels[:tokens], self.now.counted[:tokens], f, floor)

    def keep(self, numbers: dict[str, torch.Tensor], end: str = "") -> None:
        self.found |= {f"vitals/{key}{end}": value for key, value in numbers.items()}

    # After the backward

    def send(self) -> None:
        """Begins to copy what was measured to the host."""
        self.now = None
        if self.found:
            self.sent = torch.stack(list(self.found.values())).to("cpu", non_blocking=True)
            self.grams = {k: grams.to("cpu", non_blocking=True) for k, grams in self.grams.items()}
        if self.sums is not None:
            self.sums = self.sums.to("cpu", non_blocking=True)

    def read(self, step: int, finite: bool, alert: Callable[[str, str], None]) -> dict[str, float]:
        """The numbers of the step that was done, once the host has waited for something later. A dropped step has none; what it
        measured is measured again."""
        if not finite:
            self.waiting = [*self.taken, *self.waiting]
            return {}
        numbers = self.of_pairs(self.sent) if self.sent is not None else {}
        numbers |= self.of_output(self.sums, self.f) if self.sums is not None and self.f else {}
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
        if numbers:
            self.judge(step, numbers, alert)
        return numbers

    def of_pairs(self, sent: torch.Tensor) -> dict[str, float]:
        numbers = dict(zip(self.found, sent.tolist(), strict=True))
        for k, (states, s, t) in self.grams.items():
            numbers[f"vitals/cka/{k}"] = pairs.cka(s, t)
            ranks = zip(RANKS, (states, s, t), strict=True)
            numbers |= {f"vitals/{name}/{k}": pairs.effective_rank(gram) for name, gram in ranks}
        return numbers

    def of_output(self, sums: torch.Tensor, f: LogitLoss) -> dict[str, float]:
        """Once all parts of an interval are there. A process that starts within one waits for the next."""
        parts = [item for item in self.taken if item in OUTPUT]
        if OUTPUT[0] in parts:
            self.parts = {}
        self.parts |= dict.fromkeys(parts, sums.double() / len(parts))
        if len(self.parts) < PARTS:
            return {}
        found = head.numbers(torch.stack(list(self.parts.values())).sum(0), f)
        return {f"vitals/{key}": value for key, value in found.items()}

    def judge(self, step: int, numbers: dict[str, float], alert: Callable[[str, str], None]) -> None:
        """Alerts of each cause once, until it is gone."""
        for key, value in numbers.items():
            self.history[key] = [*self.history.get(key, ()), value][-alarms.KEPT :]
        found = alarms.alarms(self.history, self.uniform)
        for cause in found.keys() - self.raised:
            alert(f"vitals: {cause}", f"step {step}: {found[cause]}")
        self.raised = {*found}


def a_step(items: int, every: int) -> int:
    """How many of them a step measures at most."""
    return -(-items // every)


def due_at(step: int, every: int, items: list[int]) -> list[int]:
    """Of `items`, those of this step, counted from 0: each once in `every` steps, evenly, the last one at their end."""
    return [item for k, item in enumerate(items, 1) if step % every == -(-k * every // len(items)) - 1]


def drawn(valid, count: int, seed: int) -> torch.Tensor:
    """So many of the tokens, by the seed alone: those that count first. The device waits for nothing."""
    order = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed % 2**63))
    place = order.to(valid.device, non_blocking=True) + len(valid) * ~valid
    return place.topk(min(count, len(valid)), largest=False).indices
