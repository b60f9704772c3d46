"""`export.export` for OpenVINO: vision.xml and language.xml, the KV cache inside the graph as its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.quantize import groups as quantize_groups


def write_openvino(model: nn.Module, folder: Path, widths: Mapping[str, str], pixels: Sequence[np.ndarray]) -> None:
    """Write both graphs to `folder`, each in its precision; "static" looks at `pixels` (1, 3, H, W); loading chooses "bf16".

    Raises as `export.export`.
    """
    require("openvino", "nncf")
    import openvino as ov
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    tower, picture = wrappers.vision_wrapper(model)
    module, example, axes = wrappers.language_wrapper(model)
    config = OpenVINOConfig(dynamic_shapes=axes)
    made = {  # one after the other: of a large model each copy counts
        "vision": lambda: ov.convert_model(torch.export.export(tower.eval(), (picture,))),
        "language": lambda: shared_heads(OpenVINOExporter().export(module, example, config).program),
    }
    for part, graph in made.items():
        with quiet.library_logs(), torch.no_grad():
            small = _static(graph(), pixels) if widths[part] == "static" else _compressed(graph(), widths[part])
            ov.save_model(small, folder / f"{part}.xml", compress_to_fp16=False)


def shared_heads(graph):
    """`graph` with keys and values copied to the heads that share them (GQA) in the form that OpenVINO knows.

    torch.export's `expand` becomes a Broadcast of kind "numpy", and with it the CPU plugin takes attention apart: into products
    that it computes one by one. It keeps attention whole, and reads the cache in place, behind a "bidirectional" one.
    """
    from openvino import opset13 as op

    for node in graph.get_ordered_ops():
        for at in (1, 2) if node.get_type_name() == "ScaledDotProductAttention" else ():
            shape = node.get_input_partial_shape(at)
            reshape = node.input_value(at).get_node()
            broadcast = reshape.input_value(0).get_node()
            if (reshape.get_type_name(), broadcast.get_type_name()) != ("Reshape", "Broadcast"):
                continue  # each head has its own
            held = broadcast.input_value(0)  # (1, KV heads, 1, T, W)
            heads, own, width = shape[1].get_length(), held.get_partial_shape()[1].get_length(), shape[3].get_length()
            times = op.constant(np.array([1, 1, heads // own, 1, 1]))
            copied = op.broadcast(held, times, broadcast_spec="BIDIRECTIONAL")
            target = op.constant(np.array([0, heads, -1, width]))
            node.input(at).replace_source_output(op.reshape(copied, target, special_zero=True).output(0))
    graph.validate_nodes_and_infer_types()
    return graph


def _compressed(graph, width: str):
    """Weights in int8, one scale a channel, or int4 in groups of 32; embeddings too. Activations stay as they are."""
    if width in ("int4", "mixed"):
        _four_bits(graph, rounded=width == "mixed")
    if width in ("int8", "mixed"):
        import nncf

        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return graph


def _static(graph, pixels: Sequence[np.ndarray]):
    """Products in int8, ranges of activations fixed on `pixels`; attention's own products, too."""
    import nncf

    return nncf.quantize(graph, nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels))


def _four_bits(graph, rounded: bool) -> None:
    """Give products with a constant matrix, and look-ups in one, weights of 4 bits (`quantize.pack`) in `graph` itself.

    With `rounded`, only where the weights lie on a grid of 4 bits already, which NNCF's own rounding would not keep.
    """
    import openvino as ov
    from openvino import opset13 as op

    done = {}
    for node in graph.get_ordered_ops():
        at = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
        constant = None if at is None else node.input_value(at).get_node()
        if constant is None or constant.get_type_name() != "Constant" or constant.get_element_type() != ov.Type.f32:
            continue
        name, shape = constant.get_friendly_name(), list(constant.shape)
        if len(shape) != 2 or shape[1] % quantize_groups.GROUP or (at and not node.get_attributes()["transpose_b"]):
            continue
        if name not in done:
            weight = torch.from_numpy(constant.data.copy())
            if rounded and not quantize_groups.on_grid(weight):
                continue
            q, scales = quantize_groups.pack(weight, 4)
            groups = [shape[0], shape[1] // quantize_groups.GROUP, quantize_groups.GROUP]
            numbers = ov.Tensor(ov.Type.i4, ov.Shape(groups))
            numbers.data[:] = (q ^ 0x88).reshape(-1).view(np.int8)  # signed: the upper bit of each half of a byte turns round
            scaled = op.multiply(op.convert(op.constant(numbers), "f32"), op.constant(scales[..., None]))
            done[name] = op.reshape(scaled, op.constant(np.array(shape)), special_zero=False)
        node.input(at).replace_source_output(done[name].output(0))
    graph.validate_nodes_and_infer_types()
