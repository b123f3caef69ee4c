"""Divergences of a teacher's row p and a student's row q, computed from their logarithms. The slope is the gradient for the
student's exponents.

Every function overwrites log_p and `room`, and leaves q in the memory of log_q, because new memory costs a CPU more than
arithmetic. If p and q are equal, value and slope are exactly 0.
"""

import torch


def between(log_p, log_q, room, name: str, top_k: int, wants_slope: bool):
    """([N] values, their slope or None) for rows [N, V]. With `top_k`, p's largest entries are compared one by one, and all
    others as one entry."""
    if top_k and top_k < log_p.shape[1]:
        return of_top(DIVERGENCES[name], top_k, log_p, log_q, room, wants_slope)
    return DIVERGENCES[name](log_p, log_q, room, wants_slope)


def forward(log_p, log_q, room, wants_slope: bool):
    """KL(p ‖ q). Its slope is q − p."""
    gap, p = torch.sub(log_p, log_q, out=room), log_p.exp_()
    value = gap.mul_(p).sum(dim=1)
    return value, torch.sub(log_q.exp_(), p, out=p) if wants_slope else None


def reverse(log_p, log_q, room, wants_slope: bool):
    """KL(q ‖ p). Its slope is q·(log q/p − KL)."""
    gap, q = torch.sub(log_q, log_p, out=room), log_q.exp_()
    value = torch.mul(q, gap, out=log_p).sum(dim=1)
    return value, gap.sub_(value[:, None]).mul_(q) if wants_slope else None


def jsd(log_p, log_q, room, wants_slope: bool):
    """½·KL(p ‖ m) + ½·KL(q ‖ m) with m = ½·(p + q). Its slope is ½·q·(log q/m − KL(q ‖ m))."""
    gap, p, q = torch.sub(log_p, log_q, out=room), log_p.exp_(), log_q.exp_()
    least = gap.abs().neg_().expm1_().mul_(0.5).log1p_()  # log m − log max(p, q)
    over_q = gap.clamp(min=0).add_(least)  # log m − log q
    over_p = least.sub_(gap.clamp_(max=0))  # log m − log p
    of_p, of_q = (torch.mul(x, over, out=room).sum(dim=1).neg_() for x, over in ((p, over_p), (q, over_q)))
    slope = over_q.add_(of_q[:, None]).mul_(q).mul_(-0.5) if wants_slope else None
    return 0.5 * (of_p + of_q), slope


def of_top(compare, k: int, log_p, log_q, room, wants_slope: bool):
    """`compare` for p's k largest entries and one bucket for the rest. Each entry of the bucket gets its share of the bucket's
    slope."""
    at = log_p.topk(k, dim=1, sorted=False).indices
    tops = [x.gather(1, at) for x in (log_p, log_q)]
    rests = [x.scatter_(1, at, -torch.inf).logsumexp(dim=1, keepdim=True) for x in (log_p, log_q)]
    log_q.scatter_(1, at, tops[1])
    buckets_p, buckets_q = (torch.cat(parts, dim=1) for parts in zip(tops, rests, strict=True))
    value, slope = compare(buckets_p, buckets_q, torch.empty_like(buckets_p), wants_slope)
    if slope is None:
        return value, None
    shares = torch.sub(log_q, rests[1], out=room).exp_()
    log_q.exp_()
    return value, shares.mul_(slope[:, -1:]).scatter_(1, at, slope[:, :-1])


DIVERGENCES = {"forward": forward, "reverse": reverse, "jsd": jsd}


def scratch(name: str, top_k: int) -> int:
    """The number of new matrices [N, V] that `between` needs at a time."""
    return 1 if top_k else 2 * (name == "jsd")
