"""Idefics2: whole images of any shape, whose learned positions are picked by each patch's share of height and width, and a
perceiver resampler that makes 64 tokens of them."""

import numpy as np

from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image (1, 3, H, W) without padding, and which learned position each of its patches has."""
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    real = np.asarray(inputs.get("pixel_attention_mask", np.ones_like(pixels[:, 0])), bool).reshape(
        len(pixels), *pixels.shape[-2:]
    )
    found, patch, side = [], settings["patch"], settings["side"]
    for image, mask in zip(pixels, real, strict=True):
        rows, columns = mask[:, 0].sum() // patch, mask[0].sum() // patch
        if rows * columns:
            at = positions(rows, side)[:, None] * side + positions(columns, side)[None, :]
            found.append({"pixel_values": image[None, :, : rows * patch, : columns * patch], "position_ids": at.reshape(1, -1)})
    return found


def positions(count: int, side: int) -> np.ndarray:
    """Which of `side` positions each of `count` patches in a row has: that of its share of the whole."""
    share = np.arange(count, dtype=np.float32) * np.float32(1.0 / np.float32(count))
    borders = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    return np.searchsorted(borders, np.minimum(share, np.float32(1.0 - 1e-6)), side="right").astype(np.int64)


def encode(core, pixel_values, position_ids):
    vision = core.vision_model
    patches = vision.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    hidden = vision.encoder(inputs_embeds=patches + vision.embeddings.position_embedding(position_ids), attention_mask=None)
    hidden = vision.post_layernorm(hidden.last_hidden_state)
    resampler, context = core.connector.perceiver_resampler, core.connector.modality_projection(hidden)
    latents = resampler.latents[None]
    # no patch is padding, and nothing is masked; but without a mask heads would share keys in a way that not all exporters know
    mask = context.new_zeros(1, 1, latents.shape[1], context.shape[1] + latents.shape[1])
    for layer in resampler.layers:
        latents = layer(latents, context, attention_mask=mask, position_ids=None)
    return resampler.norm(latents)[0]


def settings(model) -> dict:
    embeddings = model.model.vision_model.embeddings
    return {"patch": embeddings.patch_size, "side": embeddings.num_patches_per_side}


FAMILY = Family(
    "idefics2",
    ("Idefics2ForConditionalGeneration",),
    encode,
    images,
    settings=settings,
    free={"pixel_values": (2, 3), "position_ids": (1,)},
)
