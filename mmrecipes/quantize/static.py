"""Static int8 for vision models on images (N, 3, H, W): calibrated, simulated in float or lowered by PT2E (notebooks 12, 17)."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.measure import machine
from mmrecipes.models.modules import clone
from mmrecipes.quantize.calibration import watched
from mmrecipes.quantize.observers import OBSERVERS, Histogram, Observer, fake_quantize_range, histogram
from mmrecipes.quantize.rounding import round_to_nearest

LAYERS = (nn.Conv2d, nn.Linear)


def vision_output(model: nn.Module, images: Tensor) -> Tensor:
    """What a vision model gives out: its logits, or its last hidden state, or the tensor itself."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]


def fold_batch_norms(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy in eval mode, each batch norm that follows a convolution (on a run) made part of it. UserError if outputs move."""
    model = clone(model).eval()
    with torch.inference_mode():
        before = vision_output(model, images)
        pairs = _convolutions_with_norms(model, images)
        for conv, norm in pairs:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
            conv.weight = nn.Parameter(conv.weight * factor[:, None, None, None], requires_grad=False)
            conv.bias = nn.Parameter((bias - norm.running_mean) * factor + norm.bias, requires_grad=False)
        folded = {norm for _, norm in pairs}
        for name in [n for n, m in model.named_modules(remove_duplicate=False) if m in folded]:
            model.set_submodule(name, nn.Identity())
        gap = (vision_output(model, images) - before).norm() / before.norm().clamp(min=1e-12)
    if gap > 1e-3:
        raise UserError(f"fold_batch_norms: outputs moved by {gap:.1e}; a convolution's output is used beside its batch norm")
    return model


def _convolutions_with_norms(model: nn.Module, images: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    outputs, pairs = {}, []  # `outputs` keeps every output alive, so that an id stays one tensor's own

    def see(module: nn.Module, x: Tensor, out: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            outputs[id(out)] = module, out
        elif id(x) in outputs and module.track_running_stats and module.affine:
            pairs.append((outputs[id(x)][0], module))

    with watched({m: m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}, see):
        model(images[:1])
    return pairs


@torch.inference_mode()
def histograms(model: nn.Module, images: Tensor, batch_size: int = 32) -> dict[str, Histogram]:
    """{name: histogram of its inputs over all images} of each convolution and linear layer. UserError without images."""
    if not len(images):
        raise UserError("histograms: no calibration images; give at least one, better 64")
    ends, counted = {}, {}  # {layer's name: (low, high)}, {layer's name: histogram}

    def widen(name: str, x: Tensor, _: Tensor) -> None:
        low, high = ends.get(name, (np.inf, -np.inf))
        ends[name] = min(low, x.min().item()), max(high, x.max().item())

    def count(name: str, x: Tensor, _: Tensor) -> None:
        h, so_far = histogram(x, *ends[name]), counted.get(name)
        counted[name] = h if so_far is None else h._replace(counts=h.counts + so_far.counts)

    layers = {m: n for n, m in model.named_modules() if isinstance(m, LAYERS)}
    for observe in (widen, count):  # one pass finds the ends, one counts
        with watched(layers, observe):
            for batch in images.split(batch_size):
                model(batch)
    return counted


def ranges(by_layer: Mapping[str, Histogram], observer: str | Observer = "percentile") -> dict[str, tuple[float, float]]:
    """A range (low, high) for each layer's input, chosen by an observer or its name in OBSERVERS."""
    observe: Callable = OBSERVERS[observer] if isinstance(observer, str) else observer
    return {name: observe(h) for name, h in by_layer.items()}


def simulate_static(
    model: nn.Module, chosen: Mapping[str, tuple[float, float]], per: str = "channel", symmetric: bool = False
) -> nn.Module:
    """A copy that rounds weights and inputs of the layers `chosen` {name: range} to 8 bits, in float. Fold batch norms first."""
    small = clone(model).eval()
    for name, m in small.named_modules():
        if name in chosen:
            m.weight = nn.Parameter(round_to_nearest(m.weight.detach(), 8, per), requires_grad=False)
            ends = chosen[name]
            m.register_forward_pre_hook(lambda _, args, ends=ends: (fake_quantize_range(args[0], *ends, symmetric), *args[1:]))
    return small


class SingleOutput(nn.Module):
    """Images in, one tensor out: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return vision_output(self.model, images)


def pt2e(model: nn.Module, images: Tensor, batch_size: int = 32, reduce_range: bool | None = None) -> nn.Module:
    """`model` exported with quantize and dequantize operators (uint8 activations, int8 weights), for torch.compile on x86.
    `reduce_range` leaves a bit of the activations free, as CPUs without VNNI need; None looks at this CPU.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain = SingleOutput(clone(model)).eval()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=saturates() if reduce_range is None else reduce_range)
    shapes = ({0: torch.export.Dim("images", min=1, max=4096)},)
    with torch.no_grad():
        graph = torch.export.export(plain, (images[[0, 0]],), dynamic_shapes=shapes).module()  # one would be a constant
        prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
        for batch in images.split(batch_size):
            prepared(batch)
        return convert_pt2e(prepared)


def saturates() -> bool:
    """Whether this CPU's sums of 8-bit products overflow: x86 without VNNI adds two of them in 16 bits."""
    has = machine.environment()["capabilities"]
    return "sse4_2" in has and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(has)
