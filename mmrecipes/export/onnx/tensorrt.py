"""What TensorRT wants of int8 models ("Explicit quantization" in its documentation), and NPUs of all: checked on the graph."""

from collections.abc import Mapping
from pathlib import Path

from mmrecipes.errors import UserError, one_line


def check_explicit_int8(path: str | Path) -> dict[str, int]:
    """Check that an ONNX file is an int8 model as TensorRT takes it: {"quantize", "dequantize", "layers"}, numbers of nodes.
    Raises UserError on the first rule that is broken: Q/DQ pairs only, int8, zero points zero, one scale an activation, one
    scale an output channel of a weight, both inputs of a layer quantized or none, no quantized bias.
    """
    import onnx

    try:
        graph = onnx.load(str(path)).graph
    except Exception as e:
        raise UserError(f"{path}: not an ONNX file ({one_line(e, 80)}); give what `static_int8` wrote") from e
    constants = {t.name: t for t in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    count = {"quantize": 0, "dequantize": 0, "layers": 0}
    for node in graph.node:
        broken = ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            count["quantize" if node.op_type[0] == "Q" else "dequantize"] += 1
            broken = _broken_pair(node, constants)
        elif node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            broken = "is a quantized operator of ONNX Runtime; use the QDQ format"
        elif node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            sources = [maker.get(name) for name in node.input[:2]]
            quantized = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
            count["layers"] += all(quantized)
            if quantized == [False, True] or (quantized == [True, False] and node.input[1] in constants):
                broken = "has one quantized input and one that is not; quantize both or none"
            weight, scale = (constants.get(name) for name in sources[1].input[:2]) if all(quantized) else (None, None)
            if weight is not None and scale is not None:  # else a product of two activations
                turned = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
                channel = 0 if turned else 1
                axis = next((a.i for a in sources[1].attribute if a.name == "axis"), 1)
                if list(scale.dims) != [weight.dims[channel]] or axis != channel:
                    broken = "has a weight without one scale an output channel; quantize with per_channel=True"
        if broken:
            raise UserError(f"{path}: {node.op_type} {node.name!r} {broken}")
    if not count["layers"]:
        raise UserError(f"{path}: no layer has quantized inputs; quantize it first, see `static_int8`")
    return count


def check_static(path: str | Path) -> dict[str, list[int]]:
    """Check that an ONNX file has one shape and standard operators alone, as NPU compilers want it: {input: its shape}.
    Raises UserError on the first input with an open dimension, and on the first operator of another domain than ONNX's.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as e:
        raise UserError(f"{path}: not an ONNX file ({one_line(e, 80)}); give an exported one") from e
    constants, shapes = {t.name for t in graph.initializer}, {}
    for each in graph.input:
        dimensions = each.type.tensor_type.shape.dim
        if each.name not in constants:
            shapes[each.name] = [d.dim_value for d in dimensions]
            if named := [d.dim_param or "unknown" for d in dimensions if not d.HasField("dim_value")]:
                raise UserError(f"{path}: input {each.name!r} has open dimensions ({', '.join(named)}); export one fixed shape")
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise UserError(
                f"{path}: {node.op_type} {node.name!r} is an operator of {node.domain}, not of ONNX; export without it"
            )
    return shapes


def _broken_pair(node, constants: Mapping[str, object]) -> str:
    """Which rule this QuantizeLinear or DequantizeLinear (NodeProto) breaks, and the way out; empty where it breaks none."""
    from onnx import TensorProto, numpy_helper

    source, scale, zero = (constants.get(name) for name in (*node.input, "")[:3])
    to_int8 = node.op_type == "QuantizeLinear"
    if source is not None and not to_int8 and source.data_type != TensorProto.INT8:
        return f"reads {TensorProto.DataType.Name(source.data_type)}; quantize weights to int8 and leave biases in float"
    if source is None and to_int8 and scale is not None and numpy_helper.to_array(scale).size > 1:
        return "has several scales for an activation; give it one"
    if zero is None and to_int8:
        return "has no zero point, which means uint8; give it an int8 zero point of 0"
    if zero is not None and (zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any()):
        return "has a zero point that is not an int8 zero; quantize symmetric (explicit=True)"
    return ""
