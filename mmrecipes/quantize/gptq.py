"""Rounding that looks at data: GPTQ and AWQ for any model's linear layers.

Both need one thing of the data: the second moments of what flows into a layer, H = X^T X / n. With them the error of the
layer's output is known for any rounded weight: the mean of |x (W - Q)^T|^2 is the trace of (W - Q) H (W - Q)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmrecipes.errors import UserError
from mmrecipes.quantize.rounding import best_scale, fake_quantize, input_groups, search_round

if TYPE_CHECKING:
    pass


def column_sweep(weight: Tensor, moments: Tensor, change: Callable[[Tensor, int, Tensor], Tensor], damp: float = 0.01) -> Tensor:
    """`weight` (out, in) with each column i replaced by `change(weight so far, i, spread)`, first to last.

    The columns after it are shifted so that the layer's output changes least (Hassibi and Stork 1992); `spread`, the Cholesky
    factor of H's inverse, is GPTQ's (arXiv:2210.17323). UserError when H is not (in, in) or not finite.
    """
    check_hessian(weight, moments)
    h, n = moments.float().clone(), weight.shape[1]
    h.diagonal().add_(damp * h.diagonal().mean() + 1e-8)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rows = weight.detach().float().T.clone()  # (in, out): an input is a row, quick to reach
    for i in range(n):
        new = change(rows.T, i, spread)
        rows[i + 1 :].addr_(spread[i, i + 1 :], (rows[i] - new) / spread[i, i], alpha=-1)
        rows[i] = new
    return rows.T.contiguous().to(weight.dtype)


def check_hessian(weight: Tensor, moments: Tensor) -> None:
    n = weight.shape[1]
    if moments.shape != (n, n) or not torch.isfinite(moments).all():
        raise UserError(f"prune: moments are {tuple(moments.shape)}; expected finite ({n}, {n}), from quantize.input_hessians")


def gptq_round(weight: Tensor, moments: Tensor, bits: int, group_size: int | None = None, damp: float = 0.01) -> Tensor:
    """`weight` (out, in) rounded input by input; the error of each is made up for by those not yet rounded.

    GPTQ, arXiv:2210.17323. `moments` is H (in, in). Inputs that matter most come first, while most others can still make up
    for them (act-order), unless groups tie an input to its neighbours. Raises UserError when H is not (in, in) or not finite.
    """
    n = weight.shape[1]
    if moments.shape != (n, n) or not torch.isfinite(moments).all():
        raise UserError(
            f"gptq_round: moments are {tuple(moments.shape)}; expected finite ({n}, {n}), from quantize.input_hessians"
        )
    groups = input_groups(weight, group_size)
    order = torch.arange(n) if group_size else moments.diagonal().argsort(descending=True)
    w, h = (
        weight.detach().float().T[order].clone(),
        moments[order][:, order].clone(),
    )  # (in, out): an input is a row, quick to reach
    h.diagonal().add_(damp * h.diagonal().mean() + 1e-8)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded = torch.empty_like(w)
    for at in groups:
        scale = best_scale(w[at].T, bits, h.diagonal()[at])[:, 0]
        for i in range(n)[at]:
            rounded[i] = fake_quantize(w[i], scale, bits)
            w[i:].addr_(spread[i, i:], (w[i] - rounded[i]) / spread[i, i], alpha=-1)
    return rounded[order.argsort()].T.contiguous().to(weight.dtype)


def awq_round(weight: Tensor, moments: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """`weight` (out, in) rounded to nearest after its inputs were scaled: those with large activations get finer marks.

    AWQ, arXiv:2306.00978. The strength of the scaling is searched: the one with the least error of the layer's output wins.
    The scales are folded back into the weight here; a runtime would fold them into the layer before.
    """
    size = moments.diagonal().sqrt().clamp(min=1e-8)
    size = size / size.mean()
    best, least = weight, torch.inf
    for strength in torch.linspace(0, 1, 11).tolist():
        scale = size**strength
        tried = search_round(weight.float() * scale, bits, group_size, 1 / scale**2 * size**2) / scale
        off = output_error(weight.float(), tried, moments)
        if off < least:
            best, least = tried, off
    return best.to(weight.dtype)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Mean squared change of the layer's output, summed over outputs: trace of (W - Q) H (W - Q)^T."""
    gap = weight - rounded
    return ((gap @ moments) * gap).sum().item()
