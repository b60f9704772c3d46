"""Weights of 4 or 8 bits in an ONNX graph: MatMulNBits for products, GatherBlockQuantized for embeddings (notebook 14).

Groups of 32 weights along the inputs share a scale, zero is in the middle, and products round activations to int8 by the same
groups (`accuracy_level` 4, the fast one).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmrecipes.errors import require
from mmrecipes.export.onnx.graphs import save_onnx
from mmrecipes.quantize.groups import GROUP, on_grid, pack


def to_nbits(
    graph: str | Path, out: str | Path, bits: int, only: Callable[..., bool] | None = None, rounded: bool = False
) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix, and look-ups in one, have weights of `bits` bits.

    `only` says of a node (NodeProto) whether it may; with `rounded`, only where weights lie on a grid of so many bits already.
    As `save_onnx` writes it.
    """

    def replacement(node, weight: Tensor) -> tuple | None:
        if (only and not only(node)) or (rounded and not on_grid(weight, bits)):
            return None
        stored, options = pack(weight, bits), {"bits": bits, "block_size": GROUP}
        if node.op_type == "Gather":
            options |= {"gather_axis": 0, "quantize_axis": 1}
            return "GatherBlockQuantized", f"{bits}_rows", [t.reshape(len(weight), -1) for t in stored], options
        options |= {"K": weight.shape[1], "N": weight.shape[0], "accuracy_level": 4}
        return "MatMulNBits", f"{bits}_groups", stored, options

    return _with_nodes_replaced(graph, out, replacement)


def to_dynamic_int8(graph: str | Path, out: str | Path) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix are in dynamic int8, one scale a channel.

    What `dynamic_int8` does by ONNX Runtime's own tool, with one weight in memory at a time instead of several copies of
    all. Weights have 7 bits: without VNNI, sums of two products of 8 bits saturate (notebook 11).
    """

    def replacement(node, weight: Tensor) -> tuple | None:
        if node.op_type == "Gather":
            return None
        scale = weight.abs().amax(1).clamp(min=1e-12) / 63
        numbers = (weight / scale[:, None]).round().to(torch.int8).T.contiguous()
        return "DynamicQuantizeMatMul", "channels", (numbers.numpy(), scale.numpy()), {}

    return _with_nodes_replaced(graph, out, replacement)


def _with_nodes_replaced(graph: str | Path, out: str | Path, replacement: Callable[..., tuple | None]) -> Path:
    """A copy of `graph` at `out`, in which kernels of ONNX Runtime's own read what was a constant matrix.

    `replacement` gets a node and its weight, (out, in) or (rows, width), and gives None, or the kernel's name, an ending for the
    names of what it reads, (numbers, scales) and the kernel's attributes. One weight is in memory at a time.
    """
    require("onnx")
    import onnx
    from onnx import helper, numpy_helper

    folder = str(Path(graph).parent)
    model = onnx.load(str(graph), load_external_data=False)
    constants = {t.name: t for t in model.graph.initializer}
    added = {}
    for node in model.graph.node:
        port = 0 if node.op_type == "Gather" else 1
        if node.op_type not in ("MatMul", "FusedMatMul", "Gather") or node.input[port] not in constants:
            continue
        constant = constants[node.input[port]]
        attributes = {a.name: a.f if a.name == "alpha" else a.i for a in node.attribute}
        transposed = bool(attributes.pop("transB", 0))
        # a factor, or an input turned round: these kernels have neither
        plain = port == 0 or (attributes.pop("alpha", 1) == 1 and not any(attributes.values()))
        if len(constant.dims) != 2 or constant.data_type != onnx.TensorProto.FLOAT or not plain:
            continue
        weight = torch.from_numpy(numpy_helper.to_array(constant, folder).copy())
        new = replacement(node, weight.T.contiguous() if port and not transposed else weight)
        if new is None:
            continue
        kernel, ending, stored, options = new
        names = [f"{constant.name}_{ending}", f"{constant.name}_{ending}_scales"]
        added |= {name: numpy_helper.from_array(value, name) for name, value in zip(names, stored, strict=True)}
        inputs = [node.input[0], *names] if port else [names[0], node.input[1], names[1]]
        new = helper.make_node(kernel, inputs, [*node.output], node.name, domain="com.microsoft", **options)
        new.metadata_props.extend(node.metadata_props)
        node.CopyFrom(new)
    model.graph.initializer.extend(added.values())
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for values in (model.graph.initializer, model.graph.value_info):
        kept = [value for value in values if value.name in used]
        del values[:]
        values.extend(kept)
    if not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    onnx.load_external_data_for_model(model, folder)
    return save_onnx(model, out)
