"""Hidden states, vision features, attention inputs and logits of a model, captured while it runs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules


def layer_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's output with that of the teacher's layer that does its work, the last with the last (TinyBERT, 1909.10351)."""
    return [(h, teacher[round((i + 1) * len(teacher) / len(student)) - 1]) for i, h in enumerate(student)]


@contextlib.contextmanager
def captured(model: nn.Module, attention: bool = False) -> Iterator[dict[str, Any]]:
    """While open, what the model computes is kept: "vision" (features), "hidden" (of each language layer) and "logits".

    With `attention` also queries, keys and values (B, T, D) of both transformers' last layers: {"vision q": ..., ...}.
    """
    outputs: dict[str, Any] = {"hidden": [], "attention": {}}
    parts = modules.parts(model)
    with contextlib.ExitStack() as hooks:
        for layer in modules.layers(model, ("language",))["language"]:
            hooks.enter_context(layer.register_forward_hook(lambda *a: outputs["hidden"].append(_first(a[2]))))
        hooks.enter_context(parts["vision"].register_forward_hook(lambda *a: outputs.update(vision=_first(a[2]))))
        hooks.enter_context(parts["head"].register_forward_hook(lambda *a: outputs.update(logits=a[2])))
        for part in modules.TOWERS if attention else ():
            try:
                last = modules.layers(model, (part,))[part][-1]
            except UserError:  # a convolutional encoder has no attention
                continue
            for name, m in zip("qkv", modules.attention(last), strict=False):
                key = f"{part} {name}"
                hooks.enter_context(m.register_forward_hook(lambda *a, key=key: outputs["attention"].update({key: a[2]})))
        yield outputs


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
