"""What calibration needs of the data: the Hessian of each layer's inputs, gathered block after block (notebook 14)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import block_of, clone, linears, part_of, parts
from mmrecipes.models.prompts import Rows, rows_at_once, teacher_forced
from mmrecipes.quantize.gptq import gptq_round
from mmrecipes.quantize.replay import Call, Reached, language_calls, stopped_at


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
    model: nn.Module,
    rows: Rows,
    names: list[str],
    balance: bool = False,
    batch_size: int = 25,
    calls: list[Call] | None = None,
) -> dict[str, Tensor]:
    """H (in, in), float32, of each named linear layer's inputs, over all tokens of `rows` (image, question, answer).
    With `balance`, the image tokens weigh as much in all as the text tokens where both flow, though most of a VLM's prompt is
    image. Padding never counts. `calls`: for layers of the language model, `language_calls` of the same rows. Raises UserError
    when nothing flows through a layer.
    """
    totals, weights = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    token_weight, waiting = torch.empty(0), set()  # [B, T], of the batch that flows; layers that it has not reached

    def add(name: str, x: Tensor, _: Tensor) -> None:
        weight = token_weight if x.shape[:2] == token_weight.shape else torch.ones(x.shape[:-1], device=x.device)
        x, weight = x.detach().float().flatten(0, -2), weight.flatten()  # [tokens, in], [tokens]
        totals[name] += (x * weight[:, None]).T @ x
        weights[name] += weight.sum().item()
        waiting.discard(name)
        if calls and not waiting:
            raise Reached

    with watched({model.get_submodule(n): n for n in names}, add), torch.inference_mode():
        for mask, ids, run in _batches(model, rows, names, batch_size, calls):
            token_weight, image = mask.float(), ids == model.config.image_token_id
            if balance:
                token_weight = token_weight * torch.where(image, 1 / image.sum(), 1 / (token_weight.sum() - image.sum()))
            waiting.update(names)
            with contextlib.suppress(Reached):
                run()
    if unseen := [n for n in names if not weights[n]]:
        raise UserError(f"Hessians: nothing flowed through {unseen[0]} on {len(rows)} rows; give rows that use it, at least one")
    return {n: totals[n] / weights[n] for n in names}


def _batches(
    model: nn.Module, rows: Rows, names: list[str], batch_size: int, calls: list[Call] | None
) -> Iterator[tuple[Tensor, Tensor, Callable[[], object]]]:
    """Mask and ids (B, T) of each batch, and what runs it through all of `names`, and through little else."""
    language, part = parts(model)["language"], part_of(model)
    for call in calls or ():
        yield call.mask, call.ids, lambda kwargs=call.kwargs: language(**kwargs)
    if calls:
        return
    early = {part.get(f"{name}.weight") for name in names} <= {"vision", "connector"}
    for inputs, _ in teacher_forced(model, rows, rows_at_once(model, rows, batch_size)):
        with stopped_at(language) if early else contextlib.nullcontext():
            yield inputs["attention_mask"], inputs["input_ids"], lambda inputs=inputs: model(**inputs)


def calibrate(
    model: nn.Module, rows: Rows, bits: Any, method: Callable = gptq_round, group_size: int | None = None, balance: bool = False
) -> nn.Module:
    """A copy with every linear weight changed by `method(weight, hessian, bits, group_size)`, block after block.
    Each block is calibrated on `rows` behind those already changed. `bits`: what `method` takes, or {layer's name: that}.
    """
    return calibrate_(clone(model), rows, bits, method, group_size, balance)


def calibrate_(
    model: nn.Module, rows: Rows, bits: Any, method: Callable = gptq_round, group_size: int | None = None, balance: bool = False
) -> nn.Module:
    """`calibrate` in place, for models of which a further copy is much."""
    layers, part, calls = dict(linears(model)), part_of(model), None
    chosen = bits if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for _, block in groupby((n for n in layers if n in chosen), key=block_of):
        names = list(block)
        inside = all(part[f"{name}.weight"] == "language" for name in names)
        # all that comes before the language model has its final weights by now, and is run once
        calls = (calls or language_calls(model, rows)) if inside else None
        hessians = input_hessians(model, rows, names, balance, calls=calls)
        with torch.no_grad():
            for name, hessian in hessians.items():
                weight = layers[name].weight
                weight.copy_(method(weight, hessian, chosen[name], group_size))
    return model
