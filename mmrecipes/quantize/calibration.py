"""What calibration needs of the data: the Hessian of each layer's inputs, gathered block after block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import block_of, clone, linears
from mmrecipes.quantize.gptq import gptq_round

if TYPE_CHECKING:
    from datasets import Dataset


def input_hessians(
    model: nn.Module, rows: Dataset, names: list[str], balance: bool = False, batch_size: int = 25
) -> dict[str, Tensor]:
    """H (in, in), float32, of each named linear layer's inputs, over all tokens of `rows` (image, question, answer).

    With `balance`, the tokens of the picture weigh as much in all as those of the text, where both flow through a layer: a
    VLM's prompt is mostly picture. Padding never counts.
    """
    from mmrecipes.models.prompts import teacher_forced

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


def calibrate(
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
        found = input_hessians(small, rows, names, balance)
        with torch.no_grad():
            for n in names:
                layers[n].weight.copy_(method(layers[n].weight, found[n], width[n], group_size))
    return small
