"""The modules that are exported: what makes visual tokens, and a decoder with its KV cache, with example inputs and free axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.images import load_image

if TYPE_CHECKING:
    from PIL import Image

# ---- what is exported


class LanguageWithCache(nn.Module):
    """input_ids (1, T), image_features (N, D), a cache -> {"logits": (1, 1, V) of the next word, "past_key_values": the cache}.

    Words' embeddings, with the visual tokens in their places, go through the library's own decoder after what the cache holds:
    the same graph reads a prompt and finds each further word. Without pictures N is 1 and its row is not read.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        found = modules.parts(model)
        self.decoder, self.head = found["language"], found["head"]
        self.words, self.image = model.get_input_embeddings(), model.config.image_token_id

    def forward(self, input_ids: Tensor, image_features: Tensor, past_key_values: object) -> dict[str, object]:
        pictured = input_ids == self.image
        at = (pictured.long().cumsum(1) - 1).clamp(min=0)
        embeds = torch.where(pictured.unsqueeze(-1), image_features[at], self.words(input_ids))
        found = self.decoder(inputs_embeds=embeds, past_key_values=past_key_values, use_cache=True)
        return {"logits": self.head(found.last_hidden_state[:, -1:]), "past_key_values": found.past_key_values}


class ImageFeatures(nn.Module):
    """pixel_values (1, 3, H, W) -> visual tokens (T, D), by the model's own get_image_features (LLaVA and kin)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.core = model.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = self.core.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return found[0] if isinstance(found, list | tuple) else found.flatten(0, -2)


def vision_wrapper(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The module that makes visual tokens, and an example of what it takes: one picture (or tile) of the model's own size."""
    core, config = getattr(model, "model", None), model.config.vision_config
    if not isinstance(getattr(config, "image_size", None), int):
        raise UserError(f"export: {type(model).__name__} takes pictures of many shapes; there is no recipe for it yet")
    picture = torch.randn(1, 3, config.image_size, config.image_size)
    if hasattr(core, "connector") and hasattr(getattr(core, "vision_model", None), "post_layernorm"):
        return Idefics3Vision(model), picture
    if hasattr(core, "multi_modal_projector") and hasattr(core, "get_image_features"):
        return ImageFeatures(model), picture
    if hasattr(core, "connector") and hasattr(getattr(core, "vision_model", None), "backbone"):  # encoders.swapped.Tower
        return modules.VisionWithConnector(model), picture
    raise UserError(
        f"export: {type(model).__name__} is built neither like Idefics3 nor like LLaVA; there is no recipe for it yet"
    )


def calibration_pixels(model: nn.Module, pictures: Sequence[Image.Image | str | Path]) -> list[np.ndarray]:
    """What `vision` takes, (1, 3, H, W) each: the pictures (or their tiles) as the model's processor makes them."""
    found = [model.processor.image_processor(images=[[load_image(p)]], return_tensors="np")["pixel_values"] for p in pictures]
    return [tile[None] for each in found for tile in each.reshape(-1, *each.shape[-3:]).astype(np.float32)]


def language_wrapper(model: nn.Module) -> tuple[nn.Module, dict[str, object], dict[str, object]]:
    """The module that finds the next word, an example of what it takes, and which of its axes are free."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    found = LanguageWithCache(model).eval()
    with torch.no_grad():  # a cache as the decoder itself makes it
        cache, five = DynamicCache(config=config), torch.zeros(1, 5, dtype=torch.int64)
        found.decoder(inputs_embeds=found.words(five), past_key_values=cache, use_cache=True)
    ids, pieces = torch.full((1, 3), found.image), torch.randn(4, config.hidden_size)
    words, features, before = (torch.export.Dim(n, min=least) for n, least in (("words", 1), ("features", 1), ("before", 0)))
    axes = {"input_ids": {1: words}, "image_features": {0: features}}
    axes["past_key_values"] = [{2: before}] * (2 * config.num_hidden_layers)
    return found, {"input_ids": ids, "image_features": pieces, "past_key_values": cache}, axes


class Idefics3Vision(nn.Module):
    """pixel_values (N, 3, H, W), whole pictures of the model's own size -> visual tokens (N, T, D), connector included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        size = self.tower.config.image_size
        n, blank = size // self.tower.patch_size, torch.zeros(1, 3, size, size)
        with torch.no_grad():  # positions depend on which patches are real; here all are, so they are constants
            self.positions = nn.Buffer(self.tower.embeddings(blank, torch.ones(1, n, n, dtype=torch.bool)) - self.patches(blank))

    def patches(self, pixel_values: Tensor) -> Tensor:
        return self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        flowing = self.patches(pixel_values) + self.positions
        flowing = self.tower.encoder(inputs_embeds=flowing, attention_mask=None).last_hidden_state
        return self.connector(self.tower.post_layernorm(flowing))
