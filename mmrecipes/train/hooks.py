"""Hidden states, vision features, attention inputs and logits of a model, captured while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import layers


def layer_pairs(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's output with that of the parent's layer that does its work, the last with the last (TinyBERT, 1909.10351)."""
    return [(h, wanted[round((i + 1) * len(wanted) / len(own)) - 1]) for i, h in enumerate(own)]


@contextlib.contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, Any]]:
    """While open, what the model computes is kept: "vision" (features), "hidden" (of each language layer) and "logits"."""
    found: dict[str, Any] = {"hidden": []}
    parts = modules.parts(model)

    def first(out: Any) -> Tensor:
        return out if isinstance(out, Tensor) else out[0]

    hooks = [
        layer.register_forward_hook(lambda *a: found["hidden"].append(first(a[2])))
        for layer in layers(model, ("language",))["language"]
    ]
    hooks.append(parts["vision"].register_forward_hook(lambda *a: found.update(vision=first(a[2]))))
    hooks.append(parts["head"].register_forward_hook(lambda *a: found.update(logits=a[2])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def captured_with_attention(model: nn.Module) -> Iterator[dict[str, Any]]:
    """`train.captured`, and the queries, keys and values of the last layer of each tower: "attention", (B, T, D) each."""
    with captured(model) as found:
        found["attention"], hooks = {}, []
        for part in modules.TOWERS:
            try:
                last = modules.layers(model, (part,))[part][-1]
            except UserError:  # a convolutional tower, which has no attention
                continue
            for name, m in zip("qkv", modules.attention(last), strict=False):
                keep = found["attention"].__setitem__
                hooks.append(m.register_forward_hook(lambda _m, _a, out, key=f"{part} {name}", keep=keep: keep(key, out)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
