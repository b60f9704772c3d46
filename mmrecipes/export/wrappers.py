"""The modules that are exported: what makes visual tokens, and a decoder with its KV cache, with example inputs and free axes."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.exporters.utils import patch_attribute, patch_attributes
from transformers.masking_utils import create_causal_mask

from mmrecipes import families
from mmrecipes.errors import UserError
from mmrecipes.families.family import Family
from mmrecipes.models import modules
from mmrecipes.models.images import load_image

NESTED = ("idefics3", "idefics2", "mini_resampler")  # whose image processors take a list of images for each text


def check_float32(module: nn.Module) -> None:
    """UserError unless all parameters are float32, and none is packed by a quantization library."""
    if method := getattr(module, "quantization_method", None):
        what = str(getattr(method, "value", method))
        raise UserError(f"export: the model is already quantized ({what}); export the float checkpoint that it was made from")
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if wrong:
        raise UserError(f"export: the weights are {wrong}; it starts from float32, so load the model with dtype=torch.float32")


def family_of(model: nn.Module) -> Family:
    """What is special about `model`'s family; UserError for one that no file in `mmrecipes.families` describes."""
    core, name = getattr(model, "model", None), type(model).__name__
    found = next((f for kind in type(model).__mro__ if (f := families.family_of(kind.__name__))), None)
    if found and found.name == "tiles" and hasattr(getattr(core, "vision_tower", None), "patch_conv"):
        return families.BY_NAME["pixtral"]
    if found is None and hasattr(core, "connector") and hasattr(getattr(core, "vision_model", None), "backbone"):
        return families.BY_NAME["idefics3"]  # distill.encoders.swapped.BackboneEncoder
    if found is None:
        known = ", ".join(sorted({family.name for family in families.TABLE}))
        why = f": {families.NOT_YET[name]}" if name in families.NOT_YET else ""
        raise UserError(f"export: there is no recipe for {name} yet{why}; known are {known}; CONTRIBUTING.md says how to add one")
    return found


def vision_graph(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, object]]]:
    """The module that makes visual tokens, an example of what one run of it takes, and which of its axes are free."""
    family = family_of(model)
    if family.encode is None:
        side = model.config.vision_config.image_size
        whole = hasattr(model.model.vision_model, "post_layernorm")
        return (
            (Idefics3Vision if whole else modules.VisionWithConnector)(model),
            {"pixel_values": torch.randn(1, 3, side, side)},
            {},
        )
    noise = np.random.default_rng(0).integers(0, 256, (448, 672, 3), dtype=np.uint8)  # any shape but a square
    run = vision_inputs(model, [Image.fromarray(noise)])[0]
    free = {name: dict.fromkeys(family.free.get(name, ()), torch.export.Dim.DYNAMIC) for name in run}
    return VisionGraph(model, family), {name: torch.from_numpy(x.copy()) for name, x in run.items()}, free


def vision_wrapper(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """As `vision_graph`, for models whose encoder takes pixels alone: the module, and an example (1, 3, H, W)."""
    module, example, _ = vision_graph(model)
    return module, example["pixel_values"]


def vision_inputs(model: nn.Module, images: Sequence[Image.Image]) -> list[dict[str, np.ndarray]]:
    """What the vision graph takes, one run an image or tile, as the model's processor and its family make it."""
    family = family_of(model)
    images = [load_image(image) for image in images]
    seen = model.processor.image_processor(images=[images] if family.name in NESTED else images, return_tensors="np")
    return family.images(seen, family.settings(model))


class VisionGraph(nn.Module):
    """One run of a family's vision encoder and connector: its inputs, by name -> visual tokens (N, D)."""

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        self.core, self.family, self.replaced = model.model, family, replaced(model, family)

    def forward(self, **inputs: Tensor) -> Tensor:
        with own_forwards(self.replaced):
            return self.family.encode(self.core, **inputs)


def replaced(model: nn.Module, family: Family) -> dict[type, Callable[..., object]]:
    """Classes of `model`'s modules with the `forwards` of its family; asked before tracing, which gives modules other classes."""
    return {type(m): family.forwards[type(m).__name__] for m in model.modules() if type(m).__name__ in family.forwards}


def own_forwards(forwards: dict[type, Callable[..., object]]) -> contextlib.AbstractContextManager[None]:
    """Modules of these classes compute by these forwards, meanwhile."""
    return patch_attributes([(kind, "forward", lambda _, forward=forward: forward) for kind, forward in forwards.items()])


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


def language_wrapper(model: nn.Module, batches: bool = False) -> tuple[nn.Module, dict[str, object], dict[str, object]]:
    """The module that computes the next token's logits, an example of what it takes, and which of its axes are free.
    With `batches`, of several rows, and it takes their attention_mask (B, S) and position_ids besides."""
    config, module = model.config.get_text_config(), LanguageWithCache(model).eval()
    rows, piece = 2 if batches else 1, module.family.piece
    # a full one, in sliding layers, too: the mask hides what is too far
    cache = DynamicCache(config=config) if piece else DynamicCache()
    with torch.no_grad():  # a cache as the decoder itself makes it
        embeds = module.embed_tokens(torch.zeros(rows, 5, dtype=torch.int64))
        module.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    dim = torch.export.Dim
    first, tokens = {0: dim("batch", min=1)} if batches else {}, dim("tokens", min=1, max=piece or None)
    example = {"input_ids": torch.full((rows, 3), module.image_token_id)}
    example |= {"image_features": torch.randn(4, config.hidden_size * (1 + module.deepstack)), "past_key_values": cache}
    axes = {"input_ids": first | {1: tokens}, "image_features": {0: dim("features", min=1)}}
    grows = {2: dim.DYNAMIC if batches else dim("cache_length", min=0)}
    axes["past_key_values"] = [first | (grows if hasattr(layer, "keys") else {}) for layer in cache.layers for _ in range(2)]
    if batches:
        example["attention_mask"], axes["attention_mask"] = torch.ones(rows, 8, dtype=torch.int64), first | {1: dim.DYNAMIC}
    if module.family.positions:
        example["position_ids"] = torch.arange(5, 8).expand(3, rows, -1).contiguous()
        axes["position_ids"] = {axis + 1: d for axis, d in first.items()} | {2: tokens}
    elif batches:
        example["position_ids"], axes["position_ids"] = torch.arange(5, 8).expand(rows, -1).contiguous(), first | {1: tokens}
    return module, example, axes


class LanguageWithCache(nn.Module):
    """input_ids (1, T), image_features (N, D), a cache -> {"logits": (1, 1, V) of the next token, "past_key_values": the cache}.
    The same graph reads a prompt and computes each further token. Without images N is 1 and its row is not read.
    With M-RoPE it also takes position_ids (3, 1, T); with DeepStack the features of further layers lie beside the first D.
    Of a batch, whose rows are padded on the left, it takes attention_mask (B, S), 1 for real tokens, and position_ids (B, T);
    ONNX Runtime's graph takes each row's length instead, where its attention allows it (`export.onnx.backend`).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        parts = modules.parts(model)
        self.decoder, self.head, self.family = parts["language"], parts["head"], family_of(model)
        self.replaced = replaced(self.decoder, self.family)
        self.embed_tokens, self.image_token_id = model.get_input_embeddings(), model.config.image_token_id
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.deepstack = len(getattr(parts["vision"], "deepstack_visual_indexes", None) or ())

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        past_key_values: object,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, object]:
        is_image = input_ids == self.image_token_id
        row = (is_image.long().cumsum(1) - 1).clamp(min=0)
        inside = self.image_token_id < self.embed_tokens.weight.shape[0]  # Gemma's placeholder may lie outside the vocabulary
        words = self.embed_tokens(input_ids if inside else torch.where(is_image, 0, input_ids))
        first, deeper = image_features[row], ()
        if self.deepstack:
            first, *deeper = first.split(words.shape[-1], dim=-1)
        embeds = torch.where(is_image.unsqueeze(-1), first, words)
        given = {"inputs_embeds": embeds, "past_key_values": past_key_values, "use_cache": True, "position_ids": position_ids}
        given["attention_mask"] = attention_mask
        if self.family.piece and attention_mask is not None:  # prompts are read one by one: no layer with states sees padding
            causal = create_causal_mask(self.decoder.config, embeds, attention_mask, past_key_values)
            given["attention_mask"] = {"full_attention": causal, "linear_attention": None}
        if self.family.masks:
            given |= self.family.masks(self.decoder.config, is_image, past_key_values.get_seq_length(), attention_mask)
        with contextlib.ExitStack() as stack:
            if deeper:  # zero where there is no image, so that they are added everywhere
                given["visual_pos_masks"] = is_image
                given["deepstack_visual_embeds"] = [torch.where(is_image.unsqueeze(-1), each, 0.0) for each in deeper]
                stack.enter_context(patch_attribute(self.decoder, "_deepstack_process", lambda _: lambda x, _, more: x + more))
            stack.enter_context(own_forwards(self.replaced))
            out = self.decoder(**given)
        logits = self.head(out.last_hidden_state[:, -1:])
        if self.softcap:
            logits = (logits / self.softcap).tanh() * self.softcap
        return {"logits": logits, "past_key_values": out.past_key_values}


def windows(config: object) -> bool:
    """Whether some layer of a decoder of this config sees only the last tokens.
    >>> windows(model.config.get_text_config())
    False
    """
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))


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
