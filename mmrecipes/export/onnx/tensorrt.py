"""Static int8: the range of every activation is chosen beforehand, from pictures, so that a model can run on whole numbers.

Built by hand in notebook 12. An observer (`minmax`, `percentile`, `entropy`, `mse`) chooses a range from the `Histogram` of what
flows into a layer, `marks` turns it into a scale and a zero point. `simulate` shows the accuracy; `pt2e` and `qdq` make models
for runtimes. Pictures are pixel tensors (N, 3, H, W), as the image processor gives them.
"""

from __future__ import annotations

from pathlib import Path

from mmrecipes.errors import UserError, one_line


def check_explicit_int8(path: str | Path) -> dict[str, int]:
    """Check that an ONNX file is an int8 model as TensorRT takes it, on the graph alone: {"quantize", "dequantize", "layers"}.

    Raises UserError on the first rule that is broken: Q/DQ pairs only, int8, zero points zero, one scale an activation, one
    scale an output channel of a weight, both inputs of a layer quantized or none, no quantized bias (TensorRT documentation,
    "Explicit quantization").
    """
    import onnx as files
    from onnx import TensorProto, numpy_helper

    try:
        graph = files.load(str(path)).graph
    except Exception as e:
        raise UserError(f"{path}: not an ONNX file ({one_line(e, 80)}); give what `qdq` wrote") from e
    constant = {t.name: t for t in graph.initializer}
    maker = {o: n for n in graph.node for o in n.output}
    count = {"quantize": 0, "dequantize": 0, "layers": 0}

    def refuse(node, why: str, cure: str) -> None:
        raise UserError(f"{path}: {node.op_type} {node.name!r} {why}; {cure}")

    def axis(node) -> int:
        return next((a.i for a in node.attribute if a.name == "axis"), 1)

    for n in graph.node:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            count["quantize" if n.op_type[0] == "Q" else "dequantize"] += 1
            zero = constant.get(n.input[2]) if len(n.input) > 2 and n.input[2] else None
            source, scale = constant.get(n.input[0]), constant.get(n.input[1])
            if source is not None and n.op_type[0] == "D" and source.data_type != TensorProto.INT8:
                kind = TensorProto.DataType.Name(source.data_type)
                refuse(n, f"reads {kind}", "quantize weights to int8 and leave biases in float")
            if source is None and n.op_type[0] == "Q" and scale is not None and numpy_helper.to_array(scale).size > 1:
                refuse(n, "has several scales for an activation", "give it one")
            if zero is None and n.op_type[0] == "Q":
                refuse(n, "has no zero point, which means uint8", "give it an int8 zero point of 0")
            if zero is not None and (zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any()):
                refuse(n, "has a zero point that is not an int8 zero", "quantize symmetric (explicit=True)")
        elif n.op_type.startswith("QLinear") or n.op_type.endswith("Integer"):
            refuse(n, "is a quantized operator of ONNX Runtime", "use the QDQ format")
        elif n.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            x, w = (maker.get(i) for i in n.input[:2])
            quantized = [m is not None and m.op_type == "DequantizeLinear" for m in (x, w)]
            if quantized == [False, True] or (quantized == [True, False] and n.input[1] in constant):
                refuse(n, "has one quantized input and one that is not", "quantize both or none")
            if not all(quantized):
                continue
            count["layers"] += 1
            weight, scale = constant.get(w.input[0]), constant.get(w.input[1])
            if weight is None or scale is None:
                continue  # a product of two activations
            transposed = any(a.name == "transB" and a.i for a in n.attribute)
            out = 0 if n.op_type == "Conv" or transposed else 1
            if list(scale.dims) != [weight.dims[out]] or axis(w) != out:
                refuse(n, "has a weight without one scale an output channel", "quantize with per_channel=True")
    if not count["layers"]:
        raise UserError(f"{path}: no layer has quantized inputs; quantize it first, see `qdq`")
    return count
