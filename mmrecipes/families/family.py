"""The form that each family fills in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Inputs = Mapping[str, np.ndarray]  # what a processor makes of one conversation, or what one run of the vision graph takes
Settings = Mapping[str, Any]  # numbers from the model's config, kept in the export's manifest


def concatenate(tokens: Sequence[np.ndarray], inputs: Inputs, settings: Settings) -> np.ndarray:
    """Visual tokens (N, D) of all images or tiles (N_i, D), one after the other."""
    return np.concatenate(tokens)


@dataclass(frozen=True)
class Family:
    """`images` makes the processor's output into what the vision graph takes, one run an image or tile; `encode` is that graph,
    (core of the model, **inputs of a run) -> (N, D); `merge` joins the runs' tokens into the rows that replace placeholders.

    `settings` reads from the model what these need to know; `free` names the axes of the graph's inputs that vary;
    `positions` gives positions (axes, 1, T) of a prompt where they are not 0, 1, 2, ... ; `masks` gives what the decoder needs
    besides, traced: (config of the decoder, is_image (B, T), length of the cache, None or a mask of padding (B, S)) -> arguments;
    `forwards` are traced in place of those of modules, by the names of their classes (`qwen_vl`, `gated_delta`); a decoder with
    states of fixed size beside its KV cache takes at most `piece` tokens a step, and prompts in pieces.
    With DeepStack, layers of the decoder get visual tokens of their own, which lie beside the others: (N, (1 + layers) D).
    """

    name: str
    models: tuple[str, ...]
    encode: Callable[..., Any] | None  # None: `export.wrappers.Idefics3Vision`, where a tile's positions are constants
    images: Callable[[Inputs, Settings], list[dict[str, np.ndarray]]]
    merge: Callable[[Sequence[np.ndarray], Inputs, Settings], np.ndarray] = concatenate
    settings: Callable[[Any], dict[str, Any]] = lambda model: {}
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    positions: Callable[[Inputs, Settings], np.ndarray] | None = None
    masks: Callable[..., dict[str, Any]] | None = None
    forwards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    piece: int = 0  # 0: as many as there are
    two_way: bool = False  # all of a prompt sees all of it, so that none can be kept for a longer prompt


def hidden_states(core, pixel_values):
    """(1, T, width): the layers of the vision encoder that the config selects, side by side, for LLaVA and its kin."""
    import torch

    config = core.config
    out, layers = core.vision_tower(pixel_values, output_hidden_states=True), config.vision_feature_layer
    chosen = [out.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [each[:, 1:] for each in chosen]  # without the class token
    return torch.cat(chosen, dim=-1)
