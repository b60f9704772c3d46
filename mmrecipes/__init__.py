"""mmrecipes: recipes that make multimodal models small and fast, measured in front of you.

`mmr.load`, `mmr.ask` and `mmr.compare` are what a notebook starts with; the rooms (`mmr.scenes`, `mmr.quantize`, ...) hold the
rest. Everything is imported when first used, so that `import mmrecipes` takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_ROOMS = (
    *("data", "errors", "evaluate", "house", "lessons", "losses", "measure", "models", "muon"),
    *("prune", "quantize", "report", "scenes", "train"),
)
_SHORT = {"load": "models", "ask": "models", "compare": "report"}
__all__ = [*_ROOMS, *_SHORT]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mmrecipes.{name}")
    if name in _SHORT:
        return getattr(importlib.import_module(f"mmrecipes.{_SHORT[name]}"), name)
    raise AttributeError(f"module 'mmrecipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
