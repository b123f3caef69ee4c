"""How a loss takes part in autograd when its gradients are computed together with it, in the forward."""

import torch


def wants_gradient(operands) -> list[bool]:
    """Of each operand, under the grad mode of now."""
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in operands]


def attach(total, values, denom, operands, wanted, gradients):
    """(total / denom with its gradients, values / denom without); 0 where denom is 0.

    `gradients` are ∂total/∂ each of `operands`, before the division. Backward only scales them, on the device, and in
    place where the type stays: a second backward through the same loss then raises. No operand is kept: what ZeRO-3
    gathered may be released.
    """
    scale = as_scalar(denom, values.device).reciprocal().nan_to_num(0.0, 0.0, 0.0)
    scaled = values * scale
    trained = [t for t, wants in zip(operands, wanted, strict=True) if wants]
    if not trained:
        return scaled[0], scaled
    formed = [gradient for gradient, wants in zip(gradients, wanted, strict=True) if wants]
    return FormedEarly.apply(total * scale, scale, len(trained), *trained, *formed), scaled


class FormedEarly(torch.autograd.Function):
    """Takes (total, scale, count, `count` operands, their gradients); only the gradients are kept for backward."""

    @staticmethod
    def forward(ctx, total, scale, count, *tensors):
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        ctx.save_for_backward(scale, *tensors[count:])
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # without it a second derivative would be 0, and no error
    def backward(ctx, g):
        scale, *gradients = ctx.saved_tensors
        factor = g * scale
        scaled = [scaled_by(grad, factor, d) for grad, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *scaled, *[None] * len(scaled)


def scaled_by(gradient, factor, dtype):
    """The factor stays fp32 for a 16-bit gradient, too: rounded to 16 bits it would change all entries alike. On a device
    one pass also writes the operand's type; a CPU would make an fp32 copy for that."""
    if gradient.is_cpu and gradient.dtype == torch.float32:
        return gradient.mul_(factor).to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(1), out=out)


def as_scalar(denom, device) -> torch.Tensor:
    return torch.as_tensor(denom, dtype=torch.float32, device=device)
