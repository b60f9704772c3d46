"""`export.export` for ONNX Runtime: vision.onnx and language.onnx, in fp32, int8 or with weights of 4 bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.export.onnx import graphs, nbits, quantize

# the last layer of a decoder's MLP, by its usual names: a few of its inputs are far larger than the rest (notebook 11), too far
# for one scale a tensor
OUTLIER_LAYERS = ("down_proj", "fc2", "w2")


def write_onnx(model: nn.Module, folder: Path, precisions: Mapping[str, str], pixels: Sequence[np.ndarray]) -> None:
    """Write both graphs to `folder`, each in its precision; "static" looks at `pixels` (1, 3, H, W). Raises as `export`."""
    require("onnx", "onnxscript", "onnxruntime")
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    encoder, image = wrappers.vision_wrapper(model)
    vision = graphs.to_onnx(encoder, {"pixel_values": image}, folder / "vision.onnx", {})
    language, (decoder, example, axes) = folder / "language.onnx", wrappers.language_wrapper(model)
    with quiet.library_logs():
        # for the CPU: attention with its cache and rotary embedding in one node (GroupQueryAttention), norms with their sums,
        # and products of one input together
        config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu", prefer_deferred_runtime_asserts_over_guards=True)
        onnx_ir.save(OnnxExporter().export(decoder, example, config).program, str(language), external_data="language.onnx.data")
    for path in (vision, language):
        precision = precisions[path.stem]
        if precision in ("int4", "mixed"):
            nbits.to_nbits(path, path, 4, rounded=precision == "mixed")
        if precision in ("int8", "mixed"):
            if path.stem == "language":  # one scale for all inputs is too coarse for OUTLIER_LAYERS; embeddings and the head
                scopes = graphs.module_scopes(path)
                coarse = {name for name, scope in scopes.items() if any(layer in scope for layer in OUTLIER_LAYERS)}
                nbits.to_nbits(path, path, 8, only=lambda node, names=coarse: node.op_type != "MatMul" or node.name in names)
            nbits.to_dynamic_int8(path, path)
        if precision == "static":  # of a ViT, whose one convolution cuts the patches, the matrix products
            cnn = sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) > 1
            config = quantize.StaticConfig(layers="all") if cnn else quantize.StaticConfig(reduce_range=True)
            quantize.static_int8(path, [torch.from_numpy(each) for each in pixels], path, config)
        graphs.strip_metadata(path)
