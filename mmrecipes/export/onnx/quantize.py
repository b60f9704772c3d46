"""One checkpoint in ONNX Runtime: an Idefics3-class VLM as two graphs, int8 with or without calibration, and back into the model.

Notebook 11 uses it. The graphs are `vision.onnx` (pixels to visual tokens, connector included) and `language.onnx` (embeddings
to last hidden states, without a KV cache); word embeddings, the head and `generate` stay in PyTorch.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes import quiet
from mmrecipes.errors import UserError, one_line, require
from mmrecipes.export.onnx import graphs
from mmrecipes.export.onnx.graphs import nodes_of_modules
from mmrecipes.models import modules, saving
from mmrecipes.models.saving import written_aside
from mmrecipes.quantize.static import SingleOutput, batch_of_two, saturates
from mmrecipes.quiet import library_logs

# ---- int8


def dynamic_int8(
    graph: str | Path, out: str | Path, weights: str = "uint8", reduce_range: bool = False, keep: Sequence[str] = ()
) -> Path:
    """A copy of `graph` at `out` with int8 matrix products: weights ahead, one scale a channel, activations on the fly.

    Activations are 8 bits unsigned, one scale a tensor. Weights: "uint8" is exact everywhere; "int8" is quicker with VNNI, but
    without it (AVX2) its products saturate, unless `reduce_range` leaves the weights 7 bits. After ONNX Runtime's page
    "Quantize ONNX models". Products of two activations (attention) stay in float32, and so do the layers of which a name in
    `keep` is part, say ("down_proj",): the way out where a few activations are far larger than the rest.
    """
    require("onnxruntime", "onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind = _kind(weights)
    with prepared(graph) as ready, library_logs(), written_aside(out) as aside:
        quantize_dynamic(
            ready,
            aside,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType[kind],
            nodes_to_exclude=nodes_of_modules(graph, keep),
        )
    return Path(out)


def static_int8(
    graph: str | Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
    out: str | Path,
    method: str = "MinMax",
    reduce_range: bool = True,
    keep: Sequence[str] = (),
) -> Path:
    """A copy of `graph` at `out` with int8 matrix products whose activation ranges were fixed on `feeds` beforehand.

    QuantizeLinear and DequantizeLinear pairs (QDQ); weights symmetric int8, one scale a channel, of 7 bits with `reduce_range`
    (see `dynamic_int8`, also for `keep`); activations uint8, one range a tensor. `feeds` are the graph's inputs by name, one
    entry a batch, all of one shape except for MinMax; `method` is MinMax, Entropy, Percentile or Distribution.
    """
    require("onnxruntime", "onnx")
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not feeds:
        raise UserError("static_int8: no calibration feeds; give some of the graph's inputs, or use dynamic_int8")
    if method not in CalibrationMethod.__members__:
        raise UserError(f"static_int8: method={method!r}; expected one of {', '.join(CalibrationMethod.__members__)}")

    class Reader(CalibrationDataReader):
        rest = iter(feeds)

        def get_next(self):
            return next(self.rest, None)

    with prepared(graph) as ready, library_logs(), written_aside(out) as aside:
        quantize_static(
            ready,
            aside,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            nodes_to_exclude=nodes_of_modules(graph, keep),
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    return Path(out)


def _kind(weights: str) -> str:
    kinds = {"uint8": "QUInt8", "int8": "QInt8"}
    if weights not in kinds:
        raise UserError(f"dynamic_int8: weights={weights!r}; expected one of {', '.join(kinds)}")
    return kinds[weights]


@contextlib.contextmanager
def prepared(graph: str | Path) -> Iterator[str]:
    """The graph with constants folded and shapes inferred, as the quantizer wants it, in a file that does not stay."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not Path(graph).is_file():
        raise UserError(f"no graph at {graph}; make it with onnx.attached.export_parts")
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder, library_logs():
        try:
            whole = onnx.load(str(graph))
        except Exception as e:  # whatever a file that is none makes the parser raise
            raise UserError(f"{graph}: not an ONNX file ({one_line(e, 80)}); export it again") from e
        bare, ready = f"{folder}/bare.onnx", f"{folder}/ready.onnx"
        weights = {t.name for t in whole.graph.initializer}
        # the exporter notes the shapes of weights, too; the pre-processing turns weights of Gemm round and forgets these notes
        shapes = [v for v in whole.graph.value_info if v.name not in weights]
        del whole.graph.value_info[:]
        whole.graph.value_info.extend(shapes)
        onnx.save(whole, bare)
        del whole, shapes  # of a large model each copy counts
        quant_pre_process(bare, ready, skip_symbolic_shape=True)
        yield ready


def vision_to_onnx(model: nn.Module, pictures: Tensor, out: str | Path) -> Path:
    """Write `model` as a float32 ONNX file with the batch left open. Returns `out`."""
    plain = SingleOutput(modules.clone(model)).eval()
    with saving.written_aside(out) as part, quiet.library_logs():
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(
            plain, (batch_of_two(pictures),), dynamic_shapes=shapes, input_names=["pictures"], verbose=False
        )
        program.save(part)
    return Path(out)


def qdq(
    model: nn.Module | Path,
    pictures: Tensor,
    out: str | Path,
    method: str = "MinMax",
    explicit: bool = True,
    batch: int = 32,
    keep: Sequence[str] = (),
) -> Path:
    """Write `model`, or the float32 file that `onnx` made of it, as an int8 ONNX file with quantize-dequantize pairs.

    By ONNX Runtime's `quantize_static`; `method` is MinMax, Entropy or Percentile. With `explicit`, as TensorRT wants it:
    symmetric int8 without zero points, biases in float; on a CPU without VNNI its 8-bit weights saturate. Else as ONNX
    Runtime's CPU kernels want it: affine uint8 activations, int32 biases, and weights in 7 bits where 8-bit sums would
    overflow. With `keep`, names in the paths of modules, only convolutions are quantized, and none of those modules: maps
    between them stay in float. Returns `out`.
    """
    import onnx as files
    from onnxruntime import quantization as ort

    if method not in ("MinMax", "Entropy", "Percentile"):
        raise UserError(f"qdq: method={method!r}; expected MinMax, Entropy or Percentile")

    with contextlib.ExitStack() as stack:
        floats = model
        if isinstance(model, nn.Module):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmrecipes-"))
            floats = vision_to_onnx(model, pictures, Path(folder, "float.onnx"))
        ready = stack.enter_context(prepared(floats))  # which also folds what is left of batch norms
        part = stack.enter_context(saving.written_aside(out))
        stack.enter_context(quiet.library_logs())
        name = files.load(ready).graph.input[0].name
        feeds = ({name: some.numpy()} for some in pictures.split(batch))

        class Reader(ort.CalibrationDataReader):
            def get_next(self):
                return next(feeds, None)

        ort.quantize_static(
            ready,
            str(part),
            Reader(),
            per_channel=True,
            reduce_range=not explicit and saturates(),
            activation_type=ort.QuantType.QInt8 if explicit else ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[method],
            op_types_to_quantize=["Conv"] if keep else None,
            nodes_to_exclude=graphs.nodes_of_modules(floats, keep),
            extra_options={"ActivationSymmetric": explicit, "WeightSymmetric": True, "QuantizeBias": not explicit},
        )
    return Path(out)
