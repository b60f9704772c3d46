"""Weights of 4 or 8 bits in groups of 32 along the inputs, one scale a group, zero in the middle: the layout of ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrecipes.errors import UserError
from mmrecipes.quantize.rounding import best_scale

if TYPE_CHECKING:
    pass

GROUP = 32


def pack(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (out, in) as whole numbers of `bits` bits and scales: (out, groups, 32 * bits / 8) uint8, (out, groups) float32.

    A weight is its number, less 2^(bits - 1), times its group's scale. Weights that lie on a grid already (GPTQ has rounded
    them) keep it exactly; others get the scale of least squared error (`quantize.best_scale`).
    """
    if bits not in (4, 8):
        raise UserError(f"pack: bits={bits}; ONNX Runtime's kernels have 4 and 8")
    half, w = 2 ** (bits - 1), _in_groups(weight)
    scale = group_scales(weight, bits).view(-1, 1)
    q = (w / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    if bits == 4:  # two to a byte, the earlier one in the low half
        q = q[:, ::2] | (q[:, 1::2] << 4)
    return q.view(len(weight), -1, GROUP * bits // 8).numpy(), scale.view(len(weight), -1).numpy()


def group_scales(weight: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> Tensor:
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
