"""Exported models answer: no PyTorch, no modeling code. Chapter 5 (notebook 50)."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "batching": "Answer Engine Sampling",
        "backends": "onnx_session",
        "chat": "Chat",
        "dual": "ExportedDual",
        "exported": "MANIFEST Exported load_exported",
        "genai": "load_genai",
        "paged": "PagePool",
        "reuse": "FeatureCache",
    },
)
