"""Fewer weights: each function takes a model and returns a copy with zeros, or with less. The pruning chapter builds them."""

from __future__ import annotations

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.quantize import clone, linears


def magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """Zero the `sparsity` (0 to 1) smallest weights of each linear layer (LeCun et al. 1989, Han et al. 2015)."""
    if not 0 <= sparsity < 1:
        raise UserError(f"magnitude: sparsity is {sparsity}; expected 0 <= sparsity < 1")
    thin = clone(model)
    with torch.no_grad():
        for _, layer in linears(thin):
            k = int(sparsity * layer.weight.numel())
            if k:
                layer.weight[layer.weight.abs() <= layer.weight.abs().flatten().kthvalue(k).values] = 0
    return thin
