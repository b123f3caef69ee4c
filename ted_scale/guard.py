"""The step's one host read of ours, between the gradient norm and the first weight update.

DeepSpeed computes the global gradient norm inside its step and calls the wrapped optimizer afterwards; a hook there can
still stop everything, with the norm at hand. Where the norm itself is not finite DeepSpeed skips the update in silence:
the hook then never ran, which is how we notice.
"""

import torch
import torch.distributed as dist

from ted_scale import stop
from ted_scale.errors import RunStopped
from ted_scale.schedule import Stage
from ted_scale.student import Losses, Weights

NORM = ("optim/grad_norm", "all (it is global)", "inf or nan")
TERMS = ("loss/total", "loss/ce", "loss/kl", "loss/layer")


class Guard:
    """Sums a step's losses on the device and reads them, with the norm, once."""

    def __init__(self, engine):
        self.engine, self.local, self.sums, self.values, self.reading = engine, None, None, None, False
        self.stopping = False
        engine.optimizer.optimizer.register_step_pre_hook(self.before_update)

    def add(self, losses: Losses) -> None:
        vector = torch.cat([torch.stack(losses[:4]).detach(), losses.layers])
        self.local = vector if self.local is None else self.local + vector

    def arm(self, step: int) -> None:
        """Call before the engine step that updates: everything of this step is in `add` by now."""
        self.step, self.values, self.reading = step, None, True
        asked = self.local.new_full((1,), float(stop.asked.is_set()))  # filled on the device: nobody waits for a copy
        self.sums = torch.cat([self.local, asked])
        if dist.is_initialized():
            dist.all_reduce(self.sums)

    def before_update(self, *_) -> None:
        if not self.reading:  # ZeRO-3 updates in sub-groups: the hook runs once for each
            return
        self.reading = False
        norm = torch.as_tensor(self.engine.optimizer._global_grad_norm, dtype=torch.float32, device=self.sums.device)
        self.values = torch.cat([norm[None], self.sums]).tolist()
        if not all(v - v == 0 for v in self.values):
            self.stop()

    def read(self, stage: Stage, weights: Weights) -> dict[str, float]:
        """The numbers of the step that was just taken, on the host already."""
        if self.reading:
            self.stop()
        self.local = None
        norm, *sums, asked = self.values
        self.stopping = asked > 0  # on any rank: all leave after the same step
        rate = self.engine.optimizer.param_groups[0]["lr"]
        return {**stage.name_losses(sums, weights), "optim/grad_norm": norm, "optim/lr": rate}

    def stop(self) -> None:
        """Every rank comes here in the same step, so that they can tell each other who has it."""
        ours = self.local.tolist()
        everyone = [None] * dist.get_world_size() if dist.is_initialized() else [ours]
        if dist.is_initialized():
            dist.all_gather_object(everyone, ours)
        names = [*TERMS[1:], *(f"loss/layer/{k}" for k in range(len(ours) - len(TERMS))), TERMS[0]]
        order = [*range(1, len(ours)), 0]
        faults = ((n, r, v[i]) for n, i in zip(names, order, strict=True) for r, v in enumerate(everyone))
        name, rank, value = next((f for f in faults if f[2] - f[2] != 0), NORM)
        raise RunStopped(
            f"step {self.step}: {name} of rank {rank} must be finite, but is {value}; no weight was updated and the last "
            f"checkpoint is intact: lower train.lr or look at the data of this step, then start the same command again"
        )
