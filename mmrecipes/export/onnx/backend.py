"""`export.export` for ONNX Runtime: vision.onnx and language.onnx, in fp32, int8 or with weights of 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.export.onnx import graphs, nbits, quantize

if TYPE_CHECKING:
    import onnx

# the last layer of a decoder's MLP, by its usual names: a few of its inputs are far larger than the rest (notebook 11), too far
# for one scale a tensor
OUTLIER_LAYERS = ("down_proj", "fc2", "w2")


def write_onnx(model: nn.Module, folder: Path, widths: Mapping[str, str], pixels: Sequence[np.ndarray]) -> None:
    """Write both graphs to `folder`, each in its precision; "static" looks at `pixels` (1, 3, H, W). Raises as `export`."""
    require("onnx", "onnxscript", "onnxruntime")
    tower, picture = wrappers.vision_wrapper(model)
    vision = graphs.to_onnx(tower, {"pixel_values": picture}, folder / "vision.onnx", {})
    language = _language(model, folder / "language.onnx")
    for part, path in (("vision", vision), ("language", language)):
        if widths[part] in ("int4", "mixed"):
            nbits.to_nbits(path, path, 4, rounded=widths[part] == "mixed")
        if widths[part] in ("int8", "mixed"):
            if part == "language":
                nbits.to_nbits(path, path, 8, only=_coarse(path))
            nbits.to_dynamic_int8(path, path)
        if widths[part] == "static" and sum(isinstance(m, nn.Conv2d) for m in tower.modules()) > 1:
            quantize.qdq(path, torch.from_numpy(np.concatenate(pixels)), path, explicit=False, batch=1)
        elif widths[part] == "static":  # of a ViT, whose one convolution cuts the patches, the matrix products
            quantize.static_int8(path, [{"pixel_values": each} for each in pixels], path)
        graphs.strip_metadata(path)


def _coarse(path: Path) -> Callable[[onnx.NodeProto], bool]:
    """Of a node, whether one scale for all its inputs is too coarse (LAST), or it is no plain product: words, and the head."""
    scopes = graphs.module_scopes(path)
    return lambda node: node.op_type != "MatMul" or any(name in scopes.get(node.name, "") for name in OUTLIER_LAYERS)


def _language(model: nn.Module, path: Path) -> Path:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    module, example, axes = wrappers.language_wrapper(model)
    with quiet.library_logs():
        # for the CPU: attention with its cache and rotary embedding in one node (GroupQueryAttention), norms with their sums,
        # and products of one input together
        config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu", prefer_deferred_runtime_asserts_over_guards=True)
        program = OnnxExporter().export(module, example, config).program
        import onnx_ir

        onnx_ir.save(program, str(path), external_data=path.name + ".data")
    return path
