"""Int8 ONNX graphs by ONNX Runtime's own quantizers, with ranges of activations found on the fly or fixed on calibration data."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from mmrecipes.errors import UserError, one_line, require
from mmrecipes.export.onnx.graphs import MAX_BYTES, nodes_of_modules, to_onnx
from mmrecipes.interrupt import temporary_directory
from mmrecipes.models import modules
from mmrecipes.models.saving import written_aside
from mmrecipes.quantize.static import SingleOutput, saturates
from mmrecipes.quiet import library_logs

PRODUCTS = ["MatMul", "Gemm"]
LAYERS = {"products": PRODUCTS, "convolutions": ["Conv"], "all": None}


def vision_to_onnx(model: nn.Module, images: Tensor, out: str | Path) -> Path:
    """Write a vision model (`images` (N, 3, H, W) to logits or hidden states) as a float32 graph, the batch left open."""
    plain = SingleOutput(modules.clone(model))
    return to_onnx(plain, {"images": images[[0, 0]]}, out, {"images": {0: "batch"}})  # of one image the batch would be a constant


def dynamic_int8(
    graph: str | Path, out: str | Path, weights: str = "uint8", reduce_range: bool = False, keep: Sequence[str] = ()
) -> Path:
    """A copy of `graph` at `out` with int8 matrix products: weights ahead, one scale a channel, activations on the fly.
    Activations are 8 bits unsigned, one scale a tensor. Weights: "uint8" is exact everywhere; "int8" is quicker with VNNI, but
    without it (AVX2) its products saturate, unless `reduce_range` leaves the weights 7 bits (ONNX Runtime, "Quantize ONNX
    models"). Products of two activations stay in float32, and layers of which a name in `keep` is part, say ("down_proj",).
    """
    require("onnxruntime", "onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    if weights not in kinds:
        raise UserError(f"dynamic_int8: weights={weights!r}; expected one of {', '.join(kinds)}")
    with prepared(graph) as ready, library_logs(), written_aside(out) as aside:
        options = {"per_channel": True, "reduce_range": reduce_range, "weight_type": kinds[weights]}
        quantize_dynamic(ready, aside, PRODUCTS, nodes_to_exclude=nodes_of_modules(graph, keep), **options)
    return Path(out)


@dataclass(frozen=True)
class StaticConfig:
    """How `static_int8` rounds: which `layers` (of LAYERS), but none of modules of which a name in `keep` is part.
    Weights are symmetric int8, one scale a channel; with `reduce_range` 7 bits, so that sums of two products do not saturate
    without VNNI (None: where this CPU needs it). Activations are affine uint8, one range a tensor, which `method` (MinMax,
    Entropy, Percentile or Distribution) chooses, and biases int32: as ONNX Runtime's CPU kernels want it. With `explicit`, as
    TensorRT wants it: symmetric int8 without zero points, weights of 8 bits, biases in float.
    """

    method: str = "MinMax"
    layers: str = "products"
    explicit: bool = False
    reduce_range: bool | None = None
    keep: tuple[str, ...] = ()


def static_int8(
    graph: str | Path, feeds: Sequence[Tensor | Mapping[str, np.ndarray]], out: str | Path, config: StaticConfig | None = None
) -> Path:
    """A copy of `graph` at `out` with quantize-dequantize pairs (QDQ), whose activation ranges were fixed on `feeds` beforehand.
    `feeds` are batches, all of one shape except for MinMax: tensors for the first input, or arrays by the inputs' names.
    """
    require("onnxruntime", "onnx")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    config = config or StaticConfig()
    if not len(feeds):
        raise UserError("static_int8: no calibration feeds; give some of the graph's inputs, or use dynamic_int8")
    if config.method not in CalibrationMethod.__members__:
        raise UserError(f"static_int8: method={config.method!r}; expected one of {', '.join(CalibrationMethod.__members__)}")
    extra = {"ActivationSymmetric": config.explicit, "WeightSymmetric": True, "QuantizeBias": not config.explicit}
    if config.layers == "products":
        extra |= {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": PRODUCTS}
    with prepared(graph) as ready, library_logs(), written_aside(out) as aside:
        name = onnx.load(ready, load_external_data=False).graph.input[0].name
        batches = iter(feed if isinstance(feed, Mapping) else {name: feed.numpy()} for feed in feeds)

        class Reader(CalibrationDataReader):
            def get_next(self):
                return next(batches, None)

        types = {"activation_type": QuantType.QInt8 if config.explicit else QuantType.QUInt8, "weight_type": QuantType.QInt8}
        nodes = {"op_types_to_quantize": LAYERS[config.layers], "nodes_to_exclude": nodes_of_modules(graph, config.keep)}
        reduce_range = saturates() if config.reduce_range is None else config.reduce_range
        how = {"calibrate_method": CalibrationMethod[config.method], "reduce_range": reduce_range and not config.explicit}
        quantize_static(ready, aside, Reader(), QuantFormat.QDQ, per_channel=True, extra_options=extra, **types, **nodes, **how)
    return Path(out)


@contextlib.contextmanager
def prepared(graph: str | Path) -> Iterator[str]:
    """The graph with constants folded and shapes inferred, as the quantizer wants it, in a file that does not stay."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not Path(graph).is_file():
        raise UserError(f"no graph at {graph}; make it with export.onnx.to_onnx")
    with temporary_directory() as folder, library_logs():
        try:
            model = onnx.load(str(graph))
        except Exception as e:  # whatever a file that is none makes the parser raise
            raise UserError(f"{graph}: not an ONNX file ({one_line(e, 80)}); export it again") from e
        if (size := model.ByteSize()) > MAX_BYTES:
            raise UserError(f"{graph}: {size / 1e9:.1f} GB of weights; ONNX Runtime's quantizer takes 2 GB: use int8")
        bare, ready = f"{folder}/bare.onnx", f"{folder}/ready.onnx"
        weights = {t.name for t in model.graph.initializer}
        # the exporter notes the shapes of weights, too; the pre-processing turns weights of Gemm round and forgets these notes
        shapes = [v for v in model.graph.value_info if v.name not in weights]
        del model.graph.value_info[:]
        model.graph.value_info.extend(shapes)
        onnx.save(model, bare)
        del model, shapes  # of a large model each copy counts
        quant_pre_process(bare, ready, skip_symbolic_shape=True)
        yield ready
