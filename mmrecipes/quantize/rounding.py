"""Fewer bits without data: each function takes a weight or a model and returns a copy. Built by hand in notebooks 10 and 11."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import clone, linears
from mmrecipes.quantize.groups import best_scale, fake_quantize, grouped


def round_to_nearest(weight: Tensor, bits: int, per: str = "channel", group_size: int = 32) -> Tensor:
    """`weight` (out, in, ...) rounded to `bits` bits (2 to 8), symmetric, and back: what a quantized layer computes with.
    One scale a "tensor", an output "channel", or a "group" of `group_size` inputs. UserError for others, and as `grouped`.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"round_to_nearest: {bits} bits; expected 2 to 8")
    if per not in ("tensor", "channel", "group"):
        raise UserError(f"round_to_nearest: per={per!r}; expected 'tensor', 'channel' or 'group'")
    rows = grouped(weight[None] if per == "tensor" else weight, group_size if per == "group" else None)
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return fake_quantize(rows, scale, bits).reshape(weight.shape).to(weight.dtype)


def search_round(weight: Tensor, bits: int, group_size: int | None = None, importance: Tensor | None = None) -> Tensor:
    """`weight` (out, in) on the best scale of each channel or group, inputs weighed by `importance` (in,). Raises UserError."""
    rows = grouped(weight, group_size).float()
    if importance is not None:
        importance = importance.reshape(-1, rows.shape[1]).repeat(len(weight), 1)
    return fake_quantize(rows, best_scale(rows, bits, importance), bits).reshape(weight.shape).to(weight.dtype)


def bf16(model: nn.Module) -> nn.Module:
    """Weights and arithmetic in bfloat16: half the bytes. Faster only where the CPU has bf16 instructions."""
    return clone(model).to(torch.bfloat16)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """int8 weights (a scale an output channel) and activations quantized on the fly, in every linear layer, on the CPU.
    `quantize_dynamic` is deprecated but still the quickest eager int8 (FBGEMM, arXiv:2101.05615). UserError unless float32.
    The output projection of `nn.MultiheadAttention` stays: its weight is read past the layer, and a packed one is no tensor.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise UserError(f"dynamic_int8: the model is {dtype}; it starts from float32, so load it with dtype=torch.float32")
    with warnings.catch_warnings():  # its deprecation and its observers' advice, both known and chosen
        warnings.filterwarnings("ignore", message="(?s).*(torch.ao.quantization|torch.quantize_per_tensor|reduce_range).*")
        layers = [
            name for name, _ in linears(model) if not name.endswith("patch_embedding")
        ]  # SigLIP 2 asks it for its weight's dtype
        return quantize_dynamic(clone(model), dict.fromkeys(layers, per_channel_dynamic_qconfig), inplace=True)


def simulate_dynamic_int8(model: nn.Module) -> nn.Module:
    """The arithmetic of `dynamic_int8` in float32: 8 bits for weights, 7 for inputs, as AVX2's 8-bit products saturate."""

    def round_input(layer: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = args[0].min().clamp(max=0), args[0].max().clamp(min=0)
        scale = (high - low).clamp(min=1e-12) / 127
        return ((args[0] / scale).round() * scale, *args[1:])

    simulated = simulate(model, 8)
    for _, layer in linears(simulated):
        layer.register_forward_pre_hook(round_input)
    return simulated


def simulate(model: nn.Module, bits: int, per: str = "channel", group_size: int = 32) -> nn.Module:
    """Round every linear weight to nearest, kept in floating point: the accuracy of `bits` bits, not their speed."""
    return changed(model, dict.fromkeys(dict(linears(model)), bits), lambda w, b: round_to_nearest(w, b, per, group_size))


@torch.no_grad()
def changed(
    model: nn.Module, chosen: Mapping[str, Any], change: Callable[[Tensor, Any], Tensor], share: bool = False
) -> nn.Module:
    """A copy in which the weight of each module of `chosen` {name: how} has become `change(weight, how)`; with `share` the others
    are `model`'s own, which saves memory: for copies that nobody trains."""
    weights = {id(model.get_submodule(name).weight) for name in chosen}
    small = clone(model, [p for p in model.parameters() if id(p) not in weights] if share else ())
    for name, how in chosen.items():
        weight = small.get_submodule(name).weight
        weight.copy_(change(weight, how))
    return small


def packed_bytes(model: nn.Module, bits: int | Mapping[str, int], per: str = "channel", group_size: int = 32) -> int:
    """Bytes of `model` with its linear weights, or those of `bits` {module's name: bits}, packed; all else counts 16 bits."""
    bits = bits if isinstance(bits, Mapping) else {n: bits for n, _ in linears(model)}
    by_weight = {id(model.get_submodule(n).weight): b for n, b in bits.items()}
    return sum(packed_weight_bytes(p, by_weight.get(id(p), 16), per, group_size) for p in model.parameters())


def packed_weight_bytes(weight: Tensor, bits: int, per: str = "channel", group_size: int = 32, scale_bytes: int = 2) -> int:
    """Bytes of one weight at `bits`, with a scale of `scale_bytes` a tensor, channel or group; from 16 bits on there are none."""
    if bits >= 16:
        return weight.numel() * bits // 8
    scales = weight.numel() // group_size if per == "group" else {"tensor": 1, "channel": weight.shape[0]}[per]
    return -(-weight.numel() * bits // 8) + scale_bytes * scales
