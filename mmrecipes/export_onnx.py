"""`export.export` for ONNX Runtime: vision.onnx and language.onnx, in fp32, int8 or with weights of 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from mmrecipes import export, packed, runtime

# the last layer of a decoder's MLP, by its usual names: a few of its inputs are far larger than the rest (notebook 11), too far
# for one scale a tensor
LAST = ("down_proj", "fc2", "w2")


def write(model: nn.Module, folder: Path, widths: Mapping[str, str]) -> None:
    """Write both graphs to `folder`, each in its precision. Raises as `export.export`."""
    runtime.needs("onnx", "onnxscript", "onnxruntime")
    tower, picture = export.vision(model)
    vision = runtime.to_onnx(tower, {"pixel_values": picture}, folder / "vision.onnx", {})
    language = _language(model, folder / "language.onnx")
    if widths["vision"] == "int8":
        runtime.dynamic_int8(vision, vision)
    if widths["language"] == "int8":  # all inputs of a layer on one scale; where that is too coarse, and for words, groups of 32
        runtime.dynamic_int8(language, language, keep=[k for k in LAST if any(k in s for s in runtime.scopes(language).values())])
        packed.rewrite(language, language, 8)
    elif widths["language"] == "int4":
        packed.rewrite(language, language, 4)
    for path in (vision, language):
        packed.tidy(path)


def _language(model: nn.Module, path: Path) -> Path:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    module, example, axes = export.language(model)
    with runtime.quiet(), runtime.written(path) as aside:
        # for the CPU: attention with its cache and rotary embedding in one node (GroupQueryAttention), norms with their sums,
        # and products of one input together
        config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu", prefer_deferred_runtime_asserts_over_guards=True)
        program = OnnxExporter().export(module, example, config).program
        import onnx_ir

        onnx_ir.save(program, str(aside))
    return path
