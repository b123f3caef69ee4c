"""What attention.py must equal, said a second time and with a [T, T] mask: who sees whom, and flash attention's contract."""

import numpy
import torch

from ted_scale.data.packing import Packing, pack


def packing_of(lengths, length: int) -> Packing:
    """Rows of documents of these lengths."""
    begins = numpy.zeros((len(lengths), length), bool)
    for row, documents in zip(begins, lengths, strict=True):
        assert sum(documents) == length
        row[numpy.cumsum([0, *documents[:-1]])] = True
    return pack(begins)


def visible(lengths, window) -> torch.Tensor:
    """bool [B, 1, T, T] from the documents' lengths alone."""
    masks = []
    for documents in lengths:
        number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        same = number[:, None] == number[None, :]
        masks.append(same.tril() if window is None else same.tril().triu(1 - window))
    return torch.stack(masks)[:, None]


def dense(query, key, value, mask, softcap=None, scaling=None, sinks=None):
    """[B, T, H, D], with the scores of everyone; a sink is a key that every query of its head sees, and whose value is 0."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def varlen_stand_in(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch's varlen_attn as it is documented: [tokens, heads, width], documents between cumulative lengths, and of each
    the window_size[0] tokens before a query, all where it is -1; 0 behind it. Runs on a CPU."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and window_size[1] == 0 and torch.equal(cu_q, cu_k)
    lengths = cu_q.diff().tolist()
    assert cu_q[0] == 0 and cu_q[-1] == len(query) == len(key) == len(value) and max_q == max_k >= max(lengths)
    mask = visible([lengths], None if window_size[0] < 0 else window_size[0] + 1)
    heads_first = (t.transpose(0, 1)[None] for t in (query, key, value))
    return dense(*heads_first, mask, scaling=scale)[0]
