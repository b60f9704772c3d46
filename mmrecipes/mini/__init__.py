"""The models of the book (`mini-vlm`, `mini-siglip`, `mini-cnn`, `mini-resampler`): classes, data and training (notebook 02)."""

from mmrecipes.lazy import lazy_exports

FILES = ("batches", "clevr", "cnn", "curriculum", "fast_resampler", "labels", "losses", "model", "resampler", "siglip", "vlm")

__getattr__, __dir__, __all__ = lazy_exports(__name__, dict.fromkeys(FILES, ""))
