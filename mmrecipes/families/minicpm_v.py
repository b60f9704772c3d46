"""MiniCPM-V 4.6: an image and its slices, each of a shape of its own; the vision encoder merges patches between two layers.

Attention does not ask in which order tokens come, so an image's patches are laid in nested blocks of 2 x 2: each merge, in the
encoder and behind it, then joins four neighbours.
"""

import numpy as np

from mmrecipes.families import gated_delta
from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image's or slice's patches (P, 3, side, side), cut from a strip (1, 3, side, side * all), and their positions (P,)."""
    strip, start, found = np.asarray(inputs["pixel_values"], np.float32)[0], 0, []
    side = strip.shape[1]
    for rows, columns in np.asarray(inputs["target_sizes"]).tolist():
        patches = strip[:, :, start * side : (start + rows * columns) * side].reshape(-1, side, rows * columns, side)
        row, column = nested(rows, columns, settings["merges"]).T
        order = row * columns + column
        at = nearest(rows, settings["side"])[row] * settings["side"] + nearest(columns, settings["side"])[column]
        found.append({"pixel_values": np.ascontiguousarray(patches.transpose(2, 0, 1, 3)[order]), "position_ids": at})
        start += rows * columns
    return found


def nested(rows: int, columns: int, merges: int) -> np.ndarray:
    """Row and column of each patch, (P, 2): four neighbours, then four blocks of four, and so on, `merges` times."""
    places = np.stack(np.mgrid[: rows >> merges, : columns >> merges], axis=-1).reshape(-1, 2)
    for _ in range(merges):
        places = (2 * places[:, None] + np.array([(0, 0), (0, 1), (1, 0), (1, 1)])).reshape(-1, 2)
    return places


def nearest(count: int, side: int) -> np.ndarray:
    """Which of `side` learned positions each of `count` patches in a row takes; in float32, as the source rounds."""
    borders = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    return np.searchsorted(borders, np.arange(count, dtype=np.float32) / np.float32(count), side="right")


def settings(model) -> dict:
    inside = model.config.downsample_mode != "4x"  # in the encoder, too
    return {"merges": model.config.merger_times + inside, "side": model.model.vision_tower.embeddings.num_patches_per_side}


def encode(core, pixel_values, position_ids):
    """One image or slice, its patches in nested blocks."""
    tower = core.vision_tower
    embeddings, inside = tower.embeddings, core.config.downsample_mode != "4x"
    hidden = embeddings.patch_embedding(pixel_values).flatten(1) + embeddings.position_embedding(position_ids)
    for i, layer in enumerate(tower.encoder.layers):
        hidden = layer(hidden[None], attention_mask=None)[0]
        if inside and i == tower.config.insert_layer_id:
            hidden = _merged(tower.vit_merger, hidden.unflatten(0, (-1, 4)))
    hidden = tower.post_layernorm(hidden)
    for mlp in core.merger.mlp:
        hidden = mlp(hidden.reshape(-1, 4 * hidden.shape[-1]))
    return hidden


def _merged(merger, blocks):
    """Blocks (N, 4, width), whose patches attend to each other, as one token each: (N, width)."""
    blocks = blocks + merger.self_attn(merger.layer_norm1(blocks))[0]
    return merger.linear_2(merger.act(merger.linear_1(merger.pre_norm(blocks.flatten(1))))) + blocks.mean(1)


def attend(module, hidden_states, **_):
    """The forward of the encoder's attention, (B, P, width), for rows that are one image or one block each."""
    import torch

    query, key, value = (
        project(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=module.scaling)
    return module.out_proj(out.transpose(1, 2).flatten(2)), None


FAMILY = Family(
    "minicpmv4_6",
    ("MiniCPMV4_6ForConditionalGeneration",),
    encode,
    images,
    settings=settings,
    free={"pixel_values": (0,), "position_ids": (0,)},
    forwards=gated_delta.FORWARDS | {"MiniCPMV4_6VisionAttention": attend},
    piece=gated_delta.CHUNK,
)
