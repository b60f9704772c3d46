"""A model as files for ONNX Runtime, OpenVINO, ExecuTorch or vLLM, checked against its source. Chapter 5 (notebooks 44, 50)."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"pipeline": "BACKENDS PARTS TOLERANCE export parity supported write_manifest written", "wrappers": "", "onnx": ""},
)
