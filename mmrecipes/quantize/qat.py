"""Quantization-aware training of weights in groups of 32: the forward pass computes with levels, the update moves floats.

`prepare_qat_`, train by any loop (`distill.qat` is one), `convert_qat_`. Built by hand in notebook 15.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmrecipes.errors import UserError
from mmrecipes.models.modules import linears, owners, part_of
from mmrecipes.quantize.groups import GROUP, group_scales

PARTS = ("vision", "connector", "language")


def fake_quantize_ste(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`groups.fake_quantize`, bit for bit, with a gradient: a straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).
    To `w` it is 1 inside the range of levels, ends included, and 0 outside; to `scale` that of LSQ (arXiv:1902.08153, eq. 3).
    """
    half = 2 ** (bits - 1)
    level = (w / scale).clamp(-half, half - 1)
    return (level + (level.round() - level).detach()) * scale  # the sum is exact: a whole number, and the rest to it


class FakeQuantizer(nn.Module):
    """A weight (out, in) -> the same on levels of `bits` bits, each 32 inputs with a scale: a parametrization.
    With `learned`, scales learn, too (LSQ), their gradient times 1 / sqrt(32 Q), where Q is the largest positive level.
    """

    def __init__(self, scale: Tensor, bits: int, learned: bool = True):
        super().__init__()
        self.bits = bits
        # 1-D, so that no optimizer of matrices takes them
        self.scale = nn.Parameter(scale.detach().flatten().clone(), requires_grad=learned)

    def forward(self, weight: Tensor) -> Tensor:
        stored = self.scale.bfloat16().float()  # 16 bits, as the bytes are counted; so that levels times scales are exact, too
        if stored.requires_grad:
            slope = 1 / math.sqrt(GROUP * (2 ** (self.bits - 1) - 1))
            stored.register_hook(lambda gradient: gradient * slope)
        return fake_quantize_ste(weight.view(-1, GROUP), stored[:, None], self.bits).view(weight.shape)


@torch.no_grad()
def prepare_qat_(model: nn.Module, bits: int, only: Sequence[str] = PARTS, learned: bool = True) -> nn.Module:
    """Make every linear weight of the parts `only` a float that is used on levels of `bits` bits; all else of these parts learns
    as it is, and other parts are frozen. A weight on levels already (GPTQ's result) starts in the middle between two roundings.
    UserError for inputs that are no multiple of 32.
    """
    owner, part = owners(model), part_of(model)
    for name, p in model.named_parameters():
        p.requires_grad_(part[name] in only)
    for name, layer in [(n, m) for n, m in linears(model) if owner.get(m) in only]:
        if layer.in_features % GROUP:
            raise UserError(f"prepare_qat_: {name} has {layer.in_features} inputs, which do not divide into groups of {GROUP}")
        scale = group_scales(layer.weight, bits)
        parametrize.register_parametrization(layer, "weight", FakeQuantizer(scale, bits, learned))
        layer.parametrizations.weight.use_adamw = True  # Muon's orthogonal updates change many levels for little
    return model


def convert_qat_(model: nn.Module) -> nn.Module:
    """Leave plain weights, on their levels: what the trained model computed with, bit for bit, as `pack` and exports take it."""
    for _, layer in linears(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model
