"""`export.export` for OpenVINO: vision.xml and language.xml, the KV cache inside the graph as its state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mmrecipes import export, runtime


def write(model: nn.Module, folder: Path, widths: Mapping[str, str]) -> None:
    """Write both graphs to `folder`, each in its precision; "bf16" is chosen when they are loaded. Raises as `export.export`."""
    runtime.needs("openvino", "nncf")
    import openvino as ov
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    tower, picture = export.vision(model)
    module, example, axes = export.language(model)
    with runtime.quiet(), torch.no_grad():
        found = {"vision": ov.convert_model(torch.export.export(tower.eval(), (picture,)))}
        found["language"] = OpenVINOExporter().export(module, example, OpenVINOConfig(dynamic_shapes=axes)).program
        for part, graph in found.items():
            ov.save_model(_compressed(graph, widths[part]), folder / f"{part}.xml", compress_to_fp16=False)


def _compressed(graph, width: str):
    """Weights in int8, one scale a channel, or int4 in groups of 32; embeddings too. Activations stay as they are."""
    if width not in ("int8", "int4"):
        return graph
    import nncf

    if width == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0, all_layers=True)
