"""What a cut left of its teacher: parameters, and the loss on held-out text before any training."""

import torch

from ted_scale.base.counts import millions
from ted_scale.models.anatomy import Anatomy
from ted_scale.models.inspection import empty_model, read_config


def parameters(anatomy: Anatomy) -> tuple[int, int]:
    """(all, those outside of embeddings and of the output projection)"""
    with torch.device("meta"):
        model = empty_model(read_config("MODEL", anatomy.folder))
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    apart = {id(p): p.numel() for table in tables for p in table.parameters()}
    return anatomy.parameters, anatomy.parameters - sum(apart.values())


def table(rows: dict[str, tuple[Anatomy, float | None]]) -> str:
    """By name of a model: its anatomy and its loss."""
    judged = any(loss is not None for _, loss in rows.values())
    lines = [f"{'':10}{'parameters':>14}{'without embeddings':>22}" + (f"{'loss':>10}" if judged else "")]
    for name, (anatomy, loss) in rows.items():
        every, apart = map(millions, parameters(anatomy))
        lines.append(f"{name:10}{every:>14}{apart:>22}" + (f"{loss:>10.4f}" if judged else ""))
    return "\n".join(lines)
