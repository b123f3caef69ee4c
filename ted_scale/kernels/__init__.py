"""Losses that never store what they compute: README.md has the algebra, the memory and the measurements."""

from ted_scale.kernels.backend import choose, describe
from ted_scale.kernels.filtered_ce import filtered_ce
from ted_scale.kernels.filtered_mse import filtered_mse
from ted_scale.kernels.linear_kl_ce import linear_kl_ce

__all__ = ["choose", "describe", "filtered_ce", "filtered_mse", "linear_kl_ce"]
