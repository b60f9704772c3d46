"""Images of one size, or tiles of one size: Idefics3, SmolVLM, LLaVA-1.5, InternVL, Gemma 3, PaliGemma."""

import numpy as np

from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image or tile (1, 3, H, W), whatever axes the processor groups them by."""
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    return [{"pixel_values": tile[None]} for tile in pixels.reshape(-1, *pixels.shape[-3:])]


def encode(core, pixel_values):
    features = core.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
    return features[0] if isinstance(features, list | tuple) else features.flatten(0, -2)


def gemma3_masks(config, is_image, cache_length):
    """Tokens of one image see each other, in sliding layers, too; else tokens look back, there `sliding_window` far."""
    import torch

    new = torch.arange(is_image.shape[1])
    at, keys = (cache_length + new)[:, None], torch.arange(cache_length + is_image.shape[1])[None, :]
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    image = torch.where(is_image, starts.long().cumsum(1), 0)[0]  # 0: text; else the number of the image
    of_key = torch.nn.functional.pad(image, (cache_length, 0))  # images come with the prompt: what is cached is past
    together = (image[:, None] == of_key[None, :]) & (image[:, None] > 0)
    causal = keys <= at
    full, near = causal | together, (causal & (at - keys < config.sliding_window)) | together
    return {"attention_mask": {"full_attention": additive(full), "sliding_attention": additive(near)}}


def paligemma_masks(config, is_image, cache_length):
    """The whole prompt, image and text, sees itself; what is generated looks back."""
    import torch

    new = torch.arange(is_image.shape[1])
    at, keys = (cache_length + new)[:, None], torch.arange(cache_length + is_image.shape[1])[None, :]
    prompt = keys.new_zeros(()) + cache_length == 0
    return {"attention_mask": additive((keys <= at) | prompt)}


def additive(seen):
    """A mask (T, S) of what is seen as (1, 1, T, S) to be added to the scores."""
    import torch

    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


FAMILIES = (
    Family("tiles", ("LlavaForConditionalGeneration", "InternVLForConditionalGeneration"), encode, images),
    Family("idefics3", ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), None, images),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), encode, images, masks=gemma3_masks),
    Family("paligemma", ("PaliGemmaForConditionalGeneration",), encode, images, masks=paligemma_masks),
)
