"""The scale of the layer loss under loss.balance = "auto": the mean KL over the mean layer loss (Minitron's alpha, held slowly).

Both are means over the steps before, so a step's weights are known before it begins. The terms are already summed over all
ranks when they come here: every rank computes the same float, and a resume finds it in progress.json.
"""

import json
from dataclasses import replace

from ted_scale.checkpoints.progress import Balance, Progress

STEPS = 50  # the means are plain ones over so many steps, exponential ones afterwards
WITHOUT_EFFECT = {"preset", "ce", "kl", "layer", "balance", "backend", "mode", "chunk_tokens"}  # on a term's own value


def scale_of(progress: Progress, stage) -> float:
    """1 until both terms are known, and where they are not positive: a student that is its teacher has neither."""
    now = known(progress, stage)
    return now.kl / now.layer if now.kl > 0 and now.layer > 0 else 1.0


def known(progress: Progress, stage) -> Balance:
    """The means of these terms. Where loss.kind or the like has changed, they begin anew."""
    if not stage.balances:
        return Balance()
    of = json.dumps(stage.run.loss.model_dump(exclude=WITHOUT_EFFECT), sort_keys=True)
    return progress.balance if progress.balance and progress.balance.of == of else Balance(of)


def followed(progress: Progress, stage, losses: dict[str, float]) -> Progress:
    """The means after a step. They wait in a step whose update was dropped and where a term is off: a step has both or none."""
    if not (stage.balances and {"loss/kl", "loss/layer"} <= losses.keys()):
        return progress
    before = known(progress, stage)
    share = max(1 / (before.steps + 1), 1 / STEPS)
    kl = before.kl + share * (losses["loss/kl"] - before.kl)
    layer = before.layer + share * (losses["loss/layer"] - before.layer)
    return replace(progress, balance=Balance(before.of, kl, layer, before.steps + 1))
