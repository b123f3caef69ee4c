"""How a loss whose gradients are formed with it takes part in autograd."""

import torch


def attach(total, values, denom, trained: list, gradients: list):
    """`values` (the first is what `total` carries a gradient for) over denom; 0 where denom is 0.

    `gradients` are ∂total/∂ each of `trained`, before denom. Backward only scales them, on the device and in place: a
    second backward through the same loss raises. Not one of `trained` is kept: what ZeRO-3 gathered may go.
    """
    scale = torch.where(denom > 0, 1.0 / denom, 0.0)
    scaled = values * scale
    if not trained:
        return scaled[0], scaled
    return Formed.apply(total * scale, scale, len(trained), *trained, *gradients), scaled


class Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, scale, count, *tensors):
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        ctx.save_for_backward(scale, *tensors[count:])
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative would be 0 in silence
    def backward(ctx, g):
        scale, *gradients = ctx.saved_tensors
        scaled = [scale_by_(grad, g * scale).to(d) for grad, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *scaled, *[None] * len(scaled)


def scale_by_(gradient, factor):
    """In fp32 also where the gradient is of 16 bits: a factor rounded to 16 bits would bend every entry alike."""
    if gradient.dtype == torch.float32:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor.reshape(1), out=gradient)


def as_scalar(denom, device) -> torch.Tensor:
    return torch.as_tensor(denom, dtype=torch.float32, device=device)
