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


def gemma3_masks(config, is_image, cache_length, real):
    """Tokens of one image see each other, in sliding layers, too; else tokens look back, there `sliding_window` far."""
    import torch

    at, keys = _places(is_image, cache_length)
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    image = torch.where(is_image, starts.long().cumsum(1), 0)  # (B, T), 0: text; else the number of the image
    of_key = torch.nn.functional.pad(image, (cache_length, 0))  # images come with the prompt: what is cached is past
    together = (image[:, :, None] == of_key[:, None, :]) & (image[:, :, None] > 0)
    full, near = (keys <= at) | together, ((keys <= at) & (at - keys < config.sliding_window)) | together
    return {"attention_mask": {"full_attention": _additive(full, real), "sliding_attention": _additive(near, real)}}


def paligemma_masks(config, is_image, cache_length, real):
    """The whole prompt, image and text, sees itself; what is generated looks back."""
    at, keys = _places(is_image, cache_length)
    prompt = keys.new_zeros(()) + cache_length == 0
    return {"attention_mask": _additive(((keys <= at) | prompt)[None], real)}


def _places(is_image, cache_length):
    """Where the new tokens are, (T, 1), and all that they may see, (1, S)."""
    import torch

    length = is_image.shape[1]
    return (cache_length + torch.arange(length))[:, None], torch.arange(cache_length + length)[None, :]


def _additive(seen, real):
    """A mask (B, T, S) of what is seen, and is no padding, `real` (B, S), as (B, 1, T, S) to be added to the scores."""
    import torch

    seen = seen if real is None else seen & (real[:, None, :] > 0)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


FAMILIES = (
    Family("tiles", ("LlavaForConditionalGeneration", "InternVLForConditionalGeneration"), encode, images),
    Family("idefics3", ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), None, images),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), encode, images, masks=gemma3_masks),
    Family("paligemma", ("PaliGemmaForConditionalGeneration",), encode, images, masks=paligemma_masks, two_way=True),
)
