"""mmrecipes: recipes that make multimodal models small and fast, measured in front of you.

`mmr.load`, `mmr.ask` and `mmr.compare` are what a notebook starts with; the rooms (`mmr.scenes`, `mmr.quantize`, ...) hold the
rest. Everything is imported when first used, so that `import mmrecipes` takes no time.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.1.0"
_ROOMS = (
    *("calibrated", "cnn", "data", "distill", "doctor", "dual", "efficientformer", "errors", "evaluate", "export"),
    *("exported", "fit", "fresh", "house", "importance", "lessons", "lora", "losses", "measure", "merging", "models", "muon"),
    *("packed", "plan", "prune", "quantize", "recovery", "report", "retrieval", "runtime", "scenes", "shrink"),
    *("shufflenet", "siglip", "slicing", "static_int8", "structured", "swap", "swapped", "tokens", "train"),
)
_SHORT = {"load": "models", "ask": "models", "compare": "report", "load_exported": "exported"}
__all__ = [*_ROOMS, *_SHORT]

# torchao, which transformers imports, warns of every CUDA library that a machine lacks: noise wherever the job is a CPU's
for _name in ("torchao", "torch.utils._pytree"):
    if not logging.getLogger(_name).level:
        logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mmrecipes.{name}")
    if name in _SHORT:
        return getattr(importlib.import_module(f"mmrecipes.{_SHORT[name]}"), name)
    raise AttributeError(f"module 'mmrecipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
