"""The one place that writes ONNX files: graphs, dynamic and static int8, n-bit weights, TensorRT's rules."""

from mmrecipes.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "attached": "attach export_parts tensor_session",
        "backend": "OUTLIER_LAYERS int8_channels nbits replace_nodes write_onnx",
        "graphs": "MAX_BYTES module_scopes nodes_of_modules save_onnx strip_metadata to_onnx",
        "quantize": "LAYERS StaticConfig dynamic_int8 prepared static_int8 vision_to_onnx",
        "tensorrt": "check_explicit_int8 check_static",
    },
)
