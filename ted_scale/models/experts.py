"""A mixture's experts on the meta device, on which a model is inspected without weights.

transformers merges the experts of a block into one tensor for each kind of matrix. It sorts tokens by expert and multiplies them
in groups. On the meta device torch has this product only in bf16. Note: the stand-in sends every token to the first expert, as
many times as the family's router would choose experts. Sizes, FLOPs and the memory for gradients are the same as with groups.
"""

import contextlib

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

GROUPED = "grouped_mm"  # what transformers chooses if a family allows it


@contextlib.contextmanager
def as_one():
    """A context in which experts run as this stand-in. Yields every module of experts that ran → how many experts a token uses."""
    chosen: dict = {}

    def first_expert(module, states_NE, indices_NK, weights_NK):
        chosen[module] = indices_NK.shape[-1]
        return by_first(module, states_NE, weights_NK)

    real = ALL_EXPERTS_FUNCTIONS[GROUPED]
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, first_expert)
    try:
        yield chosen
    finally:
        ALL_EXPERTS_FUNCTIONS.register(GROUPED, real)


def by_first(module, states_NE, weights_NK):
    def product(rows, name: str):
        weight = getattr(module, name)[0]
        out = rows @ (weight if module.is_transposed else weight.T)
        return out + getattr(module, f"{name}_bias")[0] if module.has_bias else out

    rows = states_NE.repeat_interleave(weights_NK.shape[-1], dim=0)
    gated = module._apply_gate(product(rows, "gate_up_proj")) if module.has_gate else None
    inner = module.act_fn(product(rows, "up_proj")) if gated is None else gated
    out = product(inner, "down_proj") * weights_NK.reshape(-1, 1)
    return out.unflatten(0, weights_NK.shape).sum(dim=1).to(states_NE.dtype)
