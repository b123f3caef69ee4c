"""The losses under torch.compile, which takes seconds for each graph."""

import pytest
import torch
from test_kernel_ops import CALLS
from test_losses import ours, tensors

from ted_scale.kernels import linear_kl_ce


@pytest.mark.parametrize("name", CALLS)
def test_torch_compile_takes_a_loss_without_a_graph_break(name):
    make, trained, loss = CALLS[name]

    def twice(**values):
        out = loss(**values)
        return 2 * (out[0] if isinstance(out, tuple) else out)

    eager, grads = ours(make(), twice, trained)
    compiled, compiled_grads = ours(make(), torch.compile(twice, fullgraph=True, backend="aot_eager"), trained)
    assert all(torch.equal(a, b) for a, b in zip([eager, *grads], [compiled, *compiled_grads], strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "reverse", "skip_below": 1.0}, {"divergence": "jsd", "top_k": 4}], ids=str
)
def test_the_compiled_backend_has_the_same_values(settings):
    """In fp32, with two chunks of one size and a ragged one."""
    settings = {"chunk_tokens": 5, "temperature": 2.0, **settings}
    eager, grads = ours(tensors(), **settings)
    compiled, compiled_grads = ours(tensors(), **settings, backend="compiled")
    for a, b in zip([*eager, *grads], [*compiled, *compiled_grads], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["chunked", "strict"])
def test_a_loss_is_compiled_once_for_vocabularies_of_any_size(mode):
    compiled = torch.compile(lambda **values: linear_kl_ce(**values, mode=mode)[0], fullgraph=True, dynamic=True)
    for size in (23, 29):
        values = tensors(v_s=size, v_t=size)
        assert torch.allclose(compiled(**values), linear_kl_ce(**values, mode=mode)[0], atol=1e-5)
