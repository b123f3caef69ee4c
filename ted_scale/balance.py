"""The scale of the layer loss with loss.balance = "auto": the mean KL over the mean layer loss (Minitron's alpha, averaged).

Both means are over the steps before, so a step's weights are known before it begins. The terms were summed over all ranks
before. So every rank computes the same float. A resume reads it from progress.json.
"""

import json
from dataclasses import replace

from ted_scale.checkpoints.progress import Balance, Progress

STEPS = 50  # over the first STEPS steps the means are plain; later they are exponential
WITHOUT_EFFECT = {"preset", "ce", "kl", "layer", "balance", "backend", "mode", "chunk_tokens"}  # change no term


def scale_of(progress: Progress, stage) -> float:
    """The scale is 1 until both terms are known and positive. A student that equals its teacher has terms of 0."""
    now = known(progress, stage)
    return now.kl / now.layer if now.kl > 0 and now.layer > 0 else 1.0


def known(progress: Progress, stage) -> Balance:
    """The means so far. They start again if a key that changes the terms, such as loss.kind, has changed."""
    if not stage.balances:
        return Balance()
    of = json.dumps(stage.run.loss.model_dump(exclude=WITHOUT_EFFECT), sort_keys=True)
    return progress.balance if progress.balance and progress.balance.of == of else Balance(of)


def followed(progress: Progress, stage, losses: dict[str, float]) -> Progress:
    """The means after a step. They do not change if the step's update was dropped, or if one of the two terms was off."""
    if not (stage.balances and {"loss/kl", "loss/layer"} <= losses.keys()):
        return progress
    before = known(progress, stage)
    share = max(1 / (before.steps + 1), 1 / STEPS)
    kl = before.kl + share * (losses["loss/kl"] - before.kl)
    layer = before.layer + share * (losses["loss/layer"] - before.layer)
    return replace(progress, balance=Balance(before.of, kl, layer, before.steps + 1))
