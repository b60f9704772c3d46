"""Weights of 4 or 8 bits in an ONNX graph: ONNX Runtime's MatMulNBits for products and GatherBlockQuantized for embeddings.

Groups of 32 weights along the inputs share a scale, zero is in the middle, and products round activations to int8 by the same
groups (`accuracy_level` 4, the fast one). Notebook 14 compares this kernel with the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrecipes import runtime
from mmrecipes.errors import UserError

GROUP = 32


def pack(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (out, in) as whole numbers of `bits` bits and scales: (out, groups, 32 * bits / 8) uint8, (out, groups) float32.

    Weights that lie on a grid already (GPTQ has rounded them) keep it exactly; others get the scale of least squared error.
    """
    if bits not in (4, 8):
        raise UserError(f"pack: bits={bits}; ONNX Runtime's kernels have 4 and 8")
    out, wide = weight.shape
    groups = -(-wide // GROUP)
    w = torch.nn.functional.pad(weight.detach().float(), (0, groups * GROUP - wide)).view(out * groups, GROUP)
    half = 2 ** (bits - 1)
    scale = _scales(w, bits)
    q = (w / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    if bits == 4:  # two to a byte, the earlier one in the low half
        q = q[:, ::2] | (q[:, 1::2] << 4)
    return q.view(out, groups, -1).numpy(), scale.view(out, groups).numpy()


def _scales(w: Tensor, bits: int) -> Tensor:
    """A scale for each row of `w`, the largest of those tried that leave no error, else the one that leaves the least."""
    half, most = 2 ** (bits - 1), w.abs().amax(1, keepdim=True).clamp(min=1e-12)
    tried = [most / k for k in (range(1, half + 1) if bits == 4 else (half - 1, half))]
    tried += [most / (half - 1) * r for r in np.linspace(0.7, 1, 13)] if bits == 4 else []
    best, least = tried[0], torch.full_like(most, torch.inf)
    for scale in tried:
        off = (w - (w / scale).round().clamp(-half, half - 1) * scale).square().sum(1, keepdim=True)
        better = off < 0.99 * least - 1e-12 * most.square()
        best, least = torch.where(better, scale, best), torch.where(better, off, least)
    return best


def rewrite(graph: str | Path, out: str | Path, bits: int) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix, and look-ups in one, have weights of `bits` bits."""
    runtime.needs("onnx")
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(graph))
    constants = {t.name: t for t in model.graph.initializer}
    added: dict[str, onnx.TensorProto] = {}

    def packed(name: str, weight: Tensor, bits: int, flat: bool) -> list[str]:
        names = [f"{name}_{bits}_{'rows' if flat else 'groups'}", f"{name}_{bits}_scales"]
        if names[0] not in added:
            q, scales = pack(weight, bits)
            added[names[0]] = numpy_helper.from_array(q.reshape(len(q), -1) if flat else q, names[0])
            added[names[1]] = numpy_helper.from_array(scales, names[1])
        return names

    for i, node in enumerate(model.graph.node):
        at = 0 if node.op_type == "Gather" else 1
        if node.op_type not in ("MatMul", "FusedMatMul", "Gather") or node.input[at] not in constants:
            continue
        kind = "Gather" if node.op_type == "Gather" else "MatMul"
        name = node.input[at]
        weight = torch.from_numpy(numpy_helper.to_array(constants[name]).copy())
        extra = {a.name: a.f if a.name == "alpha" else a.i for a in node.attribute}
        turned = bool(extra.pop("transB", 0)) if kind == "MatMul" else False
        # a factor, or an input turned round: this kernel has neither
        plain = kind == "Gather" or (extra.pop("alpha", 1) == 1 and not any(extra.values()))
        if weight.ndim != 2 or weight.dtype != torch.float32 or not plain:
            continue
        if kind == "Gather":
            inputs = packed(name, weight, bits, flat=True)
            new = helper.make_node(
                *("GatherBlockQuantized", [inputs[0], node.input[1], inputs[1]], list(node.output)),
                **{"name": node.name, "domain": "com.microsoft", "bits": bits},
                **{"gather_axis": 0, "quantize_axis": 1, "block_size": GROUP},
            )
        else:
            weight = weight if turned else weight.T.contiguous()
            inputs = packed(name, weight, bits, flat=False)
            new = helper.make_node(
                *("MatMulNBits", [node.input[0], *inputs], list(node.output)),
                **{"name": node.name, "domain": "com.microsoft", "K": weight.shape[1], "N": weight.shape[0]},
                **{"bits": bits, "block_size": GROUP, "accuracy_level": 4},
            )
        new.metadata_props.extend(node.metadata_props)
        model.graph.node[i].CopyFrom(new)
    model.graph.initializer.extend(added.values())
    _drop_unused(model)
    with runtime.written(out) as aside:
        onnx.save(model, str(aside))
    return Path(out)


def tidy(graph: str | Path) -> None:
    """Take out of the file at `graph` what the exporter noted for people: which line of which file each node came from."""
    import onnx

    model = onnx.load(str(graph))
    for owner in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    with runtime.written(graph) as aside:
        onnx.save(model, str(aside))


def _drop_unused(model) -> None:
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    shapes = [v for v in model.graph.value_info if v.name in used]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    if not any(o.domain == "com.microsoft" for o in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
