"""The language model's own inputs, kept: what changes only its layers needs the vision encoder's work no second time."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.models.modules import parts
from mmrecipes.models.prompts import Rows, rows_at_once, teacher_forced


class Reached(Exception):
    """Raised in a hook: the forward pass came as far as it was wanted."""


@dataclass(frozen=True)
class Call:
    """What the language model is called with for a batch of rows, each a prompt and its answer."""

    kwargs: dict[str, Any] = field(repr=False)
    mask: Tensor  # [B, T], 0 for padding
    ids: Tensor  # [B, T]
    lengths: list[int]  # tokens of each answer, the last of its row


@contextlib.contextmanager
def stopped_at(module: nn.Module, see: Callable[[dict[str, Any]], None] = lambda kwargs: None) -> Iterator[None]:
    """A forward pass inside ends where `module` would run; `see` gets the keyword arguments that it is called with."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        see(kwargs)
        raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(Reached):
            yield
    finally:
        handle.remove()


@torch.inference_mode()
def language_calls(model: nn.Module, rows: Rows, batch_size: int = 25) -> list[Call]:
    """One pass through everything before the language model, and what it is then called with, a batch of `rows` each."""
    language, calls = parts(model)["language"], []
    for inputs, lengths in teacher_forced(model, rows, rows_at_once(model, rows, batch_size)):
        seen: dict[str, Any] = {}
        with stopped_at(language, seen.update):
            model(**inputs)
        kwargs = seen | {"past_key_values": None, "use_cache": False}
        calls.append(Call(kwargs, inputs["attention_mask"], inputs["input_ids"], lengths))
    return calls


@torch.inference_mode()
def replayed_logits(model: nn.Module, calls: list[Call]) -> Tensor:
    """`evaluate.answer_logits` (T, V) from the language model and the head alone, for heads that are one matrix."""
    found, logits = parts(model), []
    for call in calls:
        hidden = found["language"](**call.kwargs).last_hidden_state
        for row, k in enumerate(call.lengths):
            logits.append(found["head"](hidden[row, -k - 1 : -1]).float())
    return torch.cat(logits)
