"""Weights of 4 or 8 bits in an ONNX graph: MatMulNBits for products, GatherBlockQuantized for embeddings (notebook 14).

Groups of 32 weights along the inputs share a scale, zero is in the middle, and products round activations to int8 by the same
groups (`accuracy_level` 4, the fast one).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrecipes.errors import require
from mmrecipes.export.onnx.graphs import save_onnx
from mmrecipes.quantize.groups import GROUP, on_grid, pack

if TYPE_CHECKING:
    import onnx

    Store = Callable[[str, Callable[[], tuple[np.ndarray, np.ndarray]]], list[str]]
    Replace = Callable[[onnx.NodeProto, Tensor, Store], onnx.NodeProto | None]


def to_nbits(
    graph: str | Path, out: str | Path, bits: int, only: Callable[[onnx.NodeProto], bool] | None = None, rounded: bool = False
) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix, and look-ups in one, have weights of `bits` bits.

    `only` says of a node whether it may; with `rounded`, only where weights lie on a grid of so many bits already. As
    `save_onnx` writes it.
    """
    from onnx import helper

    def replace(node: onnx.NodeProto, weight: Tensor, store: Store) -> onnx.NodeProto | None:
        if (only and not only(node)) or (rounded and not on_grid(weight, bits)):
            return None
        options = {"name": node.name, "domain": "com.microsoft", "bits": bits, "block_size": GROUP}
        if node.op_type == "Gather":
            numbers, scales = store(f"{bits}_rows", lambda: [t.reshape(len(weight), -1) for t in pack(weight, bits)])
            inputs = [numbers, node.input[1], scales]
            return helper.make_node("GatherBlockQuantized", inputs, [*node.output], gather_axis=0, quantize_axis=1, **options)
        options |= {"K": weight.shape[1], "N": weight.shape[0], "accuracy_level": 4}
        inputs = [node.input[0], *store(f"{bits}_groups", lambda: pack(weight, bits))]
        return helper.make_node("MatMulNBits", inputs, [*node.output], **options)

    return _with_nodes_replaced(graph, out, replace)


def to_dynamic_int8(graph: str | Path, out: str | Path) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix are in dynamic int8, one scale a channel.

    What `dynamic_int8` does by ONNX Runtime's own tool, with one weight in memory at a time instead of several copies of
    all. Weights have 7 bits: without VNNI, sums of two products of 8 bits saturate (notebook 11).
    """
    from onnx import helper

    def replace(node: onnx.NodeProto, weight: Tensor, store: Store) -> onnx.NodeProto | None:
        if node.op_type == "Gather":
            return None

        def per_channel() -> tuple[np.ndarray, np.ndarray]:
            scale = weight.abs().amax(1).clamp(min=1e-12) / 63
            return (weight / scale[:, None]).round().to(torch.int8).T.contiguous().numpy(), scale.numpy()

        inputs = [node.input[0], *store("channels", per_channel)]
        return helper.make_node("DynamicQuantizeMatMul", inputs, [*node.output], name=node.name, domain="com.microsoft")

    return _with_nodes_replaced(graph, out, replace)


def _with_nodes_replaced(graph: str | Path, out: str | Path, replace: Replace) -> Path:
    """A copy of `graph` at `out` with the nodes that `replace` gives for those with a constant matrix (None: left as it is).

    `replace` gets the node, its weight (out, in) or (rows, width), and a function that stores (numbers, scales) under the
    weight's name with an ending, once, and returns both names. One weight is in memory at a time.
    """
    require("onnx")
    import onnx
    from onnx import numpy_helper

    folder = str(Path(graph).parent)
    model = onnx.load(str(graph), load_external_data=False)
    constants = {t.name: t for t in model.graph.initializer}
    added: dict[str, onnx.TensorProto] = {}
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

        def store(ending: str, pack: Callable[[], tuple[np.ndarray, np.ndarray]], name: str = constant.name) -> list[str]:
            names = [f"{name}_{ending}", f"{name}_{ending}_scales"]
            if names[0] not in added:
                added.update({n: numpy_helper.from_array(value, n) for n, value in zip(names, pack(), strict=True)})
            return names

        new = replace(node, weight.T.contiguous() if port and not transposed else weight, store)
        if new is not None:
            new.metadata_props.extend(node.metadata_props)
            node.CopyFrom(new)
    model.graph.initializer.extend(added.values())
    _drop_unused(model)
    if not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    onnx.load_external_data_for_model(model, folder)
    return save_onnx(model, out)


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for values in (model.graph.initializer, model.graph.value_info):
        kept = [value for value in values if value.name in used]
        del values[:]
        values.extend(kept)
