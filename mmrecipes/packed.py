"""Weights of 4 or 8 bits in an ONNX graph: ONNX Runtime's MatMulNBits for products and GatherBlockQuantized for embeddings.

Groups of 32 weights along the inputs share a scale, zero is in the middle, and products round activations to int8 by the same
groups (`accuracy_level` 4, the fast one). Notebook 14 compares this kernel with the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrecipes import runtime
from mmrecipes.calibrated import best_scale
from mmrecipes.errors import UserError

if TYPE_CHECKING:
    import onnx

GROUP = 32


def pack(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (out, in) as whole numbers of `bits` bits and scales: (out, groups, 32 * bits / 8) uint8, (out, groups) float32.

    A weight is its number, less 2^(bits - 1), times its group's scale. Weights that lie on a grid already (GPTQ has rounded
    them) keep it exactly; others get the scale of least squared error (`calibrated.best_scale`).
    """
    if bits not in (4, 8):
        raise UserError(f"pack: bits={bits}; ONNX Runtime's kernels have 4 and 8")
    half, w = 2 ** (bits - 1), _in_groups(weight)
    scale = scales(weight, bits).view(-1, 1)
    q = (w / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    if bits == 4:  # two to a byte, the earlier one in the low half
        q = q[:, ::2] | (q[:, 1::2] << 4)
    return q.view(len(weight), -1, GROUP * bits // 8).numpy(), scale.view(len(weight), -1).numpy()


def scales(weight: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """The scale of each group of 32 of `weight` (out, in), as `pack` takes it: (out, groups). `signs`: those it may have."""
    w = _in_groups(weight)
    found, off = _grid(w, bits, signs)
    if bits == 4:
        found = torch.where(off > _NOTHING, best_scale(w, bits, signs=signs), found)
    return found.view(len(weight), -1)


def on_grid(weight: Tensor, bits: int = 4) -> bool:
    """Whether `weight` (out, in) was rounded to `bits` bits in groups of 32 before, so that packing it loses nothing."""
    return bool((_grid(_in_groups(weight), bits)[1] <= _NOTHING).all())


_NOTHING = 1e-10  # of a group's squared largest weight: an error that comes from float32 alone


def _in_groups(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).reshape(-1, GROUP)


def _grid(w: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> tuple[Tensor, Tensor]:
    """A scale for each row of `w` that puts its largest weight on a mark, and the squared error it leaves, (rows, 1) both."""
    half, most = 2 ** (bits - 1), w.abs().amax(1, keepdim=True).clamp(min=1e-12)
    best, least = most, torch.full_like(most, torch.inf)
    for mark in range(1, half + 1) if bits == 4 else (half - 1, half):
        for scale in (sign * most / mark for sign in signs):  # whole numbers reach one further on the negative side
            off = (w - (w / scale).round().clamp(-half, half - 1) * scale).square().sum(1, keepdim=True) / most.square()
            better = off < least - _NOTHING
            best, least = torch.where(better, scale, best), torch.where(better, off, least)
    return best, least


def rewrite(
    graph: str | Path, out: str | Path, bits: int, only: Callable[[onnx.NodeProto], bool] | None = None, rounded: bool = False
) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix, and look-ups in one, have weights of `bits` bits.

    `only` says of a node whether it may; with `rounded`, only where weights lie on a grid of so many bits already. As `save`
    writes it.
    """
    from onnx import helper

    def smaller(node: onnx.NodeProto, weight: Tensor, named: Callable[..., list[str]]) -> onnx.NodeProto | None:
        if (only and not only(node)) or (rounded and not on_grid(weight, bits)):
            return None
        whole, name = {"name": node.name, "domain": "com.microsoft", "bits": bits, "block_size": GROUP}, f"{bits}_groups"
        if node.op_type == "Gather":
            q, scales = named(f"{bits}_rows", lambda: [t.reshape(len(weight), -1) for t in pack(weight, bits)])
            whole |= {"gather_axis": 0, "quantize_axis": 1}
            return helper.make_node("GatherBlockQuantized", [q, node.input[1], scales], list(node.output), **whole)
        whole |= {"K": weight.shape[1], "N": weight.shape[0], "accuracy_level": 4}
        inputs = [node.input[0], *named(name, lambda: pack(weight, bits))]
        return helper.make_node("MatMulNBits", inputs, list(node.output), **whole)

    return _replaced(graph, out, smaller)


def dynamic(graph: str | Path, out: str | Path) -> Path:
    """A copy of `graph` at `out` whose products with a constant matrix are of int8: one scale a channel, activations on the fly.

    What `runtime.dynamic_int8` does by ONNX Runtime's own tool, with one weight in memory at a time instead of several copies of
    all. Weights have 7 bits: without VNNI, sums of two products of 8 bits saturate (notebook 11).
    """
    from onnx import helper

    def smaller(node: onnx.NodeProto, weight: Tensor, named: Callable[..., list[str]]) -> onnx.NodeProto | None:
        if node.op_type == "Gather":
            return None

        def pack() -> tuple[np.ndarray, np.ndarray]:
            scale = weight.abs().amax(1).clamp(min=1e-12) / 63
            return (weight / scale[:, None]).round().to(torch.int8).T.contiguous().numpy(), scale.numpy()

        inputs = [node.input[0], *named("channels", pack)]
        return helper.make_node("DynamicQuantizeMatMul", inputs, list(node.output), name=node.name, domain="com.microsoft")

    return _replaced(graph, out, smaller)


def _replaced(graph: str | Path, out: str | Path, smaller: Callable[..., onnx.NodeProto | None]) -> Path:
    """A copy of `graph` at `out` with the nodes that `smaller` gives for those with a constant matrix (None: left as it is).

    `smaller` gets the node, its weight (out, in) or (rows, width), and a function that stores (numbers, scales) under the
    weight's name with an ending, once, and returns both names. One weight is in memory at a time.
    """
    runtime.needs("onnx")
    import onnx
    from onnx import numpy_helper

    folder = str(Path(graph).parent)
    model = onnx.load(str(graph), load_external_data=False)
    constants = {t.name: t for t in model.graph.initializer}
    added: dict[str, onnx.TensorProto] = {}
    for i, node in enumerate(model.graph.node):
        at = 0 if node.op_type == "Gather" else 1
        if node.op_type not in ("MatMul", "FusedMatMul", "Gather") or node.input[at] not in constants:
            continue
        whole = constants[node.input[at]]
        extra = {a.name: a.f if a.name == "alpha" else a.i for a in node.attribute}
        turned = bool(extra.pop("transB", 0)) if at else False
        # a factor, or an input turned round: these kernels have neither
        plain = at == 0 or (extra.pop("alpha", 1) == 1 and not any(extra.values()))
        if len(whole.dims) != 2 or whole.data_type != onnx.TensorProto.FLOAT or not plain:
            continue
        weight = torch.from_numpy(numpy_helper.to_array(whole, folder).copy())

        def named(ending: str, pack: Callable[[], tuple[np.ndarray, np.ndarray]], name: str = whole.name) -> list[str]:
            names = [f"{name}_{ending}", f"{name}_{ending}_scales"]
            if names[0] not in added:
                added.update({n: numpy_helper.from_array(value, n) for n, value in zip(names, pack(), strict=True)})
            return names

        new = smaller(node, weight.T.contiguous() if at and not turned else weight, named)
        if new is not None:
            new.metadata_props.extend(node.metadata_props)
            model.graph.node[i].CopyFrom(new)
    model.graph.initializer.extend(added.values())
    _drop_unused(model)
    onnx.load_external_data_for_model(model, folder)
    return save(model, out)


def tidy(graph: str | Path) -> None:
    """Take out of the file at `graph` what the exporter noted for people: which line of which file each node came from."""
    import onnx

    model = onnx.load(str(graph))
    for owner in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    save(model, graph)


def save(model: onnx.ModelProto, path: str | Path) -> Path:
    """Write `model` to `path`, its weights to `path` + ".data", from where a runtime maps them instead of copying them."""
    import onnx

    path = Path(path)
    data = path.with_name(path.name + ".data")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".save-") as aside:
        onnx.save(model, f"{aside}/{path.name}", save_as_external_data=True, location=data.name)
        Path(aside, data.name).chmod(Path(aside, path.name).stat().st_mode)  # else nobody but its owner could read it
        Path(aside, data.name).replace(data)
        Path(aside, path.name).replace(path)
    return path


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
