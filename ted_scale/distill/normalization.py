"""Token normalization: the number that every loss term is divided by.

All terms follow one rule. Each token's value is multiplied by the token's weight. The sum over tokens is divided by `denom`: the
number of valid tokens of the whole optimizer step, over ranks and accumulation. A token is valid if its weight is > 0 and its
label is not ignored (kernels/tokens.py). With `loss.tokens = "all"` the teacher's terms count every token with a label, and their
denom is the number of those. A denom of 0 gives 0. Sums are fp32.
"""

import torch
import torch.distributed as dist

from ted_scale.kernels.tokens import IGNORED, valid_weights


def count_valid(batches) -> torch.Tensor:
    """The step's denominator: valid tokens of all micro-batches on all ranks. Stays on the device."""
    return added([valid_weights(b.labels_BT, b.weights_BT) for b in batches])


def count_for_teacher(loss, batches) -> torch.Tensor | None:
    """The denominator of the teacher's terms, if it differs from that of CE. Else None."""
    return added([labelled(b) for b in batches]) if loss.tokens == "all" else None


def logit_passes(loss, kl) -> int:
    """The number of passes of a micro-batch over the student's logits. CE has its own pass if KL counts other tokens than CE."""
    return 2 if kl and loss.tokens == "all" else 1


def gradient_passes(loss, kl) -> int:
    """How many of these passes hold gradients in memory at the same time. Strict mode computes them in the backward, one by one."""
    return 1 if loss.mode == "strict" else logit_passes(loss, kl)


def labelled(batch) -> torch.Tensor:
    """Weights that are 1 for every token with a label, also if the label is not a target."""
    return (batch.labels_BT != IGNORED).float()


def added(weights: list[torch.Tensor]) -> torch.Tensor:
    count = sum((each > 0).sum() for each in weights).to(torch.float32)
    if dist.is_initialized():
        dist.all_reduce(count)
    return count


def for_engine(total):
    """DeepSpeed averages gradients over ranks, but `total` is already this rank's share of the global mean."""
    return total * (dist.get_world_size() if dist.is_initialized() else 1)
