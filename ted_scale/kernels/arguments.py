"""Checks of the losses' arguments. A wrong argument gives one sentence that names it, before any kernel runs."""

import torch

from ted_scale.kernels.tokens import IGNORED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_states(name: str, states, width: int | None, rows: int | None) -> None:
    if states.ndim != 2 or (width is not None and states.shape[1] != width) or rows not in (None, states.shape[0]):
        expected = f"[{'N' if rows is None else rows}, {'d' if width is None else width}]"
        raise ValueError(f"{name} must be of shape {expected}, but is {list(states.shape)}")


def check_vector(name: str, vector, length: int) -> None:
    if vector is not None and list(vector.shape) != [length]:
        raise ValueError(f"{name} must be of shape [{length}], but is {list(vector.shape)}")


def check_weight(name: str, weight, width: int | None, bias_name: str, bias) -> None:
    """Check a projection [V, width] and its bias [V]. A width of None accepts any width."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{bias_name} must be None where {name} is None, but is of shape {list(bias.shape)}")
        return
    if weight.ndim != 2 or width not in (None, weight.shape[1]):
        raise ValueError(f"{name} must be of shape [V, {'d' if width is None else width}], but is {list(weight.shape)}")
    check_vector(bias_name, bias, len(weight))


def check_common(first: str, tensors: dict, fixed: tuple[str, ...] = ()) -> None:
    """Check that all tensors have one device and known types. No tensor named in `fixed` may require a gradient."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {first}, but is on {tensor.device}")
        if name not in ("token_weight", "labels", "rows") and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, but is {short(tensor.dtype)}")
        if name in fixed and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, for the teacher is fixed, but does; detach it")


def check_type(name: str, tensor, like_name: str, like) -> None:
    if tensor is not None and tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {short(like.dtype)} like {like_name}, but is {short(tensor.dtype)}")


def check_labels(labels, rows: int, vocabulary: int, token_weight) -> None:
    """Check labels and token weights. Values are checked only on a CPU, because reading them from a device would make the host
    wait."""
    check_vector("labels", labels, rows)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, but is {short(labels.dtype)}")
    if labels.is_cpu and token_weight.is_cpu and not torch.compiler.is_compiling():
        counted = torch.where((labels != IGNORED) & (token_weight > 0), labels, 0)
        for label in (counted.min().item(), counted.max().item()) if rows else ():
            if not 0 <= label < vocabulary:
                raise ValueError(f"labels must be in 0..{vocabulary - 1} or {IGNORED}, but holds {label}")


def check_rows(name: str, rows) -> None:
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"{name} must be int64 of shape [n], but is {short(rows.dtype)} of shape {list(rows.shape)}")


def check_given(name: str, tensor, when: str = "") -> None:
    if tensor is None:
        raise ValueError(f"{name} must be a tensor{when}, but is None")


def check_absent(name: str, value, when: str) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None {when}, but is {value}")


def check_positive(name: str, value) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0, but is {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is '{value}'")


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")
