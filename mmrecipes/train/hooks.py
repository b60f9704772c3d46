"""Hidden states, vision features, attention inputs and logits of a model, captured while it runs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.quantize.calibration import watched


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
    keys = dict.fromkeys(modules.layers(model, ("language",))["language"], "hidden")
    keys |= {parts["vision"]: "vision", parts["head"]: "logits"}
    for part in modules.TOWERS if attention else ():
        with contextlib.suppress(UserError):  # a convolutional encoder has no attention
            last = modules.layers(model, (part,))[part][-1]
            keys |= {m: f"{part} {name}" for name, m in zip("qkv", modules.attention(last), strict=False)}

    def keep(key: str, _: Tensor, out: Tensor) -> None:
        if key == "hidden":
            outputs[key].append(out)
        else:
            (outputs if key in ("vision", "logits") else outputs["attention"])[key] = out

    with watched(keys, keep):
        yield outputs
