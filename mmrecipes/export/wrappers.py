"""The modules that are exported: what makes visual tokens, and a decoder with its KV cache, with example inputs and free axes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.images import load_image


def check_float32(module: nn.Module) -> None:
    """UserError unless all parameters are float32, and none is packed by a quantization library."""
    if method := getattr(module, "quantization_method", None):
        what = str(getattr(method, "value", method))
        raise UserError(f"export: the model is already quantized ({what}); export the float checkpoint that it was made from")
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if wrong:
        raise UserError(f"export: the weights are {wrong}; it starts from float32, so load the model with dtype=torch.float32")


def vision_wrapper(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The module that makes visual tokens, and an example of what it takes: one image (or tile) of the model's own size."""
    core, name = getattr(model, "model", None), type(model).__name__
    size = getattr(model.config.vision_config, "image_size", None)
    if not isinstance(size, int):
        raise UserError(f"export: {name} takes images of many shapes; there is no recipe for it yet")
    encoder, image = getattr(core, "vision_model", None), torch.randn(1, 3, size, size)
    if hasattr(core, "connector") and hasattr(encoder, "post_layernorm"):
        return Idefics3Vision(model), image
    if hasattr(core, "multi_modal_projector") and hasattr(core, "get_image_features"):
        return ImageFeatures(model), image
    if hasattr(core, "connector") and hasattr(encoder, "backbone"):  # distill.encoders.swapped.BackboneEncoder
        return modules.VisionWithConnector(model), image
    raise UserError(f"export: {name} is built neither like Idefics3 nor like LLaVA; there is no recipe for it yet")


class Idefics3Vision(nn.Module):
    """pixel_values (N, 3, H, W), whole images of the model's own size -> visual tokens (N, T, D), connector included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, self.connector = model.model.vision_model, model.model.connector
        size = self.encoder.config.image_size
        n, blank = size // self.encoder.patch_size, torch.zeros(1, 3, size, size)
        with torch.no_grad():  # positions depend on which patches are real; here all are, so they are constants
            embeds = self.encoder.embeddings(blank, torch.ones(1, n, n, dtype=torch.bool))
            self.positions = nn.Buffer(embeds - self.patches(blank))

    def patches(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.patches(pixel_values) + self.positions
        hidden = self.encoder.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return self.connector(self.encoder.post_layernorm(hidden))


class ImageFeatures(nn.Module):
    """pixel_values (1, 3, H, W) -> visual tokens (T, D), by the model's own get_image_features (LLaVA and kin)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.core = model.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.core.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return features[0] if isinstance(features, list | tuple) else features.flatten(0, -2)


def calibration_pixels(model: nn.Module, images: Sequence[Image.Image | str | Path]) -> list[np.ndarray]:
    """What the vision wrapper takes, (1, 3, H, W) each: the images (or their tiles) as the model's processor makes them."""
    process = model.processor.image_processor
    pixels = [process(images=[[load_image(image)]], return_tensors="np")["pixel_values"] for image in images]
    return [tile[None] for each in pixels for tile in each.reshape(-1, *each.shape[-3:]).astype(np.float32)]


def language_wrapper(model: nn.Module) -> tuple[nn.Module, dict[str, object], dict[str, object]]:
    """The module that computes the next token's logits, an example of what it takes, and which of its axes are free."""
    config, module = model.config.get_text_config(), LanguageWithCache(model).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():  # a cache as the decoder itself makes it
        embeds = module.embed_tokens(torch.zeros(1, 5, dtype=torch.int64))
        module.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    ids, features = torch.full((1, 3), module.image_token_id), torch.randn(4, config.hidden_size)
    dim = torch.export.Dim
    axes = {"input_ids": {1: dim("tokens", min=1)}, "image_features": {0: dim("features", min=1)}}
    axes["past_key_values"] = [{2: dim("cache_length", min=0)}] * (2 * config.num_hidden_layers)
    return module, {"input_ids": ids, "image_features": features, "past_key_values": cache}, axes


class LanguageWithCache(nn.Module):
    """input_ids (1, T), image_features (N, D), a cache -> {"logits": (1, 1, V) of the next token, "past_key_values": the cache}.
    The same graph reads a prompt and computes each further token. Without images N is 1 and its row is not read.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        parts = modules.parts(model)
        self.decoder, self.head = parts["language"], parts["head"]
        self.embed_tokens, self.image_token_id = model.get_input_embeddings(), model.config.image_token_id

    def forward(self, input_ids: Tensor, image_features: Tensor, past_key_values: object) -> dict[str, object]:
        is_image = input_ids == self.image_token_id
        row = (is_image.long().cumsum(1) - 1).clamp(min=0)
        embeds = torch.where(is_image.unsqueeze(-1), image_features[row], self.embed_tokens(input_ids))
        out = self.decoder(inputs_embeds=embeds, past_key_values=past_key_values, use_cache=True)
        return {"logits": self.head(out.last_hidden_state[:, -1:]), "past_key_values": out.past_key_values}


class LanguageWithoutCache(nn.Module):
    """inputs_embeds (B, T, D), attention_mask (B, T), 1 for real tokens -> last hidden states (B, T, D), normed (notebook 11)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder = model.model.text_model

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at 0, however much padding precedes it
        at = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        seen = (at[None, :] <= at[:, None])[None, None] & (attention_mask[:, None, None, :] > 0)
        # finite, not -inf: a padding token sees nobody, and its row must not become NaN
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        out = self.decoder(inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state
