"""LLaVA-NeXT and LLaVA-OneVision: a small view of the whole image, then tiles laid out as the image, padding taken off, a
learned token at the end of each row."""

import math

import numpy as np

from mmrecipes.families.family import Family, Inputs, Settings, hidden_states


def images(inputs: Inputs, settings: Settings) -> list[dict[str, np.ndarray]]:
    """The whole image, then its tiles, (1, 3, side, side) each; what the processor padded with is left out."""
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    counts = tile_counts(inputs, settings)
    return [{"pixel_values": tile[None]} for image, n in zip(pixels, counts, strict=True) for tile in image[:n]]


def tile_counts(inputs: Inputs, settings: Settings) -> list[int]:
    """Tiles of each image, the small view included. LLaVA-OneVision tiles an image only where it is the only one."""
    sizes = np.asarray(inputs["image_sizes"])
    if settings["alone"] and len(sizes) > 1:
        return [1] * len(sizes)
    return [1 + math.prod(_grid(size, settings)) for size in sizes]


def _grid(size: np.ndarray, settings: Settings) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(tuple(int(n) for n in size), [tuple(p) for p in settings["pinpoints"]])
    return height // settings["tile"], width // settings["tile"]


def encode(core, pixel_values):
    return core.multi_modal_projector(hidden_states(core, pixel_values))[0]


def merge(tokens: list[np.ndarray], inputs: Inputs, settings: Settings) -> np.ndarray:
    """Rows in the order of the placeholders: for each image its small view, then the tiles' tokens row by row."""
    newline, rows, start = np.asarray(settings["newline"], np.float32)[None], [], 0
    for size, count in zip(np.asarray(inputs["image_sizes"]), tile_counts(inputs, settings), strict=True):
        whole, tiles = tokens[start], tokens[start + 1 : start + count]
        start += count
        rows.append(whole)
        if not tiles:
            rows.append(newline)
            continue
        side, (down, across) = settings["side"], _grid(size, settings)
        laid = np.stack(tiles).reshape(down, across, side, side, -1).swapaxes(1, 2).reshape(down * side, across * side, -1)
        laid = fewer(without_padding(laid, size), settings)
        ends = np.broadcast_to(newline, (len(laid), 1, newline.shape[1]))
        rows.append(np.concatenate([laid, ends], axis=1).reshape(-1, newline.shape[1]))
    return np.concatenate(rows)


def without_padding(laid: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Tokens (rows, columns, D) of an image of `size` (height, width) that was scaled into them and padded on two sides."""
    (height, width), (rows, columns) = (int(n) for n in size), laid.shape[:2]
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return laid[pad : rows - pad]
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return laid[:, pad : columns - pad]


def fewer(laid: np.ndarray, settings: Settings) -> np.ndarray:
    """Tokens (rows, columns, D), scaled down bilinearly where they are more than `most` tiles' worth (LLaVA-OneVision)."""
    rows, columns = laid.shape[:2]
    ratio = math.sqrt(rows * columns / (settings["most"] * settings["side"] ** 2)) if settings["most"] else 0
    if ratio <= 1.1:
        return laid
    for axis, (before, after) in enumerate(((rows, int(rows // ratio)), (columns, int(columns // ratio)))):
        at = np.maximum((np.arange(after, dtype=np.float32) + 0.5) * np.float32(before / after) - 0.5, 0)  # pixels' centres
        low = np.floor(at).astype(int)
        share = (at - low).reshape(-1, *[1] * (2 - axis))
        laid = np.take(laid, low, axis) * (1 - share) + np.take(laid, (low + 1).clip(max=before - 1), axis) * share
    return laid.astype(np.float32)


def settings(model) -> dict:
    config, vision = model.config, model.config.vision_config
    most = getattr(config, "vision_aspect_ratio", "")  # "anyres_max_9"
    return {
        "pinpoints": [list(p) for p in config.image_grid_pinpoints],
        "tile": vision.image_size,
        "side": vision.image_size // vision.patch_size,  # tokens of a tile
        "most": int(most.removeprefix("anyres_max_")) if most else 0,
        "alone": "Onevision" in type(model).__name__,
        "newline": model.model.image_newline.tolist(),
    }


FAMILIES = tuple(
    Family(name, (model,), encode, images, merge, settings)
    for name, model in (
        ("llava_next", "LlavaNextForConditionalGeneration"),
        ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    )
)
