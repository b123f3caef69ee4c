"""Stages, learning rate and loss weights as pure functions of the step: a resume needs no scheduler state.

One number is not a function of the step: the scale of the layer loss. balance.py computes it, and a checkpoint keeps it.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from ted_scale.config.method import Schedule, Train, on_between
from ted_scale.config.run import Run
from ted_scale.data.order import mix
from ted_scale.distill.sampling import drawn_pairs
from ted_scale.distill.signal import Weights
from ted_scale.models.zero import forget_gradients


@dataclass(frozen=True)
class Stage:
    """A range of optimizer steps with one set of trained parameters. Every stage reads the data from position 0, so stage II of
    any two runs reads the same tokens. Values that are the same in every step are computed once."""

    name: str  # "filters" or "student"
    first_step: int
    steps: int
    run: Run

    @cached_property
    def last_step(self) -> int:
        return self.first_step + self.steps

    @cached_property
    def samples_per_step(self) -> int:
        return self.run.train.tokens_per_step // self.run.data.seq_len

    @cached_property
    def learns_filters(self) -> bool:
        return self.name == "filters"

    def validates(self, step: int) -> bool:
        every = self.run.validation.every
        due = step == self.last_step or (every > 0 and step % every == 0)
        return due and not self.learns_filters  # stage I does not change the student

    def asks_suite(self, step: int) -> bool:
        """Whether the suite is asked after this step; also before the first one. It depends on the step alone, so a resume asks
        at the same steps."""
        validation = self.run.validation
        every = validation.every * validation.suite_every
        due = step in (self.first_step, self.last_step) or (every > 0 and step % every == 0)
        return bool(validation.suite) and due and not self.learns_filters

    def writes_samples(self, step: int) -> bool:
        """Whether student and teacher write samples of text."""
        every = self.run.samples.every
        due = step in (self.first_step, self.last_step) or (every > 0 and step % every == 0)
        return every > 0 and due and not self.learns_filters

    def saves(self, step: int) -> bool:
        return step == self.last_step or step % self.run.checkpoint.every == 0

    def verifies(self, step: int) -> bool:
        """Whether replicas are compared after this step. They are also compared before a save, so no checkpoint is written from
        replicas that differ."""
        every = self.run.health.replicas_every
        return every > 0 and (step % every == 0 or self.saves(step))

    @cached_property
    def adapts(self) -> bool:
        return self.run.adapts and not self.learns_filters

    def border(self, step: int) -> int:
        """The blend stays as it is from `step` up to this step: the next measurement, or the end of the stage."""
        if not self.adapts:
            return self.last_step
        every = self.run.data.blend.every
        return min(self.last_step, step + every - (step - self.first_step) % every)

    @cached_property
    def balances(self) -> bool:
        return self.run.balances and not self.learns_filters

    @cached_property
    def terms_written(self) -> list[float | Schedule]:
        """The run file's weights of ce, kl and layer. 0 for terms that the method does not have."""
        return [self.run.terms.get(term, 0.0) for term in ("ce", "kl", "layer")]

    @cached_property
    def tokens(self) -> int:
        return self.run.train.tokens

    def weights(self, step: int, scale: float = 1.0) -> Weights:
        """Loss weights of the step after `step` steps of the run. `scale` is the scale of the layer loss (balance.py)."""
        if self.learns_filters:
            return Weights(ce=0.0, kl=0.0, layer=1.0, sample_seed=mix(self.run.seed, step))
        now = ((step - self.first_step) / self.steps, self.tokens, self.rate(step))
        ce, kl, layer = (weight_at(weight, *now) for weight in self.terms_written)
        return Weights(ce, kl, scale * layer)

    @cached_property
    def asks_every(self) -> int:
        return 1 if self.learns_filters else self.run.asks_every

    def of_micro_batches(self, step: int, count: int, scale: float = 1.0, floor: float = 0.0) -> list[Weights]:
        """The weights of each micro-batch of a step. The teacher reads one micro-batch in `asks_every`, the same ones on all
        ranks. Its terms are multiplied by `asks_every` there. So their mean over steps is the same as with a teacher that reads
        all of them."""
        weights, every = self.weights(step, scale)._replace(floor=floor), self.asks_every
        if every == 1:
            return [weights] * count
        first = (step - self.first_step) * count
        asked, without = (
            weights._replace(kl=weights.kl * every, layer=weights.layer * every),
            Weights(weights.ce, 0.0, 0.0),
        )
        return [without if (first + k) % every else asked for k in range(count)]

    def terms(self, layers: int) -> list[str]:
        """The keys of all sums that the guard gathers, also for terms that are off."""
        sides, each = (("filter_t", "filter_s"), layers // 2) if self.learns_filters else (("layer",), layers)
        of_layers = [f"loss/{side}/{k}" for side in sides for k in range(each)]
        return ["loss/total", "loss/ce", "loss/kl", "loss/layer", *of_layers]

    def name_losses(self, sums: list[float], weights: Weights) -> dict[str, float]:
        """The guard's sums by key, without terms that were off."""
        total, ce, kl, layer, *layers = sums
        if self.learns_filters:
            half = len(layers) // 2
            sides = {"filter_t": layers[:half], "filter_s": layers[half:]}
            pairs = drawn_pairs(self.run.filters, half, weights.sample_seed)
            return {"loss/total": total, **{f"loss/{s}/{k}": vs[k] for s, vs in sides.items() for k in pairs}}
        kl, layer, *layers = (value / weights.asked for value in (kl, layer, *layers))
        named = {"loss/total": total}
        named |= {"loss/ce": ce} if weights.ce else {}
        named |= {"loss/kl": kl} if weights.kl else {}
        if not weights.layer:
            return named
        scaled = {"loss/layer_weight": weights.layer / self.asks_every} if self.balances else {}
        return named | {"loss/layer": layer, **scaled, **{f"loss/layer/{k}": v for k, v in enumerate(layers)}}

    def rate(self, step: int) -> float:
        """The learning rate as a share of its peak."""
        done = step - self.first_step
        if self.learns_filters:
            warmup = max(1, self.steps // 20)
            return ramp(done, warmup) * cosine(max(0, done - warmup) / max(1, self.steps - warmup))
        return rate_at(self.run.train, done)


def stages_of(run: Run) -> list[Stage]:
    if run.method != "ted" or run.filters.from_run or not run.filters.steps:
        return [Stage("student", 0, run.train.steps, run)]
    return [Stage("filters", 0, run.filters.steps, run), Stage("student", run.filters.steps, run.train.steps, run)]


def set_rates(engine, share: float, each: list[Weights]) -> None:
    """Set every group's learning rate. While the layer loss is off, filters have rate 0 and no gradient. Note: only the first
    micro-batch of a step overwrites DeepSpeed's gradient of the last step. If it has no layer loss, the filters' gradient is
    removed here."""
    for group in engine.optimizer.param_groups:
        off = group["role"] == "filters" and not any(weights.layer for weights in each)
        group["lr"] = 0.0 if off else group["peak_lr"] * share
    if not each[0].layer and engine.module.filters_s is not None:
        forget_gradients(engine.module.filters_s)


def weight_at(weight: float | Schedule, fraction: float, tokens: int = 1, rate: float = 1.0) -> float:
    """The weight after a fraction of a stage that has `tokens` tokens. `rate` is the learning rate as a share of its peak."""
    if not isinstance(weight, Schedule):
        return float(weight)
    begins, ends = on_between(weight, tokens)
    if not begins <= fraction < ends:
        return 0.0
    if weight.shape == "rate":
        return weight.start * rate
    if weight.shape == "constant" or weight.end is None:
        return weight.start
    way = min(1.0, fraction * tokens / weight.over_tokens) if weight.over_tokens else fraction
    progress = way if weight.shape == "linear" else 1 - cosine(way)
    return weight.start + (weight.end - weight.start) * progress


def of_step(each: list[Weights]) -> Weights:
    """The weights of a step, computed from those of its micro-batches."""
    asked = [weights for weights in each if weights.asks]
    return asked[0]._replace(asked=len(asked) / len(each)) if asked else each[0]


def rate_at(train: Train, done: int) -> float:
    """A warm-up, then one of: cosine to min_lr; constant, with a linear decay over the last decay_fraction (wsd); constant."""
    floor = train.min_lr / train.lr
    left = (done - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    if done < train.warmup_steps or train.schedule == "constant":
        return ramp(done, train.warmup_steps)
    if train.schedule == "cosine":
        return floor + (1 - floor) * cosine(left)
    decayed = max(0.0, (done / train.steps - (1 - train.decay_fraction)) / train.decay_fraction)
    return 1 - (1 - floor) * decayed


def ramp(done: int, warmup: int) -> float:
    return min(1.0, (done + 1) / warmup) if warmup else 1.0


def cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
