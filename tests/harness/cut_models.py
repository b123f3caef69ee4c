"""Models in memory that a cut model must be equal to."""

import torch
from transformers import AutoModelForCausalLM

from ted_scale.models.inspection import inspect

TOKENS = torch.arange(3, 43).reshape(2, 20)


def loaded(folder):
    """The model with dropout off, and that every weight came from the folder and each of the folder's is used."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def cut_by_hand(folder, blocks):
    """The teacher in memory without the other modules in its list; what a module kept of its old number is its own."""
    model = loaded(folder)
    owner, _, name = inspect("teacher", str(folder)).blocks.rpartition(".")
    parent = model.get_submodule(owner)
    kept = torch.nn.ModuleList(getattr(parent, name)[b] for b in blocks)
    setattr(parent, name, kept)
    if getattr(parent.config, "layer_types", None):
        parent.config.layer_types = [parent.config.layer_types[b] for b in blocks]
    parent.config.num_hidden_layers = len(blocks)
    return model
