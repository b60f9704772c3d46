"""A decoder whose later layers see fewer tokens: hooks on its own layers, whatever its positions, masks and caches."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def dropping(language: nn.Module, layer: int, choose: Callable[[Mapping[str, Any]], Tensor]) -> Iterator[dict[str, Any]]:
    """While it is open, the layers of `language` from `layer` on see only the tokens that `choose(seen)`, (B, K), says.
    Yields `seen`: what the "first" layer gets (B, T, D); "before", the same of the layer before the drop, with its cosines and
    sines; "positions" (B or 1, T) or (3, B, T), as the model counts them; after the drop "kept" (B, K). Between the layers all
    tokens have their places, zeros where they were dropped: Qwen3-VL adds image features there (DeepStack).
    """
    seen: dict[str, Any] = {}

    def count(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["positions"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def enter(i: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if i == 0:
            seen["first"] = args[0]
        if i == layer - 1:
            seen["before"] = args[0], kwargs["position_embeddings"]
        if i < layer:
            return None
        if i == layer:
            seen["kept"] = choose(seen)
        return (_take(args[0], seen["kept"], 1), *args[1:]), _taken(kwargs, seen["kept"])

    def leave(out: Tensor) -> Tensor:
        return torch.zeros_like(seen["first"]).scatter(1, seen["kept"][..., None].expand_as(out), out)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(language.rotary_emb.register_forward_pre_hook(count, with_kwargs=True))
        for i, block in enumerate(language.layers):
            hook = block.register_forward_pre_hook(lambda _, args, kwargs, i=i: enter(i, args, kwargs), with_kwargs=True)
            hooks.enter_context(hook)
            if i >= layer:
                hooks.enter_context(block.register_forward_hook(lambda _, __, out: leave(out)))
        yield seen


def _take(x: Tensor, kept: Tensor, dim: int) -> Tensor:
    """`x` (B or 1, ...) at the places `kept` (B, K) of its dimension `dim`."""
    shape = [len(kept)] + [1] * (x.ndim - 1)
    shape[dim] = kept.shape[1]
    return x.expand(len(kept), *x.shape[1:]).take_along_dim(kept.view(shape), dim)


def _taken(given: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for the tokens `kept` (B, K) alone: their own positions, and what they see of one another."""
    made = dict(given) | {"position_embeddings": tuple(_take(r, kept, -2) for r in given["position_embeddings"])}
    if given.get("position_ids") is not None:
        made["position_ids"] = _take(given["position_ids"], kept, -1)
    if given.get("attention_mask") is not None:
        made["attention_mask"] = _take(_take(given["attention_mask"], kept, -1), kept, -2)
    return made
