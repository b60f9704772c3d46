"""Rounding that looks at data: GPTQ and AWQ for any model's linear layers.

Both need one thing of the data: the second moments of what flows into a layer, H = X^T X / n. With them the error of the
layer's output is known for any rounded weight: the mean of |x (W - Q)^T|^2 is the trace of (W - Q) H (W - Q)^T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.quantize import clone, linears

if TYPE_CHECKING:
    from datasets import Dataset

REACHES = torch.linspace(0.35, 1.0, 14)  # where the last mark may lie, as a fraction of the largest weight


def best_scale(rows: Tensor, bits: int, importance: Tensor | None = None, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """The scale of each of `rows` (N, G) that leaves the least squared error, weighted by `importance` (G,): (N, 1).

    Clipping the largest weights may pay, so several reaches are tried; and both signs, because whole numbers of b bits reach
    one further on the negative side.
    """
    if bits < 2:
        raise UserError(f"{bits} bits; expected 2 or more: one bit has no mark beside zero")
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
    weight = torch.ones_like(rows[0]) if importance is None else importance
    best, least = largest, torch.full_like(largest, torch.inf)
    for reach in REACHES.tolist():
        for scale in (sign * reach * largest for sign in signs):
            off = ((rows - to_marks(rows, scale, bits)).square() * weight).sum(1, keepdim=True)
            best, least = torch.where(off < least, scale, best), torch.minimum(off, least)
    return best


def to_marks(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`w` on the nearest of the 2^bits marks, which are whole multiples of `scale`."""
    half = 2 ** (bits - 1)
    return (w / scale).round().clamp(-half, half - 1) * scale


def search_round(weight: Tensor, bits: int, group_size: int | None = None, importance: Tensor | None = None) -> Tensor:
    """`weight` (out, in) rounded to nearest with the best scale a channel, or a group of `group_size` inputs.

    `importance` (in,) says how much an input counts; without it, no data is needed.
    """
    groups = _groups(weight, group_size)
    parts = []
    for at in groups:
        part = weight[:, at].float()
        scale = best_scale(part, bits, None if importance is None else importance[at])
        parts.append(to_marks(part, scale, bits))
    return torch.cat(parts, 1).to(weight.dtype)


def gptq_round(weight: Tensor, moments: Tensor, bits: int, group_size: int | None = None, damp: float = 0.01) -> Tensor:
    """`weight` (out, in) rounded input by input; the error of each is made up for by those not yet rounded.

    GPTQ, arXiv:2210.17323. `moments` is H (in, in). Inputs that matter most come first, while most others can still make up
    for them (act-order), unless groups tie an input to its neighbours. Raises UserError when H is not (in, in) or not finite.
    """
    n = weight.shape[1]
    if moments.shape != (n, n) or not torch.isfinite(moments).all():
        raise UserError(f"gptq_round: moments are {tuple(moments.shape)}; expected finite ({n}, {n}), from calibrated.moments")
    groups = _groups(weight, group_size)
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
            rounded[i] = to_marks(w[i], scale, bits)
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


def _groups(weight: Tensor, group_size: int | None) -> list[slice]:
    n = weight.shape[1]
    if group_size and n % group_size:
        raise UserError(
            f"{n} inputs do not divide into groups of {group_size}; choose a divisor, or None for one scale a channel"
        )
    if not torch.isfinite(weight).all():
        raise UserError("the weight has entries that are not finite; mend the model first")
    return [slice(i, i + (group_size or n)) for i in range(0, n, group_size or n)]


def moments(model: nn.Module, rows: Dataset, names: list[str], balance: bool = False, batch_size: int = 25) -> dict[str, Tensor]:
    """H (in, in), float32, of each named linear layer's inputs, over all tokens of `rows` (image, question, answer).

    With `balance`, the tokens of the picture weigh as much in all as those of the text, where both flow through a layer: a
    VLM's prompt is mostly picture. Padding never counts.
    """
    from mmrecipes.evaluate import teacher_forced

    totals, weights, modules = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict(model.named_modules())
    token: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            share = token["weight"] if x.shape[:2] == token["weight"].shape else torch.ones(x.shape[:-1], device=x.device)
            x, share = x.flatten(0, -2), share.flatten()
            totals[name] += (x * share[:, None]).T @ x
            weights[name] += share.sum().item()

        return see

    hooks = [modules[n].register_forward_pre_hook(hook(n)) for n in names]
    try:
        for inputs, _ in teacher_forced(model, rows, batch_size):
            real, picture = inputs["attention_mask"].float(), inputs["input_ids"] == model.config.image_token_id
            token["weight"] = real
            if balance:
                token["weight"] = real * torch.where(picture, 1 / picture.sum(), 1 / (real.sum() - picture.sum()))
            with torch.inference_mode():
                model(**inputs)
    finally:
        for h in hooks:
            h.remove()
    if unseen := [n for n in names if not weights[n]]:
        raise UserError(f"moments: nothing flowed through {unseen[0]} on {len(rows)} rows; give rows that use it, at least one")
    return {n: totals[n] / weights[n] for n in names}


def calibrated(
    model: nn.Module,
    rows: Dataset,
    bits: int | Mapping[str, Any],
    method: Callable[..., Tensor] = gptq_round,
    group_size: int | None = None,
    balance: bool = False,
) -> nn.Module:
    """A copy with every linear weight rounded by `method`, block after block, each calibrated behind the rounded ones.

    With `bits` {layer's name: bits, or what else `method` takes}, only the layers named.
    """
    small = clone(model)
    layers = dict(linears(small))
    width = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for _, block in groupby((n for n in layers if n in width), key=block_of):
        names = list(block)
        found = moments(small, rows, names, balance)
        with torch.no_grad():
            for n in names:
                layers[n].weight.copy_(method(layers[n].weight, found[n], width[n], group_size))
    return small


def block_of(name: str) -> str:
    """The numbered block that a layer belongs to (`...layers.3`), or its own name."""
    words = name.split(".")
    numbers = [i for i, w in enumerate(words) if w.isdigit()]
    return ".".join(words[: numbers[0] + 1]) if numbers else name
