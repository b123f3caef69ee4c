"""Losses computed from states and weights, without whole logits in memory. README.md has the algebra and the memory."""

from ted_scale.kernels.backend import choose, describe
from ted_scale.kernels.filter_loss import filtered_ce
from ted_scale.kernels.layer_loss import filtered_mse, filtered_states
from ted_scale.kernels.logit_loss import linear_kl_ce

__all__ = ["choose", "describe", "filtered_ce", "filtered_mse", "filtered_states", "linear_kl_ce"]
