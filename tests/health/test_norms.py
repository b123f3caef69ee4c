"""Norms of the student and of its filters apart."""

import torch

from ted_scale.health.guard import norms_apart


def test_each_side_s_norm_is_that_of_its_sub_groups():
    norms = norms_apart(["student", "filters", "student"], [torch.tensor(3.0), torch.tensor(2.0), torch.tensor(4.0)])
    assert {side: norm.item() for side, norm in norms.items()} == {"student": 5.0, "filters": 2.0}


def test_a_norm_stays_where_deepspeed_has_it():
    """Gradients that are offloaded are scaled on the host: a norm on the device ended the first update."""
    norms = norms_apart(["student", "filters"], [torch.empty((), device="meta"), torch.tensor(1.0)])
    assert norms["student"].device.type == "meta" and norms["filters"].device.type == "cpu"
