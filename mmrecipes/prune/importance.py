"""What of a model counts least: FFN columns, attention heads, whole layers, embedding width, in each tower.

Built by hand in notebook 21; `mmrecipes.structured` cuts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.models.modules import attention, ffn, head_dim, layers

if TYPE_CHECKING:
    from datasets import Dataset


def taylor_importance(model: nn.Module, rows: Dataset, batch_size: int = 10) -> dict[str, dict[str, Tensor]]:
    """How much the loss of the right answers would change, to first order, were a structure cut: |activation x gradient|.

    For each part: "columns" (L, F), "heads" (L, H), "layers" (L,) and "width" (D,), means over `rows` (image, question,
    answer). Taylor expansion: Molchanov et al. 2017 (arXiv:1611.06440); of heads: Michel et al. 2019 (arXiv:1905.10650).
    """
    from mmrecipes.models.prompts import teacher_forced

    totals: dict[tuple[str, str], list[Tensor]] = {}
    stacks = layers(model)
    with _watched(stacks) as seen:
        for inputs, lengths in teacher_forced(model, rows, batch_size):
            with torch.enable_grad():
                logits, ids = model(**inputs, use_cache=False).logits.float(), inputs["input_ids"]
                loss = sum(F.cross_entropy(logits[r, -k - 1 : -1], ids[r, -k:], reduction="sum") for r, k in enumerate(lengths))
            slopes = torch.autograd.grad(loss, [at for at, _ in seen.values()], allow_unused=True)  # LLaVA may skip a layer
            for (part, kind, _), (at, x), slope in zip(seen, seen.values(), slopes, strict=True):
                slope = torch.zeros_like(at) if slope is None else slope
                effect = (x.detach() * slope).flatten(1, -2).sum(1)  # (B, features): over an example's tokens
                if kind == "heads":
                    effect = effect.unflatten(1, (-1, head_dim(model, part))).sum(-1)
                elif kind == "layers":
                    effect = effect.sum(1, keepdim=True)
                totals.setdefault((part, kind), []).append(effect.abs().sum(0))
            seen.clear()
    found = {part: {} for part in stacks}
    for (part, kind), scores in totals.items():  # batch after batch, layer after layer
        per_layer = torch.stack(scores).unflatten(0, (-1, len(stacks[part]))).sum(0) / len(rows)
        found[part][kind] = per_layer.mean(0) if kind == "width" else per_layer.squeeze(-1) if kind == "layers" else per_layer
    return found


@contextlib.contextmanager
def _watched(stacks: Mapping[str, nn.ModuleList]) -> Iterator[dict[tuple[str, str, int], tuple[Tensor, Tensor]]]:
    """While open, by part, kind of structure and layer: where the gradient is to be taken, and what a cut takes away there."""
    seen: dict[tuple[str, str, int], tuple[Tensor, Tensor]] = {}

    def inside(key: tuple[str, str, int], args: tuple) -> None:
        seen[key] = (args[0], args[0])

    def around(part: str, i: int, _: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        x, y = _flows(args, kwargs, out)
        seen[part, "layers", i], seen[part, "width", i] = (y, y - x), (y, y)  # y - x: what the layer adds to what flows by

    hooks = []
    for part, stack in stacks.items():
        for i, layer in enumerate(stack):
            for kind, m in (("columns", ffn(layer)[1]), ("heads", attention(layer)[3])):
                hooks.append(m.register_forward_pre_hook(lambda _, args, key=(part, kind, i): inside(key, args)))
            hooks.append(layer.register_forward_hook(functools.partial(around, part, i), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _flows(args: tuple, kwargs: dict, out: object) -> tuple[Tensor, Tensor]:
    return args[0] if args else kwargs["hidden_states"], out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def magnitude_importance(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The same shapes as `importance`, from the weights alone: the norm of all weights that would go with a structure."""
    found = {}
    for part, stack in layers(model).items():
        size, columns, heads, width = head_dim(model, part), [], [], 0.0
        for layer in stack:
            into, out = ffn(layer)
            q, k, v, o = attention(layer)
            columns.append(sum(m.weight.square().sum(1) for m in into) + out.weight.square().sum(0))
            heads.append((q.weight.square().sum(1) + o.weight.square().sum(0)).unflatten(0, (-1, size)).sum(1))
            width = (
                width + sum(m.weight.square().sum(0) for m in (*into, q, k, v)) + sum(m.weight.square().sum(1) for m in (o, out))
            )
        whole = torch.stack([sum(p.square().sum() for p in layer.parameters()) for layer in stack])
        found[part] = {"columns": torch.stack(columns).sqrt(), "heads": torch.stack(heads).sqrt()}
        found[part] |= {"layers": whole.sqrt(), "width": width.sqrt()}
    return found


@torch.no_grad()
def similarity(model: nn.Module, rows: Dataset) -> dict[str, Tensor]:
    """Cosine of each layer's input with its output, the mean over tokens, (L,) for each part: near 1, it changes little.

    One minus this is the block influence of ShortGPT (arXiv:2403.03853).
    """
    from mmrecipes.models.prompts import teacher_forced

    stacks = layers(model)
    total, count, hooks = {p: torch.zeros(len(s)) for p, s in stacks.items()}, dict.fromkeys(stacks, 0), []

    def watch(part: str, i: int) -> None:
        def see(_: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            x, y = _flows(args, kwargs, out)
            cosines = F.cosine_similarity(x.float(), y.float(), dim=-1)
            total[part][i] += cosines.sum()
            count[part] += cosines.numel() / len(stacks[part])

        hooks.append(stacks[part][i].register_forward_hook(see, with_kwargs=True))

    for part, stack in stacks.items():
        for i in range(len(stack)):
            watch(part, i)
    try:
        for inputs, _ in teacher_forced(model, rows, batch_size=1):  # one at a time: no padding
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {p: t / count[p] for p, t in total.items()}


def strongest(scores: Tensor, count: int) -> list[list[int]]:
    """Of each row of `scores` (L, F) the indices of its `count` largest, in rising order."""
    return [row.topk(count).indices.sort().values.tolist() for row in scores]
