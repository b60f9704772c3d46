"""A module as an ONNX graph, which module each of its nodes came from, and how graphs are saved."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.exporters.exporter_dynamo import patch_forward_signature
from transformers.exporters.utils import patch_attribute

from mmrecipes.errors import UserError, require
from mmrecipes.export.wrappers import check_float32
from mmrecipes.interrupt import temporary_directory
from mmrecipes.models.saving import written_aside
from mmrecipes.quiet import library_logs

MAX_BYTES = 1_900_000_000  # bytes of weights in one ONNX file, which holds at most 2 GB; more lie in a file beside it


def to_onnx(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path, free: Mapping[str, Mapping[int, str]]) -> Path:
    """One module as an ONNX file at `path`, by torch.export; its weights beyond MAX_BYTES in PATH.data. `inputs` are an example,
    by the names of forward's parameters.
    `free` names the axes whose length may change, {"pixel_values": {0: "batch"}} (or gives a Dim of torch.export's for a name);
    give them a length of 2 or more in the example. Attention without a mask becomes ONNX Runtime's fused MultiHeadAttention.
    Raises as `export`.
    """
    require("onnx", "onnxscript")
    check_float32(module)
    apart = sum(t.nbytes for t in (*module.parameters(), *module.buffers())) > MAX_BYTES
    dims = {name: torch.export.Dim(name, min=1) for axes in free.values() for name in axes.values() if isinstance(name, str)}
    shapes = {k: {i: dims[d] if isinstance(d, str) else d for i, d in free.get(k, {}).items()} for k in inputs}
    options = {"input_names": list(inputs), "output_names": ["output"]}
    options["custom_translation_table"] = {torch.ops.aten.scaled_dot_product_attention.default: _attention()}
    options |= {"dynamo": True, "verbose": False, "opset_version": 20}
    with library_logs(), quick_conversion(), (_moved if apart else written_aside)(path) as aside:
        with torch.no_grad(), patch_forward_signature(module, inputs):
            program = torch.onnx.export(module.eval(), kwargs=dict(inputs), dynamic_shapes=shapes, **options)
        program.save(aside, external_data=apart)
    return Path(path)


@contextlib.contextmanager
def quick_conversion() -> Iterator[None]:
    """PyTorch's conversion to ONNX, to the same graph, without two detours: onnxscript parses its operators' sources at each
    export, not once, and tries each rewrite rule at every node, not only at its operator's."""
    from onnxscript.rewriter._rewrite_rule import RewriteRule
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    def at_its_operator(try_rewrite):
        def tried(rule, model, graph, node, **options):
            wanted = rule._target_pattern.output_nodes[0].op_identifier()  # None: any
            fits = wanted is None or wanted[:2] == (node.domain, node.op_type)
            return try_rewrite(rule, model, graph, node, **options) if fits else None

        return tried

    cached = patch_attribute(onnxscript_apis, "get_torchlib_ops", _once)
    with cached, patch_attribute(RewriteRule, "try_rewrite", at_its_operator):
        yield


_once = functools.cache(functools.cache)  # of a function without arguments: the same one each time, which calls it once


def _attention() -> Callable:
    """How scaled_dot_product_attention is written in ONNX: one node of ONNX Runtime's own, which does not store all scores."""
    from onnx.defs import OpSchema
    from onnx_ir import DataType
    from onnxscript import opset20 as op
    from onnxscript.values import Op, Opset

    kind, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    names = ("key", "value", "bias", "key_padding_mask", "attention_bias")
    schema = OpSchema(
        *("MultiHeadAttention", "com.microsoft", 1),
        inputs=[kind("query", "T"), *(kind(n, "M" if n == "key_padding_mask" else "T", param_option=optional) for n in names)],
        outputs=[kind("output", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[OpSchema.Attribute("num_heads", OpSchema.AttrType.INT), OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT)],
    )
    fused = Op(Opset("com.microsoft", 1), "MultiHeadAttention", schema)

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        heads, head_dim = query.shape[1], query.shape[3]
        if attn_mask is not None and attn_mask.dtype == DataType.BOOL:  # the kernel adds its mask
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=torch.finfo(torch.float32).min))

        def flat(x):  # (B, heads, T, head_dim) -> (B, T, heads * head_dim)
            return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

        inputs = (flat(query), flat(key), flat(value), None, None, attn_mask)
        out = fused(*inputs, num_heads=heads, scale=scale or head_dim**-0.5)
        return op.Transpose(op.Reshape(out, op.Constant(value_ints=[0, 0, heads, -1])), perm=[0, 2, 1, 3])

    return attend


def nodes_of_modules(graph: str | Path, keep: Sequence[str]) -> list[str]:
    """Names of the graph's nodes that come from modules of which a name in `keep` is part; the exporter noted the modules."""
    if not keep:
        return []
    scopes = module_scopes(graph)
    if missing := [k for k in keep if not any(k in scope for scope in scopes.values())]:
        raise UserError(f"keep={missing[0]!r}: {graph} has no module of that name; leave it out")
    return [name for name, scope in scopes.items() if any(k in scope for k in keep)]


def module_scopes(graph: str | Path) -> dict[str, str]:
    """The module that each node of `graph` came from, where the exporter noted it: {name of the node: path of the module}."""
    import onnx

    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return {n.name: p.value for n in nodes for p in n.metadata_props if p.key.endswith("name_scopes")}


def strip_metadata(graph: str | Path) -> None:
    """Take out of the file at `graph` what the exporter noted for people: which line of which file each node came from."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    for owner in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    if any(tensor.external_data for tensor in model.graph.initializer):  # the weights stay where they are
        with written_aside(graph) as aside:
            onnx.save(model, str(aside))
    else:
        save_onnx(model, graph)


def save_onnx(model, path: str | Path) -> Path:
    """Write `model` (ModelProto) to `path`, its weights to `path` + ".data", which a runtime maps instead of copying."""
    import onnx

    path = Path(path)
    with _moved(path) as aside:
        onnx.save(model, str(aside), save_as_external_data=True, location=f"{path.name}.data")
    return path


@contextlib.contextmanager
def _moved(path: str | Path) -> Iterator[Path]:
    """A name in a folder beside `path`: the graph that is written there, and the weights beside it, come to `path` in the end."""
    path = Path(path)
    with temporary_directory(path.parent, ".save-") as folder:
        aside = folder / path.name
        yield aside
        data = aside.with_name(f"{path.name}.data")
        data.chmod(aside.stat().st_mode)  # else nobody but its owner could read it
        data.replace(path.with_name(data.name))
        aside.replace(path)
