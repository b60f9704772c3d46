"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5: patches of images of any shape, M-RoPE, window attention, DeepStack.

An image arrives as patches (P, width), ordered in blocks of merge x merge, and with its grid (1, rows, columns).
"""

import math

import numpy as np

from mmrecipes.families import gated_delta
from mmrecipes.families.family import Family, Inputs, Settings


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """Each image's patches, their places, and what the encoder needs to know of its grid."""
    pixels, found = np.asarray(inputs["pixel_values"], np.float32), []
    starts = np.cumsum([0, *(math.prod(grid) for grid in _grids(inputs))])
    for start, (_, rows, columns) in zip(starts[:-1], _grids(inputs), strict=True):
        patches = pixels[start : start + rows * columns]
        run = {"pixel_values": patches, "position_ids": in_blocks(rows, columns, settings["merge"])}
        if settings["window"]:
            run |= dict(zip(("window_index", "windows"), windows(rows, columns, settings), strict=True))
        if settings["side"]:
            run |= dict(
                zip(("interp_indices", "interp_weights"), interpolation(run["position_ids"], settings["side"]), strict=True)
            )
        found.append(run)
    return found


def _grids(inputs: Inputs) -> list[tuple[int, int, int]]:
    return [tuple(int(n) for n in grid) for grid in np.asarray(inputs["image_grid_thw"])]


def in_blocks(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch, (P, 2), block by block: merge x merge patches become one visual token."""
    places = np.stack(np.mgrid[:rows, :columns], axis=-1)
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2).swapaxes(1, 2)
    return blocks.reshape(-1, 2).astype(np.int64)


def windows(rows: int, columns: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Window attention of Qwen2.5-VL: the order of blocks, window by window, and the window of each patch in that order."""
    merge, side = settings["merge"], settings["window"]
    row, column = np.mgrid[: rows // merge, : columns // merge].reshape(2, -1) // side
    window = row * (columns // merge // side + 1) + column
    order = np.argsort(window, kind="stable")
    return order.astype(np.int64), np.repeat(window[order], merge**2).astype(np.int64)


def interpolation(places: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Learned positions of Qwen3-VL, side x side, resampled bilinearly (corners aligned) to the places (P, 2) of an image's
    patches: which four of them (P, 4), with which weights (P, 4)."""
    last = places.max(axis=0).clip(1).astype(np.float32)
    at = places.astype(np.float32) * (side - 1) / last
    low = np.floor(at).astype(np.int64)
    high, share = (low + 1).clip(max=side - 1), at - low
    row, column = (np.stack([low[:, i], high[:, i]], axis=1) for i in (0, 1))
    weight_row, weight_column = (np.stack([1 - share[:, i], share[:, i]], axis=1) for i in (0, 1))
    indices = row[:, :, None] * side + column[:, None, :]
    weights = weight_row[:, :, None] * weight_column[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


def positions(inputs: Inputs, settings: Settings) -> np.ndarray:
    """M-RoPE: (time, row, column) of each token, (3, 1, T). Text counts on in all three; an image stands still in time, its
    tokens have their row and column, and the text after it goes on behind the larger side."""
    ids, merge = np.asarray(inputs["input_ids"])[0], settings["merge"]
    grids, found, start, at = iter(_grids(inputs) if "image_grid_thw" in inputs else ()), [], 0, 0
    while at < len(ids):
        if ids[at] != settings["image_token_id"]:
            found.append(np.full((3, 1), start))
            start, at = start + 1, at + 1
            continue
        _, rows, columns = next(grids)
        row, column = np.mgrid[: rows // merge, : columns // merge].reshape(2, -1)
        found.append(np.stack([0 * row, row, column]) + start)
        start, at = start + max(rows, columns) // merge, at + len(row)
    return np.concatenate(found, axis=1)[:, None].astype(np.int64)


def settings(model) -> dict:
    vision, encoder = model.config.vision_config, model.model.visual
    window = getattr(vision, "window_size", None)
    return {
        "merge": vision.spatial_merge_size,
        "window": window // vision.spatial_merge_size // vision.patch_size if window else 0,  # of merged patches a side
        "side": getattr(encoder, "num_grid_per_side", 0),
        "image_token_id": model.config.image_token_id,
    }


def encode(core, pixel_values, position_ids, windows=None, **given):
    """One image: full attention has no boundaries, windows have those in `windows`; `attention` reads both."""
    import torch

    everywhere = pixel_values.new_zeros(1)
    given |= {"cu_seqlens": everywhere, "position_ids": position_ids}
    given |= {} if windows is None else {"cu_window_seqlens": torch.where(windows[:, None] == windows, 0.0, -1e30)}
    out = core.visual(pixel_values, grid_thw=None, return_dict=True, **given)
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or ())], dim=-1)


def attend_in_windows(module, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """The forward of the encoder's attention for one image: `cu_seqlens` is a mask (P, P) to add, or (1,) for none."""
    import sys

    import torch

    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
    length = hidden_states.shape[0]
    query, key, value = module.qkv(hidden_states).reshape(length, 3, module.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    mask = None if cu_seqlens.ndim == 1 else cu_seqlens[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=module.scaling)
    return module.proj(out[0].transpose(0, 1).reshape(length, -1))


_PATCHES = {"pixel_values": (0,), "position_ids": (0,)}
_WINDOWS, _GRID = {"window_index": (0,), "windows": (0,)}, {"interp_indices": (0,), "interp_weights": (0,)}


def _family(name: str, model: str, attention: str, free: dict, hybrid: bool = False) -> Family:
    options = {"settings": settings, "free": _PATCHES | free, "positions": positions, "forwards": {attention: attend_in_windows}}
    if hybrid:
        options |= {"forwards": options["forwards"] | gated_delta.FORWARDS, "piece": gated_delta.CHUNK}
    return Family(name, (model,), encode, images, **options)


FAMILIES = (
    _family("qwen2_vl", "Qwen2VLForConditionalGeneration", "VisionAttention", {}),
    _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLVisionAttention", _WINDOWS),
    _family("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VLVisionAttention", _GRID),
    _family("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3_5VisionAttention", _GRID, hybrid=True),
)
