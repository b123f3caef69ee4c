"""Numbers of a matched pair, from the states of a sample of tokens.

Note: CKA and effective ranks are of directions: each token's state has length 1 before they are centred. A few tokens of a language
model, often the first of a row, have states a thousand times as long as all others: a sample with one would have a rank of 1.
"""

import torch

CONSTANT = 1e-6  # mean ‖x‖² of centred states of length 1 below which all are the same but for rounding in fp32


def closeness(s, t, counted) -> dict[str, torch.Tensor]:
    """Means over tokens, of filtered states [N, F]: ‖s − t‖ / ‖t‖ and the cosine of s and t."""
    norm_s, norm_t = (torch.linalg.vector_norm(x, dim=1) for x in (s, t))
    error = ratio(torch.linalg.vector_norm(s - t, dim=1), norm_t)
    return {"error": mean(error, counted), "cosine": mean(ratio((s * t).sum(1), norm_s * norm_t), counted)}


def gram(states, counted) -> torch.Tensor:
    """[N, N], of the tokens' directions, centred; 0 for tokens that do not count."""
    there = counted[:, None]
    x = torch.where(there, states.float(), 0)
    x = ratio(x, torch.linalg.vector_norm(x, dim=1, keepdim=True))
    x = torch.where(there, x - x.sum(0) / counted.sum(), 0)
    return x @ x.t()


def cka(one, other) -> float:
    """Linear CKA, from two centred Gram matrices: 1 where one side is the other, turned and scaled."""
    return float(ratio((one * other).sum(), torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(other)))


def effective_rank(gram) -> float:
    """e to the entropy of the normalized eigenvalues: in how many directions the tokens differ. 0 where they do not."""
    if gram.trace() <= CONSTANT * (gram.diagonal() > 0).sum():
        return 0.0
    share = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


def pull(own, total, counted) -> dict[str, torch.Tensor]:
    """Compares the layer loss's gradient at a state with the sum of all others there: ratio of norms, and cosine."""
    own, total = (torch.where(counted[:, None], x.float(), 0) for x in (own, total))
    rest = total - own
    norm_own, norm_rest = torch.linalg.vector_norm(own), torch.linalg.vector_norm(rest)
    return {"pull": ratio(norm_own, norm_rest), "pull_cosine": ratio((own * rest).sum(), norm_own * norm_rest)}


def mean(values, counted) -> torch.Tensor:
    return torch.where(counted, values, 0).sum() / counted.sum()


def ratio(a, b) -> torch.Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0)
