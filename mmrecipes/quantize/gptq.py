"""GPTQ and AWQ: rounding by the Hessian H = X^T X / n (in, in) of a layer's inputs X (n, in). By hand in notebook 14."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmrecipes.errors import UserError
from mmrecipes.quantize.groups import best_scale, fake_quantize, grouped
from mmrecipes.quantize.rounding import search_round

Change = Callable[[Tensor, int, Tensor], Tensor]  # weight so far (out, in), column i, Cholesky factor (in, in) -> column (out,)


def check_hessian(weight: Tensor, hessian: Tensor) -> None:
    """UserError unless `hessian` is finite and (in, in) for `weight` (out, in)."""
    n = weight.shape[1]
    if hessian.shape != (n, n) or not torch.isfinite(hessian).all():
        raise UserError(f"the Hessian is {tuple(hessian.shape)}; expected finite ({n}, {n}), from quantize.input_hessians")


def column_sweep(weight: Tensor, hessian: Tensor, change: Change, damp: float = 0.01) -> Tensor:
    """`weight` (out, in) with each column i replaced by `change(weight so far, i, factor)`, first to last.
    The columns after it compensate its error (Hassibi and Stork 1992). `factor` (in, in) is the upper Cholesky factor of the
    inverse of H, damped by `damp` of its mean diagonal (GPTQ, arXiv:2210.17323). UserError as `check_hessian`.
    """
    check_hessian(weight, hessian)
    damped = hessian.float().clone()
    damped.diagonal().add_(damp * damped.diagonal().mean() + 1e-8)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rows = weight.detach().float().T.clone()  # [in, out]
    for i, row in enumerate(rows):
        new = change(rows.T, i, factor)
        rows[i + 1 :].addr_(factor[i, i + 1 :], (row - new) / factor[i, i], alpha=-1)
        row.copy_(new)
    return rows.T.contiguous().to(weight.dtype)


def round_columns(weight: Tensor, importance: Tensor, bits: int, group_size: int | None, zeros: Tensor | None = None) -> Change:
    """For `column_sweep`: round to `bits` bits, with the best scale of each group for `importance` (in,) of its inputs.
    The scale is chosen when the group's first column comes. `zeros` (out, in): what is or becomes zero. UserError as `grouped`.
    """
    size = grouped(weight, group_size).shape[1]
    scale = torch.ones(len(weight), device=weight.device)
    zeros = torch.zeros_like(weight, dtype=torch.bool) if zeros is None else zeros

    def change(w: Tensor, i: int, _: Tensor) -> Tensor:
        if i % size == 0:
            group = slice(i, i + size)
            scale.copy_(best_scale(w[:, group].masked_fill(zeros[:, group], 0), bits, importance[group])[:, 0])
        return fake_quantize(w[:, i], scale, bits).masked_fill(zeros[:, i], 0)

    return change


def static_scales(weight: Tensor, importance: Tensor, bits: int, group_size: int) -> Tensor:
    """The best scale of each group of `weight` (out, in), before any sweep, at each of its inputs: (out, in)."""
    rows = grouped(weight, group_size).float()
    scale = best_scale(rows, bits, importance.reshape(-1, group_size).repeat(len(weight), 1))
    return scale.expand_as(rows).reshape(weight.shape)


def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    damp: float = 0.01,
    act_order: bool | None = None,
) -> Tensor:
    """`weight` (out, in) rounded by GPTQ (arXiv:2210.17323). UserError as `check_hessian` and `grouped`.
    `act_order`: the largest inputs (diagonal of H) come first, while most others can still compensate; None: where there are no
    groups. In groups it fixes their scales before the sweep ("static groups"), so that a group still is neighbouring inputs.
    """
    check_hessian(weight, hessian)
    act_order = not group_size if act_order is None else act_order
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    original, weight, hessian = weight, weight.detach().T[order].T, hessian[order][:, order]  # .T twice: contiguous columns
    importance = hessian.diagonal() + (damp * hessian.diagonal().mean() + 1e-8)
    if act_order and group_size:
        scales = static_scales(original.detach(), importance[order.argsort()], bits, group_size)[:, order]
        return column_sweep(weight, hessian, lambda w, i, _: fake_quantize(w[:, i], scales[:, i], bits), damp)[:, order.argsort()]
    return column_sweep(weight, hessian, round_columns(weight, importance, bits, group_size), damp)[:, order.argsort()]


def awq_round(weight: Tensor, hessian: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """`weight` (out, in) rounded by AWQ (arXiv:2306.00978): inputs with large activations get finer quantization levels.
    The inputs' scales are folded back into the weight; a runtime would fold them into the layer before. Errors: `gptq_round`'s.
    """
    check_hessian(weight, hessian)
    size = hessian.diagonal().sqrt().clamp(min=1e-8)
    size = size / size.mean()
    scales = (size**strength for strength in torch.linspace(0, 1, 11).tolist())
    tried = (search_round(weight.float() * s, bits, group_size, 1 / s**2 * size**2) / s for s in scales)
    return min(tried, key=lambda rounded: output_error(weight.float(), rounded, hessian)).to(weight.dtype)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Mean squared change of the layer's output, summed over outputs: trace of (W - Q) H (W - Q)^T."""
    gap = weight - rounded
    return ((gap @ hessian) * gap).sum().item()
