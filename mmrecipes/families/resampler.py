"""`mini-resampler`, of MiniCPM-V's and Megrez's shape: images of any size, and a resampler that makes 64 tokens of each.

Where each patch lies is computed outside the graph, once for each shape: which learned position the encoder adds, and the
sine-cosine vector that the resampler's keys get.
"""

import numpy as np

from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image (1, 3, H, W) without padding, which learned position each of its patches has, and its place as a vector."""
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    real = np.asarray(inputs.get("pixel_attention_mask", np.ones_like(pixels[:, 0])), bool).reshape(-1, *pixels.shape[-2:])
    found, patch, side = [], settings["patch"], settings["side"]
    for image, mask in zip(pixels, real, strict=True):
        rows, columns = (int(mask[cut].sum()) // patch for cut in ((slice(None), 0), 0))
        if rows * columns and image.any():
            x, y = ((np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(n) for n in (columns, rows))
            at = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).reshape(-1, 2)
            column, row = np.minimum((at * side).astype(np.int64), side - 1).T
            own = {"pixel_values": image[None, :, : rows * patch, : columns * patch], "position_ids": (row * side + column)[None]}
            found.append(own | {"key_positions": sincos(at, settings["width"])[None]})
    return found


def sincos(at: np.ndarray, width: int) -> np.ndarray:
    """Places (P, 2) as vectors (P, width), as `modeling_mini_resampler.sincos` does it."""
    frequency = 16 / np.float32(10) ** (np.arange(width // 4, dtype=np.float32) / np.float32(width // 4))
    angle = at[:, None, :] * frequency[:, None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(at), width).astype(np.float32)


def encode(core, pixel_values, position_ids, key_positions):
    vision, resampler = core.vision_model, core.resampler
    patches = vision.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    hidden = vision.encoder(patches + vision.position_embedding(position_ids), attention_mask=None).last_hidden_state
    values = resampler.ln_kv(resampler.kv_proj(vision.post_layernorm(hidden)))
    found = resampler.attn(resampler.ln_q(resampler.query)[None], values + key_positions, values, need_weights=False)[0]
    return (resampler.ln_post(found) @ resampler.proj)[0]


def settings(model) -> dict:
    vision = model.model.vision_model
    return {"patch": vision.patch_size, "side": vision.side, "width": model.model.resampler.query.shape[1]}


FAMILY = Family(
    "mini_resampler",
    ("MiniResamplerForConditionalGeneration",),
    encode,
    images,
    settings=settings,
    free={"pixel_values": (2, 3), "position_ids": (1,), "key_positions": (1,)},
)
