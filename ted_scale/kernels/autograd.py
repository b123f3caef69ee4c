"""How a loss takes part in autograd if its gradients are computed in the forward, together with the loss."""

import torch


def wants_gradient(operands) -> list[bool]:
    """Whether each operand needs a gradient, in the current grad mode."""
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in operands]


def attach(total, values, denom, operands, wanted, gradients):
    """(total / denom with its gradients, values / denom without gradients). Both are 0 if denom is 0.

    `gradients` has ∂total/∂operand for each of `operands`, before the division. The backward only scales them on the device. It
    works in place if the type stays the same, and then a second backward through the same loss raises. No operand is kept, so
    weights that ZeRO-3 gathered may be released.
    """
    scale = as_scalar(denom, values.device).reciprocal().nan_to_num(0.0, 0.0, 0.0)
    scaled = values * scale
    trained = [t for t, wants in zip(operands, wanted, strict=True) if wants]
    if not trained:
        return scaled[0], scaled
    formed = [gradient for gradient, wants in zip(gradients, wanted, strict=True) if wants]
    return FormedEarly.apply(total * scale, scale, len(trained), *trained, *formed), scaled


class FormedEarly(torch.autograd.Function):
    """Takes (total, scale, count, `count` operands, their gradients). Only the gradients are kept for the backward."""

    @staticmethod
    def forward(ctx, total, scale, count, *tensors):
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        ctx.save_for_backward(scale, *tensors[count:])
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # without it a second derivative would be 0, without an error
    def backward(ctx, g):
        scale, *gradients = ctx.saved_tensors
        factor = g * scale
        scaled = [scaled_by(grad, factor, d) for grad, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *scaled, *[None] * len(scaled)


def scaled_by(gradient, factor, dtype):
    """The gradient times the factor. The factor stays fp32 also for a 16-bit gradient, because its rounding error would be in all
    entries. On a device one pass also converts to the operand's type. A CPU would need an fp32 copy for that."""
    if gradient.is_cpu and gradient.dtype == torch.float32:
        return gradient.mul_(factor).to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(1), out=out)


def as_scalar(denom, device) -> torch.Tensor:
    return torch.as_tensor(denom, dtype=torch.float32, device=device)
