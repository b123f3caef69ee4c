"""What is measured of a machine: actions with a run's shapes, each of a micro-batch.

Some blocks of each model take turns, as those of a model do: a single one's weights would stay in a cache. Note: their arguments
are those that the body itself gives its first block, found on the meta device, so that no family is known by name here.
"""

from collections.abc import Callable

import torch

from ted_scale.distill.filters import Filter
from ted_scale.distill.memory import bytes_of, tokens_of
from ted_scale.kernels import filtered_mse, linear_kl_ce
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.trial import hollow, run_hollow
from ted_scale.plan import Plan

BLOCKS = 4  # of a model
UPDATED = 2**22  # parameters of an update
CALLS = 1000


def probes(plan: Plan, device) -> dict[str, Callable]:
    """Actions by name, each of a micro-batch of this run."""
    found: dict[str, Callable] = {}
    for side, a in (("teacher", plan.teacher), ("student", plan.student)):
        if a:
            found |= of_side(plan, side, a, device)
    found["head"] = head_probe(plan, device)
    if plan.pairs:
        found["layer loss"] = layer_probe(plan, device)
    weight = torch.zeros(UPDATED, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    found["update"] = torch.optim.AdamW([weight], fused=True).step
    small = torch.ones(8, device=device)
    found["calls"] = lambda: [small.add_(0) for _ in range(CALLS)]
    return found


def dtype_of(plan: Plan):
    return torch.bfloat16 if bytes_of(plan) == 2 else torch.float32


def of_side(plan: Plan, side: str, a: Anatomy, device) -> dict[str, Callable]:
    """Some of its blocks forward, the student's also backward; their products alone; their attention alone."""
    dtype, rows, length = dtype_of(plan), plan.run.train.micro_batch, plan.run.data.seq_len
    blocks, arguments, named = blocks_of(a, dtype, rows, length, device)
    pairs = [
        (torch.randn(rows * length, m.shape[1], device=device, dtype=dtype), m.detach())
        for b in blocks
        for m in matrices(b)
    ]
    layer = a.attention[0]
    heads = a.scores[0][0] // (layer.width + layer.value_width)
    q, k, v = (
        torch.randn(rows, heads, length, width, device=device, dtype=dtype)
        for width in (layer.width, layer.width, layer.value_width)
    )

    def attend():
        for _ in blocks:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(before=lambda: None):
        with torch.no_grad():
            for block in blocks:
                before()
                block(*arguments, **named)

    def both():
        for block in blocks:
            out = block(*arguments, **named)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
            for tensor in (*block.parameters(), *(x for x in arguments if torch.is_tensor(x))):
                tensor.grad = None

    found = {
        f"{side} blocks": forward,
        f"{side} products": lambda: [x @ w.t() for x, w in pairs],
        f"{side} attention": attend,
    }
    return found | ({"student blocks, both ways": both} if side == "student" else {})


def blocks_of(a: Anatomy, dtype, rows: int, length: int, device):
    """(blocks with random weights, the arguments that the body gives its first block)"""
    network, given = hollow(a, dtype), []
    listed = network.get_submodule(a.blocks)
    hook = listed[0].register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    run_hollow(network, a, length, rows)
    hook.remove()

    def real(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
        return made.normal_() if leaf.is_floating_point() else made

    args, kwargs = torch.utils._pytree.tree_map(real, given[0])
    blocks = [block.to_empty(device=device) for block in list(listed)[:BLOCKS]]
    for block in blocks:
        for weight in block.parameters():
            weight.data.normal_(std=0.02)
    return blocks, [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args], kwargs


def matrices(block) -> list[torch.Tensor]:
    return [weight for weight in block.parameters() if weight.dim() == 2]


def head_probe(plan: Plan, device) -> Callable:
    """Both output projections with their losses, forward and backward."""
    tokens = tokens_of(plan)
    sides = [(torch.randn(tokens, a.head_width, device=device, dtype=dtype_of(plan)),
              torch.randn(a.vocab_size, a.head_width, device=device, dtype=dtype_of(plan)) * 0.02)
             for a in (plan.student, plan.teacher) if a]  # fmt: skip
    (h, w), (h_t, w_t) = sides[0], sides[1] if plan.teacher else (None, None)
    labels = torch.randint(plan.vocabulary, (tokens,), device=device)
    counts = torch.ones(tokens, device=device)
    h.requires_grad_()
    w = torch.nn.Parameter(w)

    loss, denom = plan.run.loss, torch.tensor(float(tokens), device=device)
    settings = {"divergence": loss.divergence, "top_k": loss.top_k, "mode": loss.mode, "backend": loss.backend}
    settings |= {"kl_weight": float(plan.teacher is not None), "chunk_tokens": loss.chunk_tokens, "denom": denom}

    def both():
        total = linear_kl_ce(h, w, h_t, w_t, labels, counts, **settings)[0]
        total.backward()
        h.grad = w.grad = None

    return both


def layer_probe(plan: Plan, device) -> Callable:
    """One pair."""
    tokens, dtype = tokens_of(plan), dtype_of(plan)
    h_s, h_t = (torch.randn(tokens, a.width, device=device, dtype=dtype) for a in (plan.student, plan.teacher))
    of_s, of_t = (Filter(a.width, plan.width, seed=0, mlp=0).to(device, dtype) for a in (plan.student, plan.teacher))
    mask, denom = torch.ones(tokens, device=device), torch.tensor(float(tokens), device=device)
    h_s.requires_grad_()

    def both():
        w_t, b_t = (None, None) if plan.run.method == "lwd" else (of_t.weight.detach(), of_t.bias.detach())
        filtered_mse(h_t, w_t, b_t, h_s, of_s.weight, of_s.bias, mask, denom=denom, kind=plan.run.loss.kind).backward()
        h_s.grad = None

    return both
