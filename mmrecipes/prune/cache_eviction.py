"""Which tokens may stay in a KV cache (H2O, arXiv:2306.14048; SnapKV, arXiv:2404.14469). Built by hand in notebook 16."""

import torch
from torch import Tensor

from mmrecipes.errors import UserError


def kept_positions(scores: Tensor, budget: int, newest: int = 1, protected: Tensor | None = None) -> Tensor:
    """The positions (..., budget) that stay, ascending, of `scores` (..., T): the `newest`, all that are `protected` (T,), and
    of the others those with the best scores. UserError where these alone are more than the budget, or T is less than it.
    """
    length = scores.shape[-1]
    must = torch.zeros(length, dtype=torch.bool) if protected is None else protected.clone()
    must[length - newest :] = True
    if not must.sum() <= budget <= length:
        raise UserError(f"kept_positions: budget {budget} for {int(must.sum())} tokens that must stay, of {length}")
    # a rank instead of a score: protected tokens come first, however large or infinite the scores of others are
    rank = scores.argsort(dim=-1, stable=True).argsort(-1) + length * must
    return rank.topk(budget, -1).indices.sort(-1).values
