"""Exported models answer: no PyTorch, no modeling code. Chapter 5 (notebook 50)."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "backends": "ExecutorchGraphs OnnxGraphs OpenVinoGraphs",
        "exported": "Exported FORMAT MANIFEST PACKAGES load_exported read_manifest sha256",
        "session": "onnx_session session_options vision_session",
    },
)
