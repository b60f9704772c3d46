"""A KV cache in few bits: keys with a scale a channel, values with a scale a token (KIVI, arXiv:2402.02750).

Groups of 32 numbers share a scale and a lowest value, both in fp16: n bits a number become n + 1. Built by hand in notebook 16.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmrecipes.errors import UserError

GROUP = 32  # numbers that share a scale: tokens of one channel, or channels of one token
BITS = (2, 4, 8)
_UP = 1 + 2**-10  # fp16 rounds to 11 bits: made so much larger, a scale is never too small after it


@dataclass(frozen=True)
class Quantized:
    """Keys or values (B, heads, T, d) in `bits` a number. A number is its code times `scale`, plus `low`."""

    codes: Tensor  # (bytes,) uint8: numbers of 8, 4 or 2 bits, the earlier ones in the low bits
    scale: Tensor  # fp16, one a group
    low: Tensor  # fp16
    bits: int
    per: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, heads, T, d), each within half a step (`scale / 2`) of what it was."""
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        codes = (self.codes[:, None] >> shifts) & (2**self.bits - 1)
        rows = codes.view(_grouped_shape(self.shape, self.per)).float() * self.scale.float() + self.low.float()
        return rows.view(self.shape).to(dtype)


def quantize_cache(x: Tensor, bits: int, per: str) -> Quantized:
    """Keys or values (B, heads, T, d), asymmetric, in groups of 32 tokens of a "channel" or of 32 channels of a "token".
    UserError for bits not 2, 4 or 8, another `per`, and sizes that 32 does not divide.
    """
    if bits not in BITS or per not in ("channel", "token"):
        raise UserError(f"quantize_cache: bits={bits}, per={per!r}; expected 2, 4 or 8 bits per 'channel' or 'token'")
    if x.shape[-2 if per == "channel" else -1] % GROUP:
        raise UserError(f"quantize_cache: {tuple(x.shape)} per {per} does not divide into groups of {GROUP}")
    axis, levels = -2 if per == "channel" else -1, 2**bits - 1
    rows = x.float().reshape(_grouped_shape(x.shape, per))
    low = rows.amin(axis, keepdim=True)
    low = (low - low.abs() * 2**-10).half()
    scale = (_UP * (rows.amax(axis, keepdim=True) - low.float()) / levels).clamp(min=2**-14).half()
    codes = ((rows - low.float()) / scale.float()).round().clamp(0, levels).to(torch.uint8).view(-1, 8 // bits)
    packed = (codes << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return Quantized(packed, scale, low, bits, per, tuple(x.shape))


def _grouped_shape(shape: tuple[int, ...], per: str) -> tuple[int, ...]:
    batch, heads, tokens, d = shape
    return (batch, heads, tokens // GROUP, GROUP, d) if per == "channel" else (batch, heads, tokens, d // GROUP, GROUP)


class QuantizedLayer(DynamicLayer):
    """One layer's keys and values, quantized in blocks of 32 tokens; the newest up to 31 (`keys`, `values`) stay as they are.
    A block is quantized once and never again. `update` returns floating point: it saves memory, not time. New tokens see
    each other, and earlier blocks as they come back."""

    def __init__(self, bits: int = 4, keys_per: str = "channel", values_per: str = "token"):
        super().__init__()
        self.bits, self.per, self.blocks = bits, (keys_per, values_per), []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        earlier = [[block[i].values(key_states.dtype) for block in self.blocks] for i in (0, 1)]
        super().update(key_states, value_states)
        seen = tuple(torch.cat([*old, new], -2) for old, new in zip(earlier, (self.keys, self.values), strict=True))
        full = self.keys.shape[-2] // GROUP * GROUP
        if full:
            both = zip((self.keys, self.values), self.per, strict=True)
            self.blocks.append(tuple(quantize_cache(x[..., :full, :], self.bits, per) for x, per in both))
            self.keys, self.values = (x[..., full:, :].clone() for x in (self.keys, self.values))
        return seen

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.blocks) + (self.keys.shape[-2] if self.is_initialized else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Only tokens that are not quantized yet: UserError for more."""
        if abs(tokens_to_remove) > self.keys.shape[-2]:
            raise UserError(f"crop: {abs(tokens_to_remove)} tokens, {self.keys.shape[-2]} not quantized: read the prompt anew")
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for block in self.blocks for part in block) + self.keys.nbytes + self.values.nbytes


def quantized_cache(config: Any, bits: int = 4, keys_per: str = "channel", values_per: str = "token") -> DynamicCache:
    """An empty cache for a model of this `config`, to be handed in as `past_key_values`; 16 bits: every number in bfloat16.
    UserError where a layer keeps something else than all keys and values (linear attention, sliding windows).
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    others = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}
    if others:
        raise UserError(f"quantized_cache: {', '.join(sorted(others))} in this model; expected full attention alone")
    make = HalfLayer if bits == 16 else lambda: QuantizedLayer(bits, keys_per, values_per)
    cache.layers = [make() for _ in cache.layers]
    return cache


class HalfLayer(DynamicLayer):
    """Keys and values in bfloat16, whatever the model computes in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        both = super().update(key_states.bfloat16(), value_states.bfloat16())
        return tuple(x.to(key_states.dtype) for x in both)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
