"""Reads the step's losses and gradient norm on the host, once, before the first weight is updated. Then it decides whether to
take or drop the update, and whether to go on, go back or stop. Gradients are clipped here, too.

DeepSpeed computes the global gradient norm inside its step. Then it clips and updates one sub-group after another. Guard replaces
these methods. If the norm itself is not finite, DeepSpeed skips the update without calling our methods, and this is how we detect
it. Note: losses are gathered from all ranks and summed here, not reduced. So the sums are equal on every rank to the last bit, as
the decision must be. They also show which rank has a bad value.
"""

import math
from dataclasses import replace

import torch

from ted_scale.base.errors import NOT_FINITE, RunStopped
from ted_scale.checkpoints.progress import Progress
from ted_scale.distill import entropies
from ted_scale.distill.signal import Losses, Weights
from ted_scale.distill.stages import Stage, of_step
from ted_scale.health import spikes
from ted_scale.health.bad_step import Event, write_report
from ted_scale.health.rewind import Rewind, ways_back
from ted_scale.models.zero import forget_gradients
from ted_scale.ranks import signals
from ted_scale.ranks.agree import of_all_ranks

SIDES = {"decay": "student", "plain": "student", "filters": "filters"}  # by the role of a parameter group


class Guard:
    """Sums a step's losses on the device and reads them once, together with the norm. `alert(title, text)` alerts the user;
    `saved()` returns when no checkpoint is being written."""

    def __init__(self, engine, stage: Stage, alert, saved):
        self.engine, self.stage, self.alert, self.saved, self.settings = engine, stage, alert, saved, stage.run.health
        self.local: torch.Tensor | None = None
        self.tally: list[float] = []  # counts of the teacher's entropies
        self.unread, self.finite, self.stopping = False, True, False
        # If the teacher reads only some micro-batches, the total jumps with their number. Then CE is watched instead.
        self.watched = ("loss/total", 0) if stage.asks_every == 1 else ("loss/ce", 1)
        zero = engine.optimizer
        self.clip, self.update, self.measure = zero.unscale_and_clip_grads, zero._optimizer_step, zero._get_norm_groups
        zero.unscale_and_clip_grads, zero._optimizer_step = self.before_update, self.update_unless_dropped
        zero._get_norm_groups = self.measured
        self.sides = sides_of(zero)

    # During the step

    def add(self, losses: Losses) -> None:
        tally = [] if losses.tally is None else [losses.tally]
        self.terms = 4 + len(losses.layers)
        vector = torch.cat([torch.stack(losses[:4]).detach(), losses.layers, *tally])
        self.local = vector if self.local is None else self.local + vector

    def gather(self, progress: Progress, each: list[Weights]) -> None:
        """Gather the losses of all ranks. Call it after the last `add` and before the engine step that updates. `each` has the
        weights of the step's micro-batches."""
        self.before, self.each, self.unread = progress, each, True
        is_asked = float(signals.asked.is_set())
        asked = self.local.new_full((1,), is_asked)  # filled on the device, without a copy to wait for
        everyone = of_all_ranks(torch.cat([self.local, asked]))
        self.shares, self.tallies, self.asked = everyone.split(
            [self.terms, everyone.shape[1] - self.terms - 1, 1], dim=1
        )
        self.local = None

    # DeepSpeed calls these three methods inside its step: once for the norms, then twice for each sub-group

    def measured(self) -> list:
        norms = self.measure()
        self.apart = norms_apart(self.sides, norms)
        return norms

    def before_update(self, sub_group: int, norm) -> None:
        if self.unread:  # at the first sub-group, before anything is clipped
            self.read_numbers(norm)
        self.clip(sub_group, self.apart[self.sides[sub_group]])

    def update_unless_dropped(self, sub_group: int) -> None:
        if self.finite:
            self.update(sub_group)

    def read_numbers(self, norm) -> None:
        """Copy the step's numbers to the host. If they are bad, write a report of the step."""
        self.unread = False
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.shares.device)
        apart = torch.stack([norm, self.asked.sum(), *(n.to(norm.device) for n in self.apart.values())])
        self.norm, asked, *rest = torch.cat([apart, self.shares.sum(0), self.tallies.sum(0)]).tolist()
        self.norms, rest = rest[: len(self.apart)], rest[len(self.apart) :]
        self.sums, self.tally = rest[: self.terms], rest[self.terms :]
        self.stopping = asked > 0  # a signal on any rank: all ranks stop after the same step
        self.finite = all(v - v == 0 for v in (self.norm, *self.sums))
        self.before = spikes.begin(self.before, self.stage, self.each)
        self.median = spikes.spiked_over(spikes.state_of(self.before), self.settings, self.sums[self.watched[1]])
        if not self.finite or self.median is not None:
            fault = self.spike() if self.finite else self.not_finite()
            event = Event(self.before, self.stage, fault, self.norm, self.stage.terms(len(self.sums) - 4), self.shares)
            self.fault = f"step {self.before.step + 1}: {fault}; {write_report(self.engine, event)}"

    def spike(self) -> str:
        name, place = self.watched
        loss, steps = self.sums[place], len(spikes.state_of(self.before).losses)
        return f"{name} is {loss:.4g}, {loss / self.median:.3g} times its median over {steps} steps"

    def not_finite(self) -> str:
        """The first term that is not finite. The parts of the loss come before their total. If all are finite, it is the
        gradient."""
        names, rows = self.stage.terms(len(self.sums) - 4), self.shares.tolist()
        for i in (*range(1, len(names)), 0):
            for rank, row in enumerate(rows):
                if not math.isfinite(row[i]):
                    return f"{names[i]} of rank {rank} must be finite, but is {row[i]}"
        together = {**dict(zip(names, self.sums, strict=True)), "optim/grad_norm": "inf or nan"}
        name, value = next((n, v) for n, v in together.items() if isinstance(v, str) or not math.isfinite(v))
        return f"{name} of all ranks together must be finite, but is {value}"

    # After the step

    def decide(self) -> Progress:
        """Decide by the step's numbers: go on, go back, or stop. Returns the progress after the step."""
        if self.unread:  # DeepSpeed did not call us, so the norm is not finite
            self.read_numbers(math.inf)
        progress = self.before.advanced(self.stage.samples_per_step, self.stage.run.data.seq_len)
        if not self.finite:
            return self.after_dropped_step(progress)
        if self.median is not None:
            self.after_spike(progress)
        if self.tally:
            floor = entropies.floor_of(self.tally, self.stage.run.loss.skip_low_entropy)
            progress = progress if floor is None else replace(progress, entropy_floor=floor)
        return spikes.taken(progress, self.settings, self.sums[self.watched[1]])

    def after_dropped_step(self, progress: Progress) -> Progress:
        state, limit = spikes.state_of(progress), self.settings.max_skipped
        if self.settings.on_nonfinite == "stop":
            raise self.stopped("lower train.lr or look at the data of this step, then start the same command again")
        if state.in_a_row == limit:
            raise self.stopped(f"health.max_skipped = {limit} steps before it were dropped as well: lower train.lr")
        if progress.skipped == (limit := self.settings.max_skipped_all):
            raise self.stopped(
                f"health.max_skipped_all = {limit} steps of the run were dropped before it: lower train.lr"
            )
        forget_gradients(self.engine.module)  # a parameter without a new gradient would reuse this one
        progress = spikes.dropped(progress)
        row = f"{state.in_a_row + 1} in a row, {progress.skipped} in all"
        self.alert("a step was skipped", f"{self.fault}; its update is dropped, {row}")
        return progress

    def after_spike(self, progress: Progress) -> None:
        rewinds, limit = spikes.state_of(progress).rewinds, self.settings.max_rewinds
        if self.settings.on_spike == "alert":
            self.alert("loss spike", self.fault)
            return
        self.saved()  # otherwise the newest checkpoint would depend on chance
        checkpoints = ways_back(self.stage.run.folder, self.stage.first_step, rewinds)
        if not checkpoints:
            self.alert("loss spike", f"{self.fault}; the run goes on: this stage has no checkpoint to go back to yet")
            return
        if rewinds == limit:
            raise self.stopped(f"health.max_rewinds = {limit} rewinds led to no step past it: lower train.lr")
        onwards = (
            f"back to {checkpoints[0].name} and on with sample {progress.samples}, rewind {rewinds + 1} of {limit}"
        )
        self.alert("loss spike, going back", f"{self.fault}; {onwards}")
        raise Rewind(checkpoints, progress)

    def stopped(self, way_out: str) -> RunStopped:
        kept = "" if self.finite else "no weight was updated and "
        over = "loss spikes" if self.finite else NOT_FINITE
        return RunStopped(f"{self.fault}; {kept}the last checkpoint is intact: {way_out}", over)

    def read(self) -> dict[str, float]:
        """The numbers of the step, already on the host. A dropped step has none, because they would spoil every mean."""
        rate = {"optim/lr": self.engine.optimizer.param_groups[0]["lr"]}
        if not self.finite:
            return rate
        norms = dict(zip((f"optim/grad_norm_{side}" for side in self.apart), self.norms, strict=True))
        norms = {"optim/grad_norm": self.norm, **(norms if len(norms) > 1 else {})}
        kept = entropies.kept_share(self.tally) if self.tally else None
        shares = {} if kept is None else {"loss/kl_share": kept}
        return {**self.stage.name_losses(self.sums, of_step(self.each)), **shares, **norms, **rate}


def sides_of(zero) -> list[str]:
    """Student or filters, for each sub-group of a ZeRO-3 optimizer. No sub-group belongs to two parameter groups."""
    return [SIDES[zero.param_groups[group]["role"]] for group in zero.sub_group_to_group_id.values()]


def norms_apart(sides: list[str], norms: list) -> dict[str, torch.Tensor]:
    """The gradient norm of each side, from the norms of its sub-groups. DeepSpeed computes these for its global norm. They stay
    where DeepSpeed has them (on the host for offloaded gradients), so nothing waits for a copy."""
    parts: dict[str, list] = {side: [] for side in sides}
    for side, norm in zip(sides, norms, strict=True):
        parts[side].append(torch.as_tensor(norm, dtype=torch.float32))
    return {side: torch.linalg.vector_norm(torch.stack(part)) for side, part in parts.items()}
