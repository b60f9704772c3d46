"""Groups of weights that share a symmetric scale: that of least error, rounding on it, and packing to 2, 4 or 8 bits."""

import numpy as np
import torch
from torch import Tensor

from mmrecipes.errors import UserError

GROUP = 32  # inputs that share a scale in the kernels of ONNX Runtime, OpenVINO and ExecuTorch
CLIPPING_RATIOS = torch.linspace(0.35, 1.0, 14)  # where the last level may lie, as a fraction of the largest weight
AT_ONCE = 2**18  # weights worked on together, which stay in the CPU's cache: seven times as fast as all of a large matrix
_NOTHING = 1e-10  # of a group's squared largest weight: an error that comes from float32 alone


def grouped(weight: Tensor, group_size: int | None = None) -> Tensor:
    """`weight` (out, in) as (groups, group_size); None: one group a channel. UserError unless that divides and all is finite."""
    rows = weight.reshape(len(weight), -1)  # a convolution's kernel counts as inputs
    if group_size and rows.shape[1] % group_size:
        raise UserError(f"{rows.shape[1]} inputs do not divide into groups of {group_size}; choose a divisor or None (channels)")
    if not torch.isfinite(weight).all():
        raise UserError("the weight has entries that are not finite; mend the model first")
    return rows.reshape(-1, group_size or rows.shape[1])


def fake_quantize(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`w` on the nearest quantization level, in floating point: whole multiples -2^(bits-1) ... 2^(bits-1) - 1 of `scale`."""
    half = 2 ** (bits - 1)
    return (w / scale).round().clamp(-half, half - 1) * scale


def best_scale(rows: Tensor, bits: int, importance: Tensor | None = None, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """The scale (N, 1) of each of `rows` (N, G) with the least squared error, weighted by `importance` (G,) or (N, G).
    Tries clipping ratios and both signs: levels reach one further on the negative side. UserError for fewer than 2 bits.
    """
    if bits < 2:
        raise UserError(f"{bits} bits; expected 2 or more: one bit has no level beside zero")
    if len(pieces := _pieces(rows)) > 1:
        weights = [importance] * len(pieces) if importance is None or importance.ndim == 1 else _pieces(importance)
        return torch.cat([best_scale(piece, bits, w, signs) for piece, w in zip(pieces, weights, strict=True)])
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    importance = torch.ones_like(rows[0]) if importance is None else importance
    best, least = largest, torch.full_like(largest, torch.inf)
    for ratio in CLIPPING_RATIOS.tolist():
        for scale in (sign * ratio * largest for sign in signs):
            error = ((rows - fake_quantize(rows, scale, bits)).square() * importance).sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def pack(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`weight` (out, in) as unsigned integers and scales: (out, groups, 32 * bits / 8) uint8, (out, groups) float32.
    ONNX Runtime's layout: a weight is its integer, less 2^(bits - 1), times its group's scale. UserError for bits not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise UserError(f"pack: bits={bits}; ONNX Runtime's kernels have 2, 4 and 8")
    if len(pieces := _pieces(weight)) > 1:
        numbers, scales = zip(*(pack(rows, bits) for rows in pieces), strict=True)
        return np.concatenate(numbers), np.concatenate(scales)
    half, w = 2 ** (bits - 1), _padded(weight)
    scale = group_scales(weight, bits).view(-1, 1)
    q = (w / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    each = 8 // bits  # levels in a byte, the earlier ones in the lower bits
    q = sum(q[:, i::each] << (bits * i) for i in range(each))
    return q.view(len(weight), -1, GROUP * bits // 8).numpy(), scale.view(len(weight), -1).numpy()


def grouped_bytes(weight: Tensor, bits: int) -> int:
    """Bytes of what `pack` makes of `weight` (out, in): rows that do not divide into groups are padded."""
    groups = len(weight) * -(-weight.shape[1] // GROUP)
    return groups * (GROUP * bits // 8 + 4)


def group_scales(weight: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """The scale of each group of 32 of `weight` (out, in): (out, groups). Weights on quantization levels stay on them."""
    found = []
    for w in map(_padded, _pieces(weight)):
        scale, error = _levels(w, bits, signs)
        found.append(torch.where(error > _NOTHING, best_scale(w, bits, signs=signs), scale) if bits <= 4 else scale)
    return torch.cat(found).view(len(weight), -1)


def packed_values(weight: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """`weight` (out, in) as it is after `pack`, in floating point."""
    scale = group_scales(weight, bits, signs).view(-1, 1)
    return fake_quantize(_padded(weight), scale, bits).view(len(weight), -1)[:, : weight.shape[1]]


def on_grid(weight: Tensor, bits: int = 4) -> bool:
    """Whether `weight` (out, in) was rounded to `bits` bits in groups of 32 before, so that packing it loses nothing."""
    return all(bool((_levels(_padded(rows), bits)[1] <= _NOTHING).all()) for rows in _pieces(weight))


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, AT_ONCE // weight.shape[1]))


def _padded(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).reshape(-1, GROUP)


def _levels(w: Tensor, bits: int, signs: tuple[int, ...] = (1, -1)) -> tuple[Tensor, Tensor]:
    """A scale for each row of `w` that puts its largest weight on a level, and the squared error it leaves, (rows, 1) both."""
    half, largest = 2 ** (bits - 1), w.abs().amax(1, keepdim=True).clamp(min=1e-12)
    best, least = largest, torch.full_like(largest, torch.inf)
    for level in range(1, half + 1) if bits <= 4 else (half - 1, half):
        for scale in (sign * largest / level for sign in signs):
            error = (w - fake_quantize(w, scale, bits)).square().sum(1, keepdim=True) / largest.square()
            better = error < least - _NOTHING
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best, least
