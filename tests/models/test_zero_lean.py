"""The linear map and the gradient's norm that replace DeepSpeed's are torch's own."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed import comm

from ted_scale.models.zero_lean import Linear, gradient_norm


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=["rows", "batch"])
@pytest.mark.parametrize("bias", [None, torch.randn(6, dtype=torch.float64)], ids=["plain", "bias"])
def test_a_linear_map_and_its_gradients_are_torch_s(shape, bias):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    found = []
    for linear in (Linear(None).apply, torch.nn.functional.linear):
        inputs = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
        out = linear(*inputs)
        (out * torch.arange(6)).sum().backward()
        with torch.no_grad():
            assert torch.equal(linear(*inputs), out)
        found.append([out, *(t.grad for t in inputs if t is not None)])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


def test_a_released_weight_is_not_held_by_what_backward_keeps():
    weight = torch.randn(6, 8, requires_grad=True)
    out = Linear(None).apply(torch.randn(3, 8, requires_grad=True), weight)
    whole, weight.data = weight.detach().clone(), torch.empty(0)
    weight.data = 2 * whole  # gathered again, elsewhere
    (dx,) = torch.autograd.grad(out.sum(), out.grad_fn.next_functions[0][0].variable)
    assert torch.allclose(dx, (2 * whole).sum(0).expand(3, 8))


@pytest.mark.parametrize("last", [2.0, float("inf"), float("nan")])
def test_a_norm_is_that_of_all_gradients_or_minus_one(monkeypatch, last):
    monkeypatch.setattr(comm, "all_reduce", lambda tensor, **_: None)
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([last])]
    optimizer = SimpleNamespace(_get_param_partition_group=lambda weight: None)
    wanted = 29**0.5 if last == 2.0 else -1.0
    assert gradient_norm(optimizer, gradients, gradients).item() == pytest.approx(wanted)
