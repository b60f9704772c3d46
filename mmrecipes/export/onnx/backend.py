"""`export.export` for ONNX Runtime: vision.onnx and language.onnx, in fp32, int8 or with weights of 4 bits."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.exporters.utils import patch_attribute

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.export.onnx import graphs, quantize
from mmrecipes.quantize.groups import GROUP, on_grid, pack

# the last layer of a decoder's MLP, by its usual names: a few of its inputs are far larger than the rest (notebook 11), too far
# for one scale a tensor
OUTLIER_LAYERS = ("down_proj", "fc2", "w2")


def write_onnx(
    model: nn.Module, folder: Path, precisions: Mapping[str, str], runs: Sequence[Mapping[str, np.ndarray]], batches: bool = False
) -> None:
    """Write the graphs that `precisions` names to `folder`; "static" looks at `runs` of the vision graph. Raises as `export`."""
    require("onnx", "onnxscript", "onnxruntime")
    if "vision" in precisions:
        encoder, image, free = wrappers.vision_graph(model)
        vision = graphs.to_onnx(encoder, image, folder / "vision.onnx", free)
        round_weights(vision, precisions["vision"])
        if precisions["vision"] == "static":  # of a ViT, whose one convolution cuts the patches, the matrix products
            cnn = sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) > 1
            config = quantize.StaticConfig(layers="all") if cnn else quantize.StaticConfig(reduce_range=True)
            quantize.static_int8(vision, runs, vision, config)
        graphs.strip_metadata(vision)
    if "language" in precisions:
        _write_language(model, folder / "language.onnx", batches)
        round_weights(folder / "language.onnx", precisions["language"])
        graphs.strip_metadata(folder / "language.onnx")


def _write_language(model: nn.Module, path: Path, batches: bool) -> None:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    decoder, example, axes = wrappers.language_wrapper(model, batches)
    with quiet.library_logs(), graphs.quick_conversion(), _fusions(not decoder.family.masks, path.parent):
        # fused: attention with cache and rotary embedding (GroupQueryAttention), norms with sums, products of one input
        config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu", prefer_deferred_runtime_asserts_over_guards=True)
        program = OnnxExporter().export(decoder, example, config).program
        if not decoder.family.masks and not wrappers.windows(decoder.decoder.config):
            # else states, or attention that is not fused, read the cache as a whole (and not only its shape)
            caches = [value for value in program.graph.inputs if value.name.startswith("input.")]
            roomy = {node.op_type for each in caches for node in each.consumers()} - {"Shape"} == {"GroupQueryAttention"}
            if roomy or not batches:
                _without_mask(program)
            if roomy:
                _with_lengths(program, batches)
        onnx_ir.save(program, str(path), external_data="language.onnx.data")


def round_weights(path: Path, precision: str) -> None:
    """The weights of the graph at `path`, vision.onnx or language.onnx, in "int8", "int4" or "mixed"; in others, as they are."""
    ways = [nbits(4, rounded=precision == "mixed")] if precision in ("int4", "mixed") else []
    if precision in ("int8", "mixed"):
        if path.stem == "language":  # one scale for all inputs is too coarse for OUTLIER_LAYERS; embeddings and the head
            scopes = graphs.module_scopes(path)
            coarse = {name for name, scope in scopes.items() if any(layer in scope for layer in OUTLIER_LAYERS)}
            ways.append(nbits(8, only=lambda node: node.op_type != "MatMul" or node.name in coarse))
        ways.append(int8_channels)
    if ways:
        replace_nodes(path, *ways)


@contextlib.contextmanager
def _fusions(causal: bool, folder: Path) -> Iterator[None]:
    """ONNX Runtime's GroupQueryAttention only looks back, whatever its mask: nothing for images whose tokens see each other.
    Weights that are put together (of products with one input) lie in a file in `folder`: of 3B parameters they are 7 GB."""
    from transformers.exporters import onnxruntime_fusions as fusions

    kept = tuple(step for step in fusions._STEPS if causal or step[0] is not fusions._fuse_group_query_attention)
    size, initializer = fusions._static_dim, fusions._initializer

    def stored(graph, name, array):
        if array.nbytes <= 2**24:
            return initializer(graph, name, array)
        with tempfile.TemporaryFile(dir=folder) as file:
            held = np.memmap(file, array.dtype, "w+", shape=array.shape)
        held[:] = array
        return initializer(graph, name, held)

    with (
        patch_attribute(fusions, "_initializer", lambda _: stored),
        patch_attribute(fusions, "_STEPS", lambda _: kept),
        # fused of batches, too: several new tokens of several rows, which the kernel does not take, are never asked for
        patch_attribute(fusions, "_static_dim", lambda _: lambda value, axis: size(value, axis) if axis else 1),
    ):
        yield


def _without_mask(program) -> None:
    """GroupQueryAttention looks back by itself, no further than each row's length: there is no mask to compute and read, of
    (B, T, S) numbers, and no row that sees nothing, which a Where would guard."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in program.graph:
        if node.op_type != "GroupQueryAttention" or len(node.inputs) < 11:
            continue
        node.replace_input_with(10, None)
        for shaped in node.outputs[0].consumers():
            for guard in [n for n in shaped.outputs[0].consumers() if n.op_type == "Where"]:
                guard.outputs[0].replace_all_uses_with(shaped.outputs[0])
    RemoveUnusedNodesPass()(program)


def _with_lengths(program, batches: bool) -> None:
    """An input `past_length` (B, or 1): how many tokens the cache holds of each row; it may have room for more. Keys and values
    are then written where they stay (GroupQueryAttention's shared buffer), and a step copies none of those that came before."""
    import onnx_ir as ir

    graph = program.graph
    shapes = [n for n in graph if n.op_type == "Shape" and (n.inputs[0].name or "").startswith("input.")]
    lengths = [node for node in shapes if node.attributes["start"].as_int() == 2]
    given = ir.Value(name="past_length", shape=ir.Shape(["rows" if batches else 1]), type=ir.TensorType(ir.DataType.INT64))
    longest = given
    if batches:
        graph.insert_before(graph[0], most := ir.node("ReduceMax", [given], {"keepdims": 1}))
        longest = most.outputs[0]
    for node in lengths:
        node.outputs[0].replace_all_uses_with(longest)
    graph.remove(lengths, safe=True)
    if batches:
        attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
        # seqlens_k (rows), the last place of each, was that of the longest row
        missing = ir.node("Sub", [given, longest])
        whole = ir.node("Cast", [missing.outputs[0]], {"to": ir.DataType.INT32})
        own = ir.node("Add", [attention[0].inputs[5], whole.outputs[0]])
        graph.insert_before(attention[0], [missing, whole, own])
        for node in attention:
            node.replace_input_with(5, own.outputs[0])
        for value in [v for v in graph.inputs if v.name == "attention_mask" and not v.uses()]:
            graph.inputs.remove(value)
    graph.inputs.append(given)


def nbits(bits: int, only: Callable[..., bool] | None = None, rounded: bool = False) -> Callable[..., tuple | None]:
    """A way (`replace_nodes`) of products with a constant matrix, and of look-ups in one: weights of `bits` bits (notebook 14).
    Groups of 32 weights along the inputs share a scale; MatMulNBits rounds activations to int8 by the same groups. `only` says of
    a node (NodeProto) whether it may; with `rounded`, only weights that lie on a grid of so many bits already.
    """

    def replacement(node, weight: Tensor) -> tuple | None:
        if (only and not only(node)) or (rounded and not on_grid(weight, bits)):
            return None
        stored, options = pack(weight, bits), {"bits": bits, "block_size": GROUP}
        if node.op_type == "Gather":
            options |= {"gather_axis": 0, "quantize_axis": 1}
            return "GatherBlockQuantized", f"{bits}_rows", [t.reshape(len(weight), -1) for t in stored], options
        options |= {"K": weight.shape[1], "N": weight.shape[0], "accuracy_level": 4}  # the fast one
        return "MatMulNBits", f"{bits}_groups", stored, options

    return replacement


def int8_channels(node, weight: Tensor) -> tuple | None:
    """A way (`replace_nodes`) of products: dynamic int8, 7 bits for CPUs without VNNI (notebook 11). Overwrites `weight`."""
    if node.op_type == "Gather":
        return None
    scale = torch.maximum(weight.amax(1), -weight.amin(1)).clamp(min=1e-12) / 63
    numbers = weight.div_(scale[:, None]).round_().to(torch.int8).T.contiguous()
    return "DynamicQuantizeMatMul", "channels", (numbers.numpy(), scale.numpy()), {}


def replace_nodes(path: Path, *ways: Callable[..., tuple | None]) -> None:
    """Let kernels of ONNX Runtime's own read what is a constant matrix in the graph at `path`.
    Each of `ways` gets a node and its weight, (out, in) or (rows, width), and gives None, or the kernel's name, an ending for the
    names of what it reads, (numbers, scales) and the kernel's attributes; the first that gives one is taken. One weight is in
    memory at a time. The kernels add no bias (Gemm's), and look up whole groups: an Add or a Slice after them does the rest.
    """
    import onnx
    import onnx_ir
    from onnx import helper, numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    constants, added, nodes = {t.name: t for t in model.graph.initializer}, {}, []
    for node in model.graph.node:
        nodes.append(node)
        port = 0 if node.op_type == "Gather" else 1
        if node.op_type not in ("MatMul", "FusedMatMul", "Gemm", "Gather") or node.input[port] not in constants:
            continue
        constant = constants[node.input[port]]
        attributes = {a.name: a.f if a.name in ("alpha", "beta") else a.i for a in node.attribute}
        transposed = bool(attributes.pop("transB", 0))
        # a factor, or an input turned round: these kernels have neither
        factors = {attributes.pop(name, 1) for name in ("alpha", "beta")}
        plain = port == 0 or (factors == {1} and not any(attributes.values()))
        if len(constant.dims) != 2 or constant.data_type != onnx.TensorProto.FLOAT or not plain:
            continue
        weight = onnx_ir.serde.deserialize_tensor(constant, str(path.parent)).numpy()  # of a file: mapped, not read
        weight = torch.from_numpy(np.array(weight.T if port and not transposed else weight, order="C"))
        new = next((found for way in ways if (found := way(node, weight))), None)
        if new is None:
            continue
        kernel, ending, stored, options = new
        names = [f"{constant.name}_{ending}", f"{constant.name}_{ending}_scales"]
        added |= {name: numpy_helper.from_array(value, name) for name, value in zip(names, stored, strict=True)}
        inputs = [node.input[0], *names] if port else [names[0], node.input[1], names[1]]
        out, whole = node.output[0], f"{node.output[0]}_whole"
        rest = []
        if node.op_type == "Gemm" and len(node.input) > 2:
            rest = [helper.make_node("Add", [whole, node.input[2]], [out], f"{node.name}_bias")]
        elif not port and weight.shape[1] % GROUP:
            ends = {f"{out}_{k}": np.array([v]) for k, v in (("first", 0), ("last", weight.shape[1]), ("axis", -1))}
            added |= {name: numpy_helper.from_array(value, name) for name, value in ends.items()}
            rest = [helper.make_node("Slice", [whole, *ends], [out], f"{node.name}_width")]
        new = helper.make_node(kernel, inputs, [whole if rest else out], node.name, domain="com.microsoft", **options)
        new.metadata_props.extend(node.metadata_props)
        nodes[-1:] = [new, *rest]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    while added:  # each is copied
        model.graph.initializer.append(added.pop(next(iter(added))))
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for values in (model.graph.initializer, model.graph.value_info):
        for i in [i for i, value in enumerate(values) if value.name not in used][::-1]:
            del values[i]
    if not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    onnx.load_external_data_for_model(model, str(path.parent))
    graphs.save_onnx(model, path)
