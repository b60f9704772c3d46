"""Static int8 for vision models: batch norms folded, activation ranges calibrated, simulated in float or lowered by PT2E.

Built by hand in notebook 12. Images are pixel tensors (N, 3, H, W), as the image processor gives them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.measure import machine
from mmrecipes.models import modules
from mmrecipes.quantize import rounding
from mmrecipes.quantize.observers import OBSERVERS, Histogram, fake_quantize_range, histogram

LAYERS = (nn.Conv2d, nn.Linear)


# ---- a model: folding, calibration, simulation


def vision_output(model: nn.Module, pictures: Tensor) -> Tensor:
    """What a vision model gives out: its logits, or its last hidden state, or the tensor itself."""
    found = model(pictures)
    return found if isinstance(found, Tensor) else found.logits if hasattr(found, "logits") else found[0]


def fold_batch_norms(model: nn.Module, pictures: Tensor) -> nn.Module:
    """A copy in eval mode in which every batch norm that follows a convolution has become part of it.

    A batch norm at rest is a factor and an offset a channel, and so can be multiplied into the weights. Which one follows
    which is seen on one run, not guessed from names. Raises UserError when the copy no longer computes the same.
    """
    model = modules.clone(model).eval()
    with torch.inference_mode():
        before = vision_output(model, pictures)
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
        gap = (vision_output(model, pictures) - before).norm() / before.norm().clamp(min=1e-12)
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


def simulate_static(
    model: nn.Module, chosen: dict[str, tuple[float, float]], per: str = "channel", symmetric: bool = False
) -> nn.Module:
    """A copy that rounds weights (one scale a `channel`, or a `tensor`) and the inputs of its layers to 8 bits, in float.

    Fold the batch norms first: nothing between layers is rounded, so a batch norm would stay in floating point.
    """
    small = modules.clone(model).eval()
    for name, m in small.named_modules():
        if name in chosen:
            m.weight = nn.Parameter(rounding.round_to_nearest(m.weight.detach(), 8, per), requires_grad=False)
            m.register_forward_pre_hook(
                lambda _, args, ends=chosen[name]: (fake_quantize_range(args[0], *ends, symmetric), *args[1:])
            )
    return small


# ---- the same for runtimes: PT2E for torch.compile, QDQ for ONNX Runtime and TensorRT


class SingleOutput(nn.Module):
    """Pictures in, one tensor out: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return vision_output(self.model, pictures)


def pt2e(model: nn.Module, pictures: Tensor, batch: int = 32, reduce_range: bool | None = None) -> nn.Module:
    """`model` with quantize and dequantize operators in its exported graph: slow in eager mode, int8 kernels once compiled.

    torchao's X86InductorQuantizer: uint8 activations by histogram, int8 weights a channel. `reduce_range` leaves a bit of the
    activations free, as CPUs without VNNI need; None looks at this CPU.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain = SingleOutput(modules.clone(model)).eval()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=saturates() if reduce_range is None else reduce_range)
    shapes = ({0: torch.export.Dim("pictures", min=1, max=4096)},)
    with torch.no_grad():
        graph = torch.export.export(plain, (batch_of_two(pictures),), dynamic_shapes=shapes).module()
        prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
        for part in pictures.split(batch):
            prepared(part)
        return convert_pt2e(prepared)


def batch_of_two(pictures: Tensor) -> Tensor:
    """A batch of two: exporters take a batch of one for a constant."""
    return torch.cat([pictures[:1]] * 2)


def saturates() -> bool:
    """Whether this CPU's sums of 8-bit products overflow: x86 without VNNI adds two of them in 16 bits."""
    has = machine.environment()["capabilities"]
    return "sse4_2" in has and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(has)
