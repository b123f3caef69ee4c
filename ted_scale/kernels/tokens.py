"""Which tokens count: those with a weight above 0 and a label that is not ignored."""

import torch

IGNORED = -100  # the label of a position that predicts no token, as in torch


def valid_weights(labels_N, weights_N):
    """Token weights in fp32. They are 0 for tokens that do not count."""
    return torch.where((labels_N != IGNORED) & (weights_N > 0), weights_N, 0.0).float()
