"""Static int8: the range of every activation is chosen beforehand, from pictures, so that a model can run on whole numbers.

Built by hand in notebook 12. An observer (`minmax`, `percentile`, `entropy`, `mse`) chooses a range from the `Histogram` of what
flows into a layer, `marks` turns it into a scale and a zero point. `simulate` shows the accuracy; `pt2e` and `qdq` make models
for runtimes. Pictures are pixel tensors (N, 3, H, W), as the image processor gives them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes import measure, quantize, runtime
from mmrecipes.errors import UserError, one_line

BINS = 4095  # odd, so that zero, the commonest value after a ReLU, has a bin to itself
LEVELS = 128  # whole numbers of int8 on one side of zero
LAYERS = (nn.Conv2d, nn.Linear)


class Histogram(NamedTuple):
    """How often which value flowed: `counts` (BINS,) over [-m, m], m the largest magnitude; the smallest and largest value."""

    counts: np.ndarray
    low: float
    high: float

    @property
    def centres(self) -> np.ndarray:
        m = max(-self.low, self.high)
        return np.linspace(-m, m, len(self.counts)) * (1 - 1 / len(self.counts))


def histogram(values: Tensor, low: float | None = None, high: float | None = None) -> Histogram:
    """The histogram of a tensor, over its own range or a wider one. Raises UserError when values are not finite, or none."""
    if not values.numel() or not torch.isfinite(values).all():
        raise UserError("histogram: the values are none, or not all finite; mend the model or the pictures first")
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    m = max(-low, high) or 1.0
    return Histogram(torch.histc(values.float(), BINS, -m, m).double().numpy(), low, high)


# ---- observers: from a histogram to a range


def minmax(h: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return h.low, h.high


def percentile(h: Histogram, keep: float = 99.99) -> tuple[float, float]:
    """The range that holds `keep` percent of the values, as many cut off at one end as at the other."""
    share, cut = h.counts.cumsum() / h.counts.sum(), (1 - keep / 100) / 2
    low, high = h.centres[share.searchsorted(cut)], h.centres[min(share.searchsorted(1 - cut), len(share) - 1)]
    low = max(h.low, float(low))
    return low, max(low, min(h.high, float(high)))


def mse(h: Histogram, symmetric: bool = False) -> tuple[float, float]:
    """The range with the least mean squared error after rounding to 8 bits: each end is drawn in as far as that helps."""

    def error(low: float, high: float) -> float:
        scale, zero, least, most = marks(low, high, symmetric)
        q = (np.round(h.centres / scale) + zero).clip(least, most)
        return float((h.counts * (h.centres - scale * (q - zero)) ** 2).sum())

    low, high = bottom, top = min(h.low, 0.0), max(h.high, 0.0)
    for _ in range(2):  # the ends hardly depend on each other: twice around is enough
        high = min((top * r for r in np.linspace(0.02, 1, 99)), key=lambda end: error(low, end))
        low = min((bottom * r for r in np.linspace(0.02, 1, 99)), key=lambda end: error(end, high))
    return float(low), float(high)


def entropy(h: Histogram, step: int = 8) -> tuple[float, float]:
    """The range whose 128 levels tell most of the distribution of magnitudes: least Kullback-Leibler divergence.

    As TensorRT's calibrator does it (Migacz, "8-bit inference with TensorRT", GTC 2017). It wants smooth distributions: where
    single values are very common, as with flat backgrounds, it clips far too much (notebook 12).
    """
    middle = len(h.counts) // 2
    size = h.counts[middle:].copy()  # magnitudes, zero first
    size[1:] += h.counts[:middle][::-1]
    size[0] = size[1]  # zero is exact whatever the range: it has no say, or its many would decide alone
    if not size.any():  # nothing but zeros
        return minmax(h)
    ends, found = range(LEVELS, len(size) + 1, step), []
    for end in ends:
        seen = size[:end]
        wanted = seen.copy()
        wanted[-1] += size[end:].sum()  # clipped to the last bin
        starts = np.arange(LEVELS) * end // LEVELS
        alive = (seen > 0).astype(float)
        mean = np.add.reduceat(seen, starts) / np.maximum(np.add.reduceat(alive, starts), 1)
        told = np.repeat(mean, np.diff(np.append(starts, end))) * alive
        p, q = wanted / wanted.sum(), np.maximum(told / max(told.sum(), 1), 1e-9)
        found.append((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    m = max(-h.low, h.high) * (ends[int(np.argmin(found))] / ends[-1])
    return max(h.low, -m), min(h.high, m)


OBSERVERS: dict[str, Callable[[Histogram], tuple[float, float]]] = {
    "min-max": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "MSE": mse,
}


def marks(low: float, high: float, symmetric: bool = False) -> tuple[float, int, int, int]:
    """Scale, zero point, least and most whole number of 8 bits for values in [low, high]; zero itself stays exact."""
    if not np.isfinite([low, high]).all() or low > high:
        raise UserError(f"marks: the range [{low}, {high}] is not one; expected two finite numbers in order")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return float(max(-low, high) / 127 or 1.0), 0, -127, 127
    scale = float((high - low) / 255 or 1.0)
    return scale, round(-low / scale), 0, 255


def rounded(x: Tensor, low: float, high: float, symmetric: bool = False) -> Tensor:
    """`x` moved to the marks of [low, high], in floating point."""
    scale, zero, least, most = marks(low, high, symmetric)
    return torch.fake_quantize_per_tensor_affine(x, max(scale, torch.finfo(x.dtype).tiny), zero, least, most)


# ---- a model: folding, calibration, simulation


def output(model: nn.Module, pictures: Tensor) -> Tensor:
    """What a vision model gives out: its logits, or its last hidden state, or the tensor itself."""
    found = model(pictures)
    return found if isinstance(found, Tensor) else found.logits if hasattr(found, "logits") else found[0]


def fold_batch_norms(model: nn.Module, pictures: Tensor) -> nn.Module:
    """A copy in eval mode in which every batch norm that follows a convolution has become part of it.

    A batch norm at rest is a factor and an offset a channel, and so can be multiplied into the weights. Which one follows
    which is seen on one run, not guessed from names. Raises UserError when the copy no longer computes the same.
    """
    model = quantize.clone(model).eval()
    with torch.inference_mode():
        before = output(model, pictures)
        pairs = _followers(model, pictures)
        for conv, norm in pairs:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
            conv.weight = nn.Parameter(conv.weight * factor[:, None, None, None], requires_grad=False)
            conv.bias = nn.Parameter((bias - norm.running_mean) * factor + norm.bias, requires_grad=False)
        folded = {norm for _, norm in pairs}
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child in folded:
                    setattr(parent, name, nn.Identity())
        gap = (output(model, pictures) - before).norm() / before.norm().clamp(min=1e-12)
    if gap > 1e-3:
        raise UserError(f"fold_batch_norms: outputs moved by {gap:.1e}; a convolution's output is used beside its batch norm")
    return model


def _followers(model: nn.Module, pictures: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    made, pairs, hooks = {}, [], []  # `made` keeps every output alive, so that an id stays one tensor's own

    def after(conv, _, out):
        made[id(out)] = conv, out

    def before(norm, args):
        if id(args[0]) in made:
            pairs.append((made[id(args[0])][0], norm))

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            hooks.append(m.register_forward_hook(after))
        elif isinstance(m, nn.BatchNorm2d) and m.track_running_stats and m.affine:
            hooks.append(m.register_forward_pre_hook(before))
    try:
        model(pictures[:1])
    finally:
        for h in hooks:
            h.remove()
    return pairs


@contextlib.contextmanager
def _inputs_to(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: see(n, args[0])) for n, m in layers]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


@torch.inference_mode()
def histograms(model: nn.Module, pictures: Tensor, batch: int = 32) -> dict[str, Histogram]:
    """For each convolution and linear layer of `model`, the histogram of its inputs over all pictures.

    Two passes: one finds the ends, one counts. Raises UserError when something is not finite, or no pictures are given.
    """
    if not len(pictures):
        raise UserError("histograms: no calibration pictures; give at least one, better 64")
    ends: dict[str, tuple[float, float]] = {}
    counted: dict[str, Histogram] = {}

    def widen(name: str, x: Tensor) -> None:
        low, high = ends.get(name, (np.inf, -np.inf))
        ends[name] = min(low, x.min().item()), max(high, x.max().item())

    def count(name: str, x: Tensor) -> None:
        h, so_far = histogram(x, *ends[name]), counted.get(name)
        counted[name] = h if so_far is None else h._replace(counts=h.counts + so_far.counts)

    for see in (widen, count):
        with _inputs_to(model, see):
            for part in pictures.split(batch):
                model(part)
    return counted


def ranges(found: dict[str, Histogram], observer: str | Callable = "percentile") -> dict[str, tuple[float, float]]:
    """A range for each layer's input, chosen by an observer or its name in OBSERVERS."""
    choose = OBSERVERS[observer] if isinstance(observer, str) else observer
    return {name: choose(h) for name, h in found.items()}


def simulate(
    model: nn.Module, chosen: dict[str, tuple[float, float]], per: str = "channel", symmetric: bool = False
) -> nn.Module:
    """A copy that rounds weights (one scale a `channel`, or a `tensor`) and the inputs of its layers to 8 bits, in float.

    Fold the batch norms first: nothing between layers is rounded, so a batch norm would stay in floating point.
    """
    small = quantize.clone(model).eval()
    for name, m in small.named_modules():
        if name in chosen:
            m.weight = nn.Parameter(quantize.round_to_nearest(m.weight.detach(), 8, per), requires_grad=False)
            m.register_forward_pre_hook(lambda _, args, ends=chosen[name]: (rounded(args[0], *ends, symmetric), *args[1:]))
    return small


# ---- the same for runtimes: PT2E for torch.compile, QDQ for ONNX Runtime and TensorRT


class Plain(nn.Module):
    """Pictures in, one tensor out: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return output(self.model, pictures)


def pt2e(model: nn.Module, pictures: Tensor, batch: int = 32, reduce_range: bool | None = None) -> nn.Module:
    """`model` with quantize and dequantize operators in its exported graph: slow in eager mode, int8 kernels once compiled.

    torchao's X86InductorQuantizer: uint8 activations by histogram, int8 weights a channel. `reduce_range` leaves a bit of the
    activations free, as CPUs without VNNI need; None looks at this CPU.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain = Plain(quantize.clone(model)).eval()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=saturates() if reduce_range is None else reduce_range)
    shapes = ({0: torch.export.Dim("pictures", min=1, max=4096)},)
    with torch.no_grad():
        graph = torch.export.export(plain, (_two(pictures),), dynamic_shapes=shapes).module()
        prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
        for part in pictures.split(batch):
            prepared(part)
        return convert_pt2e(prepared)


def _two(pictures: Tensor) -> Tensor:
    """A batch of two: exporters take a batch of one for a constant."""
    return torch.cat([pictures[:1]] * 2)


def saturates() -> bool:
    """Whether this CPU's sums of 8-bit products overflow: x86 without VNNI adds two of them in 16 bits."""
    has = measure.environment()["capabilities"]
    return "sse4_2" in has and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(has)


def onnx(model: nn.Module, pictures: Tensor, out: str | Path) -> Path:
    """Write `model` as a float32 ONNX file with the batch left open. Returns `out`."""
    plain = Plain(quantize.clone(model)).eval()
    with runtime.written(out) as part, runtime.quiet():
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(plain, (_two(pictures),), dynamic_shapes=shapes, input_names=["pictures"], verbose=False)
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
            floats = onnx(model, pictures, Path(folder, "float.onnx"))
        ready = stack.enter_context(runtime.prepared(floats))  # which also folds what is left of batch norms
        part = stack.enter_context(runtime.written(out))
        stack.enter_context(runtime.quiet())
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
            nodes_to_exclude=runtime.nodes(floats, keep),
            extra_options={"ActivationSymmetric": explicit, "WeightSymmetric": True, "QuantizeBias": not explicit},
        )
    return Path(out)


def session(path: str | Path, threads: int | None = None, as_written: bool = False) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX file on the CPU: pictures in, its first output out.

    With `as_written`, without this CPU's int8 kernels: each quantize and dequantize as the file says, products in float. Slow,
    and what the file means; kernels that saturate (see `saturates`) may give something else.
    """
    import onnxruntime as ort

    options = runtime.session_options(threads or torch.get_num_threads())
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        run = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's own kinds, without a common parent
        raise UserError(f"{path}: ONNX Runtime cannot load it ({one_line(e)}); export it again") from e
    name = run.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(run.run(None, {name: pictures.numpy()})[0])


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
