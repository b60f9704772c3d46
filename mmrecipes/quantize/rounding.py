"""Fewer bits: each function takes a model and returns a smaller copy. The chapter on quantization builds them by hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import clone, linears

if TYPE_CHECKING:
    pass

CLIPPING_RATIOS = torch.linspace(0.35, 1.0, 14)  # where the last mark may lie, as a fraction of the largest weight


def best_scale(rows: Tensor, bits: int, importance: Tensor | None = None, signs: tuple[int, ...] = (1, -1)) -> Tensor:
    """The scale of each of `rows` (N, G) that leaves the least squared error, weighted by `importance` (G,): (N, 1).

    Clipping the largest weights may pay, so several reaches are tried; and both signs, because whole numbers of b bits reach
    one further on the negative side.
    """
    if bits < 2:
        raise UserError(f"{bits} bits; expected 2 or more: one bit has no mark beside zero")
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
    weight = torch.ones_like(rows[0]) if importance is None else importance
    best, least = largest, torch.full_like(largest, torch.inf)
    for reach in CLIPPING_RATIOS.tolist():
        for scale in (sign * reach * largest for sign in signs):
            off = ((rows - fake_quantize(rows, scale, bits)).square() * weight).sum(1, keepdim=True)
            best, least = torch.where(off < least, scale, best), torch.minimum(off, least)
    return best


def fake_quantize(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`w` on the nearest of the 2^bits marks, which are whole multiples of `scale`."""
    half = 2 ** (bits - 1)
    return (w / scale).round().clamp(-half, half - 1) * scale


def search_round(weight: Tensor, bits: int, group_size: int | None = None, importance: Tensor | None = None) -> Tensor:
    """`weight` (out, in) rounded to nearest with the best scale a channel, or a group of `group_size` inputs.

    `importance` (in,) says how much an input counts; without it, no data is needed.
    """
    groups = input_groups(weight, group_size)
    parts = []
    for at in groups:
        part = weight[:, at].float()
        scale = best_scale(part, bits, None if importance is None else importance[at])
        parts.append(fake_quantize(part, scale, bits))
    return torch.cat(parts, 1).to(weight.dtype)


def input_groups(weight: Tensor, group_size: int | None) -> list[slice]:
    n = weight.shape[1]
    if group_size and n % group_size:
        raise UserError(
            f"{n} inputs do not divide into groups of {group_size}; choose a divisor, or None for one scale a channel"
        )
    if not torch.isfinite(weight).all():
        raise UserError("the weight has entries that are not finite; mend the model first")
    return [slice(i, i + (group_size or n)) for i in range(0, n, group_size or n)]


def bf16(model: nn.Module) -> nn.Module:
    """Weights and arithmetic in bfloat16: half the bytes. Faster only where the CPU has bf16 instructions."""
    return clone(model).to(torch.bfloat16)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """int8 weights (one scale an output channel) and int8 activations quantized on the fly, in every linear layer.

    Runs on the CPU, from a float32 model. `torch.ao.quantization.quantize_dynamic` is deprecated but still the quickest
    eager int8 (see FBGEMM, arXiv:2101.05615).
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise UserError(f"dynamic_int8: the model is {dtype}; it starts from float32, so load it with dtype=torch.float32")
    small = clone(model)
    with warnings.catch_warnings():  # its deprecation and its observers' advice, both known and chosen
        warnings.filterwarnings("ignore", message="(?s).*(torch.ao.quantization|torch.quantize_per_tensor|reduce_range).*")
        return quantize_dynamic(small, {n: per_channel_dynamic_qconfig for n, _ in linears(small)}, inplace=True)


def simulate_dynamic_int8(model: nn.Module) -> nn.Module:
    """The arithmetic of `dynamic_int8`, done slowly in float32: what its kernels must agree with.

    Weights are rounded to 8 bits a channel, and each layer's input to 7 bits between its own minimum and maximum: PyTorch
    leaves one bit free, because AVX2's 8-bit products saturate.
    """

    def round_input(layer: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low).clamp(min=1e-12) / 127
        return ((x / scale).round() * scale, *args[1:])

    twin = simulate(model, 8)
    for _, layer in linears(twin):
        layer.register_forward_pre_hook(round_input)
    return twin


def round_to_nearest(weight: Tensor, bits: int, per: str = "channel", group_size: int = 32) -> Tensor:
    """`weight` (out, in) rounded to `bits` bits, symmetric, and back: what a quantized layer would compute with.

    One scale for the whole `tensor`, for each output `channel`, or for each `group` of `group_size` inputs of a channel.
    Raises UserError when weights are not finite, or `group_size` does not divide the inputs.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"round_to_nearest: {bits} bits; expected 2 to 8")
    if not torch.isfinite(weight).all():
        raise UserError("round_to_nearest: the weight has entries that are not finite; mend the model first")
    if per == "tensor":
        rows = weight.reshape(1, -1)
    elif per == "channel":
        rows = weight.reshape(weight.shape[0], -1)
    elif per == "group":
        if weight[0].numel() % group_size:
            raise UserError(f"round_to_nearest: {weight[0].numel()} inputs do not divide into groups of {group_size}")
        rows = weight.reshape(-1, group_size)
    else:
        raise UserError(f"round_to_nearest: per={per!r}; expected 'tensor', 'channel' or 'group'")
    top = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / top
    return ((rows / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape).to(weight.dtype)


def simulate(model: nn.Module, bits: int, per: str = "channel", group_size: int = 32) -> nn.Module:
    """Round every linear weight to nearest, kept in floating point: the accuracy of `bits` bits, not their speed."""
    small = clone(model)
    with torch.no_grad():
        for _, layer in linears(small):
            layer.weight.copy_(round_to_nearest(layer.weight, bits, per, group_size))
    return small


def packed_bytes(model: nn.Module, bits: int | Mapping[str, int], per: str = "channel", group_size: int = 32) -> int:
    """Bytes of `model` when every linear weight is packed to `bits` with a 16-bit scale a tensor, channel or group.

    Or `bits` {module's name: bits}, for those modules alone. All else counts 16 bits.
    """
    chosen = bits if isinstance(bits, Mapping) else {n: bits for n, _ in linears(model)}
    width = {id(model.get_submodule(n).weight): b for n, b in chosen.items()}
    return sum(packed_weight_bytes(p, width.get(id(p), 16), per, group_size) for p in model.parameters())


def packed_weight_bytes(weight: Tensor, bits: int, per: str = "channel", group_size: int = 32) -> int:
    """Bytes of one weight at `bits`, its 16-bit scales included; from 16 bits on there are none."""
    if bits >= 16:
        return weight.numel() * bits // 8
    scales = weight.numel() // group_size if per == "group" else {"tensor": 1, "channel": weight.shape[0]}[per]
    return -(-weight.numel() * bits // 8) + 2 * scales
