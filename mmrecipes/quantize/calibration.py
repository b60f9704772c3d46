"""What calibration needs of the data: the Hessian of each layer's inputs, gathered block after block (notebook 14)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import block_of, clone, linears
from mmrecipes.models.prompts import Rows, teacher_forced
from mmrecipes.quantize.gptq import gptq_round


@contextlib.contextmanager
def watched(modules: Mapping[nn.Module, Any], see: Callable[[Any, Tensor, Tensor], None]) -> Iterator[None]:
    """While it is open, `see(key, input, output)` is called after each run of one of `modules` {module: key}."""

    def ran(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        see(modules[module], x, out if isinstance(out, Tensor) else out[0])

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(ran, with_kwargs=True))
        yield


def input_hessians(
    model: nn.Module, rows: Rows, names: list[str], balance: bool = False, batch_size: int = 25
) -> dict[str, Tensor]:
    """H (in, in), float32, of each named linear layer's inputs, over all tokens of `rows` (image, question, answer).
    With `balance`, the image tokens weigh as much in all as the text tokens where both flow, though most of a VLM's prompt is
    image. Padding never counts. Raises UserError when nothing flows through a layer.
    """
    totals, weights = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    token_weight = torch.empty(0)  # [B, T], of the batch that flows

    def add(name: str, x: Tensor, _: Tensor) -> None:
        weight = token_weight if x.shape[:2] == token_weight.shape else torch.ones(x.shape[:-1], device=x.device)
        x, weight = x.detach().float().flatten(0, -2), weight.flatten()  # [tokens, in], [tokens]
        totals[name] += (x * weight[:, None]).T @ x
        weights[name] += weight.sum().item()

    with watched({model.get_submodule(n): n for n in names}, add), torch.inference_mode():
        for inputs, _ in teacher_forced(model, rows, batch_size):
            token_weight, image = inputs["attention_mask"].float(), inputs["input_ids"] == model.config.image_token_id
            if balance:
                token_weight = token_weight * torch.where(image, 1 / image.sum(), 1 / (token_weight.sum() - image.sum()))
            model(**inputs)
    if unseen := [n for n in names if not weights[n]]:
        raise UserError(f"Hessians: nothing flowed through {unseen[0]} on {len(rows)} rows; give rows that use it, at least one")
    return {n: totals[n] / weights[n] for n in names}


def calibrate(
    model: nn.Module, rows: Rows, bits: Any, method: Callable = gptq_round, group_size: int | None = None, balance: bool = False
) -> nn.Module:
    """A copy with every linear weight changed by `method(weight, hessian, bits, group_size)`, block after block.
    Each block is calibrated on `rows` behind those already changed. `bits`: what `method` takes, or {layer's name: that}.
    """
    small = clone(model)
    layers = dict(linears(small))
    chosen = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for _, block in groupby((n for n in layers if n in chosen), key=block_of):
        hessians = input_hessians(small, rows, list(block), balance)
        with torch.no_grad():
            for name, hessian in hessians.items():
                weight = layers[name].weight
                weight.copy_(method(weight, hessian, chosen[name], group_size))
    return small
