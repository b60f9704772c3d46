"""Observers: from a histogram of activations to a range, and from a range to a scale and a zero point (notebook 12)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrecipes.errors import UserError

BINS = 4095  # odd, so that zero, the commonest value after a ReLU, has a bin to itself
LEVELS = 128  # of int8 on one side of zero


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
        raise UserError("histogram: the values are none, or not all finite; mend the model or the images first")
    low = values.min().item() if low is None else low
    high = values.max().item() if high is None else high
    m = max(-low, high) or 1.0
    return Histogram(torch.histc(values.float(), BINS, -m, m).double().numpy(), low, high)


def minmax(h: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return h.low, h.high


def percentile(h: Histogram, keep: float = 99.99) -> tuple[float, float]:
    """The range that holds `keep` percent of the values; as many are cut off at either end."""
    share, cut = h.counts.cumsum() / h.counts.sum(), (1 - keep / 100) / 2
    low, high = h.centres[share.searchsorted(cut)], h.centres[min(share.searchsorted(1 - cut), len(share) - 1)]
    low = max(h.low, float(low))
    return low, max(low, min(h.high, float(high)))


def mse(h: Histogram, symmetric: bool = False) -> tuple[float, float]:
    """The range with the least mean squared error after rounding to 8 bits: each end is drawn in as far as that helps."""

    def error(low: float, high: float) -> float:
        scale, zero_point, least, most = qparams(low, high, symmetric)
        q = (np.round(h.centres / scale) + zero_point).clip(least, most)
        return float((h.counts * (h.centres - scale * (q - zero_point)) ** 2).sum())

    low, high = bottom, top = min(h.low, 0.0), max(h.high, 0.0)
    for _ in range(2):  # the ends hardly depend on each other: twice around is enough
        high = min((top * r for r in np.linspace(0.02, 1, 99)), key=lambda end: error(low, end))
        low = min((bottom * r for r in np.linspace(0.02, 1, 99)), key=lambda end: error(end, high))
    return float(low), float(high)


def entropy(h: Histogram, step: int = 8) -> tuple[float, float]:
    """The range whose 128 levels differ least from the magnitudes, by KL divergence: TensorRT's (Migacz, GTC 2017)."""
    middle = len(h.counts) // 2
    size = h.counts[middle:].copy()  # magnitudes, zero first
    size[1:] += h.counts[:middle][::-1]
    size[0] = size[1]  # zero is exact whatever the range: it has no say, or its many would decide alone
    if not size.any():  # nothing but zeros
        return minmax(h)
    ends, divergences = range(LEVELS, len(size) + 1, step), []
    for end in ends:
        inside = size[:end]
        clipped = inside.copy()
        clipped[-1] += size[end:].sum()  # what lies beyond goes into the last bin
        starts = np.arange(LEVELS) * end // LEVELS  # of each level, in bins
        used = (inside > 0).astype(float)
        mean = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(used, starts), 1)
        quantized = np.repeat(mean, np.diff(np.append(starts, end))) * used
        p, q = clipped / clipped.sum(), np.maximum(quantized / max(quantized.sum(), 1), 1e-9)
        divergences.append((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    m = max(-h.low, h.high) * (ends[int(np.argmin(divergences))] / ends[-1])
    return max(h.low, -m), min(h.high, m)


Observer = Callable[[Histogram], tuple[float, float]]
OBSERVERS: dict[str, Observer] = {"min-max": minmax, "percentile": percentile, "entropy": entropy, "MSE": mse}


def qparams(low: float, high: float, symmetric: bool = False) -> tuple[float, int, int, int]:
    """Scale, zero point, least and largest 8-bit integer for [low, high]; zero stays exact. UserError where that is no range."""
    if not np.isfinite([low, high]).all() or low > high:
        raise UserError(f"qparams: the range [{low}, {high}] is not one; expected two finite numbers in order")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return float(max(-low, high) / 127 or 1.0), 0, -127, 127
    scale = float((high - low) / 255 or 1.0)
    return scale, round(-low / scale), 0, 255


def fake_quantize_range(x: Tensor, low: float, high: float, symmetric: bool = False) -> Tensor:
    """`x` on the 8-bit quantization levels of [low, high], in floating point."""
    scale, zero_point, least, most = qparams(low, high, symmetric)
    return torch.fake_quantize_per_tensor_affine(x, max(scale, torch.finfo(x.dtype).tiny), zero_point, least, most)
