"""Pixtral (as LLaVA's encoder) and Mistral 3: whole images of any shape, rotary positions in two directions, merged patches."""

import numpy as np

from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image (1, 3, H, W) without the padding that brings those of one conversation to one size."""
    pixels, sizes = np.asarray(inputs["pixel_values"], np.float32), np.asarray(inputs["image_sizes"])
    return [{"pixel_values": image[None, :, :height, :width]} for image, (height, width) in zip(pixels, sizes, strict=True)]


def encode(core, pixel_values):
    import torch

    encoder, config = core.vision_tower, core.config
    patches = encoder.patch_conv(pixel_values)
    rows, columns = patches.shape[-2:]
    hidden = encoder.ln_pre(patches.flatten(2).transpose(1, 2))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    rotary = encoder.patch_positional_embedding(hidden, places)
    for layer in encoder.transformer.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    if config.model_type != "mistral3":
        return core.multi_modal_projector(hidden)[0]
    side, projector = config.spatial_merge_size, core.multi_modal_projector
    hidden = projector.norm(hidden[0])
    # as unfold orders them: each feature's side x side patches beside each other
    blocks = hidden.reshape(rows // side, side, columns // side, side, -1).permute(0, 2, 4, 1, 3)
    merged = projector.patch_merger.merging_layer(blocks.reshape((rows // side) * (columns // side), -1))
    return projector.linear_2(projector.act(projector.linear_1(merged)))


_FREE = {"pixel_values": (2, 3)}
FAMILIES = (
    Family("pixtral", (), encode, images, free=_FREE),  # of LLaVA's class: `export.wrappers` tells it by its encoder
    Family("mistral3", ("Mistral3ForConditionalGeneration",), encode, images, free=_FREE),
)
