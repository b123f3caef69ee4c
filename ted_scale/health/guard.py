"""The step's one host read of ours, between the gradient norm and the first weight update, and what follows from it: the
update is taken or dropped, the run goes on, goes back or stops.

DeepSpeed computes the global gradient norm inside its step and then clips and updates sub-group by sub-group; Guard stands
before both. Where the norm itself is not finite DeepSpeed skips the update in silence: nobody then came by, which is how we
notice. The surprise: losses are gathered from all ranks and summed here, not reduced. That makes the sums the same on every
rank to the last bit, as a decision that follows from them must be, and tells whose a bad one is.
"""

import math

import torch

from ted_scale.base.errors import RunStopped
from ted_scale.checkpoints.progress import Progress
from ted_scale.distill.signal import Losses, Weights
from ted_scale.distill.stages import Stage
from ted_scale.health import spikes
from ted_scale.health.bad_step import Event, write_report
from ted_scale.health.norms import norms_apart, sides_of
from ted_scale.health.rewind import Rewind, ways_back
from ted_scale.models.zero import forget_gradients
from ted_scale.ranks import signals
from ted_scale.ranks.agree import of_all_ranks


class Guard:
    """Sums a step's losses on the device and reads them, with the norm, once. `alert(title, text)` tells the user; `saved()`
    comes back when no checkpoint is being written."""

    def __init__(self, engine, stage: Stage, alert, saved):
        self.engine, self.stage, self.alert, self.saved, self.settings = engine, stage, alert, saved, stage.run.health
        self.local: torch.Tensor | None = None
        self.reading, self.finite, self.stopping = False, True, False
        zero = engine.optimizer
        self.clip, self.update, self.measure = zero.unscale_and_clip_grads, zero._optimizer_step, zero._get_norm_groups
        zero.unscale_and_clip_grads, zero._optimizer_step = self.before_update, self.update_unless_dropped
        zero._get_norm_groups = self.measured
        self.sides = sides_of(zero)

    def add(self, losses: Losses) -> None:
        vector = torch.cat([torch.stack(losses[:4]).detach(), losses.layers])
        self.local = vector if self.local is None else self.local + vector

    def arm(self, progress: Progress) -> None:
        """Call before the engine step that updates: everything of this step is in `add` by now."""
        self.before, self.reading = progress, True
        asked = self.local.new_full(
            (1,), float(signals.asked.is_set())
        )  # filled on the device: nobody waits for a copy
        everyone = of_all_ranks(torch.cat([self.local, asked]))
        self.shares, self.asked, self.local = everyone[:, :-1], everyone[:, -1], None

    def measured(self) -> list:
        norms = self.measure()
        self.apart = norms_apart(self.sides, norms)
        return norms

    def before_update(self, sub_group: int, norm) -> None:
        if self.reading:  # once for each sub-group: nothing is clipped before the first
            self.judge(norm)
        self.clip(sub_group, self.apart[self.sides[sub_group]])

    def update_unless_dropped(self, sub_group: int) -> None:
        if self.finite:
            self.update(sub_group)

    def judge(self, norm) -> None:
        """Read the step's numbers; write down what they were where they are no good."""
        self.reading = False
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.shares.device)
        apart = torch.stack([norm, self.asked.sum(), *(n.to(norm.device) for n in self.apart.values())])
        self.norm, asked, *rest = torch.cat([apart, self.shares.sum(0)]).tolist()
        self.norms, self.sums = rest[: len(self.apart)], rest[len(self.apart) :]
        self.stopping = asked > 0  # on any rank: all leave after the same step
        self.finite = all(v - v == 0 for v in (self.norm, *self.sums))
        self.median = spikes.spiked_over(spikes.state_of(self.before), self.settings, self.sums[0])
        if not self.finite or self.median is not None:
            said = self.spike() if self.finite else self.fault()
            event = Event(self.before, self.stage, said, self.norm, self.stage.terms(len(self.sums) - 4), self.shares)
            self.said = f"step {self.before.step + 1}: {said}; {write_report(self.engine, event)}"

    def spike(self) -> str:
        loss, steps = self.sums[0], len(spikes.state_of(self.before).losses)
        return f"loss/total is {loss:.4g}, {loss / self.median:.3g} times its median over {steps} steps"

    def fault(self) -> str:
        """The first term that is not finite, the parts of the loss before their total; where none is, the gradient."""
        names, rows = self.stage.terms(len(self.sums) - 4), self.shares.tolist()
        for i in (*range(1, len(names)), 0):
            for rank, row in enumerate(rows):
                if not math.isfinite(row[i]):
                    return f"{names[i]} of rank {rank} must be finite, but is {row[i]}"
        together = {**dict(zip(names, self.sums, strict=True)), "optim/grad_norm": "inf or nan"}
        name, value = next((n, v) for n, v in together.items() if isinstance(v, str) or not math.isfinite(v))
        return f"{name} of all ranks together must be finite, but is {value}"

    def settle(self, progress: Progress) -> Progress:
        """What the numbers of the step just taken mean for the run, which stands at `progress` by now."""
        if self.reading:
            self.judge(math.inf)
        if not self.finite:
            return self.settle_dropped(progress)
        if self.median is not None:
            self.settle_spike(progress)
        return spikes.taken(progress, self.settings, self.sums[0])

    def settle_dropped(self, progress: Progress) -> Progress:
        state, limit = spikes.state_of(progress), self.settings.max_skipped
        if self.settings.on_nonfinite == "stop":
            raise self.stopped("lower train.lr or look at the data of this step, then start the same command again")
        if state.in_a_row == limit:
            raise self.stopped(f"health.max_skipped = {limit} steps before it were dropped as well: lower train.lr")
        if progress.skipped == (limit := self.settings.max_skipped_all):
            raise self.stopped(
                f"health.max_skipped_all = {limit} steps of the run were dropped before it: lower train.lr"
            )
        forget_gradients(self.engine.module)  # a parameter that gets no new one would bring this one to the next step
        progress = spikes.dropped(progress)
        row = f"{state.in_a_row + 1} in a row, {progress.skipped} in all"
        self.alert("a step was skipped", f"{self.said}; its update is dropped, {row}")
        return progress

    def settle_spike(self, progress: Progress) -> None:
        rewinds, limit = spikes.state_of(progress).rewinds, self.settings.max_rewinds
        if self.settings.on_spike == "alert":
            self.alert("loss spike", self.said)
            return
        self.saved()  # else it would be chance which one is the newest
        checkpoints = ways_back(self.stage.run.folder, self.stage.first_step, rewinds)
        if not checkpoints:
            self.alert("loss spike", f"{self.said}; the run goes on: this stage has no checkpoint to go back to yet")
            return
        if rewinds == limit:
            raise self.stopped(f"health.max_rewinds = {limit} ways back led to no step past it: lower train.lr")
        onwards = (
            f"back to {checkpoints[0].name} and on with sample {progress.samples}, rewind {rewinds + 1} of {limit}"
        )
        self.alert("loss spike, going back", f"{self.said}; {onwards}")
        raise Rewind(checkpoints, progress)

    def stopped(self, way_out: str) -> RunStopped:
        kept = "" if self.finite else "no weight was updated and "
        return RunStopped(f"{self.said}; {kept}the last checkpoint is intact: {way_out}")

    def read(self, weights: Weights) -> dict[str, float]:
        """The numbers of the step that was just taken, on the host already; a dropped one's would spoil every mean."""
        rate = {"optim/lr": self.engine.optimizer.param_groups[0]["lr"]}
        if not self.finite:
            return rate
        norms = dict(zip((f"optim/grad_norm_{side}" for side in self.apart), self.norms, strict=True))
        norms = {"optim/grad_norm": self.norm, **(norms if len(norms) > 1 else {})}
        return {**self.stage.name_losses(self.sums, weights), **norms, **rate}
