"""`export.export` for OpenVINO: vision.xml and language.xml, the KV cache inside the graph as its state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.quantize.groups import GROUP, on_grid, pack


def write_openvino(
    model: nn.Module, folder: Path, precisions: Mapping[str, str], runs: Sequence[Mapping[str, np.ndarray]], batches: bool = False
) -> None:
    """Write the graphs that `precisions` names to `folder`; "static" looks at `runs` of the vision graph. Raises as `export`."""
    require("openvino", "nncf")
    import openvino as ov
    from transformers.exporters.exporter_openvino import OpenVINOConfig

    for part, precision in precisions.items():  # one after the other: of a large model each copy counts
        with quiet.library_logs(), torch.no_grad():
            if part == "vision":
                encoder, image, free = wrappers.vision_graph(model)
                graph = _vision(encoder.eval(), image, free)
            else:
                decoder, example, axes = wrappers.language_wrapper(model, batches)
                graph = _language(decoder, example, OpenVINOConfig(dynamic_shapes=axes))
            ov.save_model(_quantized(graph, precision, runs), folder / f"{part}.xml", compress_to_fp16=False)
        del graph


def write_encoder(encoder: nn.Module, example: dict[str, torch.Tensor], free: dict, precision: str, path: Path) -> None:
    """Write one module without state, fp32, bf16 or int8, whose inputs keep the names of `example` and its `free` axes."""
    import openvino as ov

    with quiet.library_logs(), torch.no_grad():
        graph = _vision(encoder, example, free)
        for port, name in zip(graph.inputs, example, strict=True):
            port.get_tensor().set_names({name})
        ov.save_model(_quantized(graph, precision, ()), path, compress_to_fp16=False)


def _vision(encoder: nn.Module, image: dict[str, torch.Tensor], free: dict[str, dict]):
    import openvino as ov
    from transformers.exporters.exporter_dynamo import patch_forward_signature

    with patch_forward_signature(encoder, image):
        return ov.convert_model(torch.export.export(encoder, (), image, dynamic_shapes=free or None))


def shared_heads(graph):
    """`graph` with keys and values copied to the heads that share them (GQA) by a Broadcast of kind "bidirectional".
    Behind it the CPU plugin keeps attention whole and reads the cache in place; behind torch.export's "numpy" it does not.
    """
    from openvino import opset13 as op

    attentions = [node for node in graph.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    for node, port in ((node, port) for node in attentions for port in (1, 2)):
        reshape = node.input_value(port).get_node()
        broadcast = reshape.input_value(0).get_node()
        if (reshape.get_type_name(), broadcast.get_type_name()) != ("Reshape", "Broadcast"):
            continue  # each head has its own
        held = broadcast.input_value(0)  # (1, KV heads, 1, T, head_dim)
        shape, kv_heads = node.get_input_partial_shape(port), held.get_partial_shape()[1].get_length()
        heads, head_dim = shape[1].get_length(), shape[3].get_length()
        times = op.constant(np.array([1, 1, heads // kv_heads, 1, 1]))
        copied = op.broadcast(held, times, broadcast_spec="BIDIRECTIONAL")
        merged = op.reshape(copied, op.constant(np.array([0, heads, -1, head_dim])), special_zero=True)
        node.input(port).replace_source_output(merged.output(0))
    graph.validate_nodes_and_infer_types()
    return graph


def _language(decoder: nn.Module, example: dict, config: object):
    """The graph of the decoder; how wide `image_features` are, which the exporter leaves open, is said in it."""
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    graph = shared_heads(OpenVINOExporter().export(decoder, example, config).program)
    graph.reshape({"image_features": [-1, example["image_features"].shape[1]]})
    return graph


def _quantized(graph, precision: str, runs: Sequence[Mapping[str, np.ndarray]]):
    """int8: weights and embeddings, a scale a channel; int4, mixed: `_four_bits`; static: activations, too, fixed on `runs`."""
    if precision in ("fp32", "bf16"):  # loading chooses between these
        return graph
    import nncf

    if precision == "static":
        seen = nncf.Dataset(
            [dict(run) if len(run) > 1 else next(iter(run.values())) for run in runs]
        )  # one input may lack a name
        return nncf.quantize(graph, seen, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(runs))
    if precision in ("int4", "mixed"):
        _four_bits(graph, rounded=precision == "mixed")
    return graph if precision == "int4" else nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)


def _four_bits(graph, rounded: bool) -> None:
    """Products with a constant matrix, and look-ups in one, get weights of 4 bits (`quantize.pack`) in `graph` itself.
    With `rounded`, only where the weights lie on a grid of 4 bits already, which NNCF's own rounding would not keep.
    """
    import openvino as ov
    from openvino import opset13 as op

    packed = {}
    for node in graph.get_ordered_ops():
        port = {"MatMul": 1, "Gather": 0}.get(node.get_type_name())
        constant = None if port is None else node.input_value(port).get_node()
        if constant is None or constant.get_type_name() != "Constant" or constant.get_element_type() != ov.Type.f32:
            continue
        name, shape = constant.get_friendly_name(), list(constant.shape)
        if len(shape) != 2 or shape[1] % GROUP or (port and not node.get_attributes()["transpose_b"]):
            continue
        if name not in packed:
            weight = torch.from_numpy(constant.data.copy())
            if rounded and not on_grid(weight):
                continue
            q, scales = pack(weight, 4)
            numbers = ov.Tensor(ov.Type.i4, ov.Shape([shape[0], shape[1] // GROUP, GROUP]))
            numbers.data[:] = (q ^ 0x88).reshape(-1).view(np.int8)  # signed: the upper bit of each half of a byte turns round
            scaled = op.multiply(op.convert(op.constant(numbers), "f32"), op.constant(scales[..., None]))
            packed[name] = op.reshape(scaled, op.constant(np.array(shape)), special_zero=False)
        node.input(port).replace_source_output(packed[name].output(0))
    graph.validate_nodes_and_infer_types()
