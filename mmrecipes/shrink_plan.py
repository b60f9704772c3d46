"""Plans for `shrink`: which units get 4 bits, what that should take and lose, within a budget or step by step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmrecipes import plan, quantize, shrink_torch
from mmrecipes.calibrated import block_of
from mmrecipes.errors import UserError
from mmrecipes.packed import GROUP

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.shrink_data import Loss

STEPS = 4  # plans that are tried without a budget, from 4 bits everywhere to 4 bits nowhere
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Rung:
    """A plan {unit: bits}, the bytes its files should take, the sum of its units' losses (nats), and what it lost when tried."""

    plan: dict[str, int] = field(repr=False)
    bytes: int
    divergence: float
    loss: Loss | None = None


# ---- the budget and the bytes


def budget_bytes(text: str, whole: int) -> int:
    """Bytes of "0.25x" (of `whole`), "80MB", "1.5 GiB". UserError for anything else, and for shares of 1 and more."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(x|[kmg]?i?b)\s*", text, re.IGNORECASE)
    unit = found[2].lower() if found else ""
    if not found or unit not in {"x", *UNITS} or not float(found[1]):
        raise UserError(f"--budget {text!r}: expected a share of the float32 weights, such as 0.25x, or a size, such as 80MB")
    if unit == "x" and float(found[1]) >= 1:
        raise UserError(f"--budget {text!r}: the original is 1x; give a smaller share, such as 0.25x")
    return int(float(found[1]) * (whole if unit == "x" else UNITS[unit]))


def float_bytes(model: nn.Module) -> int:
    """Bytes of all weights in float32, tied ones once."""
    return 4 * sum(p.numel() for p in model.parameters())


def predicted_bytes(model: nn.Module, bits: Mapping[str, int], runtime: str) -> int:
    """Bytes of the files in which each unit has its `bits` (4, or 8; 16 for torch), before they are written."""
    words = model.get_input_embeddings()
    tied = getattr(model.get_output_embeddings(), "weight", None) is words.weight
    total = float_bytes(model) // (2 if runtime == "torch" else 1)
    for name, width in plan.widths(model, bits).items():
        module = model.get_submodule(name)
        plain = module.weight.numel() * (2 if runtime == "torch" else 4)
        total += _packed(name, module, width, runtime, 1 + (tied and module is words)) - plain
    if runtime == "openvino":  # whose 8 bits reach convolutions, too
        total -= sum(m.weight.numel() * 3 - 4 * len(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d))
    blocks = len({block_of(n) for n, _ in quantize.linears(model)})
    # what describes the graph itself, a numbered block, as the exporters write it
    return total + blocks * {"openvino": 62_000, "onnx": 12_000}.get(runtime, 0)


def _packed(name: str, module: nn.Module, width: int, runtime: str, copies: int) -> int:
    weights, rows = module.weight.numel(), len(module.weight)
    if runtime == "torch":
        return shrink_torch.packed_bytes(module.weight) if width == 4 else 2 * weights
    grouped = weights * width // 8 + weights // GROUP * 4  # a float32 scale a group
    channels = weights + 5 * rows  # a scale and a zero a row
    if runtime == "executorch" and isinstance(module, nn.Embedding):  # only the head's copy is rounded
        return 4 * weights + (copies - 1) * (grouped if width == 4 else channels)
    if runtime != "onnx":
        return grouped if width == 4 else channels
    if width == 4:
        return grouped * copies
    if isinstance(module, nn.Embedding):  # to look up, and once more to multiply with
        return grouped + (copies - 1) * channels
    return grouped if any(last in name for last in ("down_proj", "fc2", "w2")) and "vision" not in name else channels


# ---- plans


def takers(model: nn.Module, runtime: str, blocked: set[str] = frozenset()) -> list[str]:
    """Units that can have 4 bits: their inputs divide into groups. `blocked`: layers whose weights others read."""
    able = shrink_torch.can(model) - blocked if runtime == "torch" else set()
    kinds = nn.Linear if runtime == "executorch" else nn.Linear | nn.Embedding
    for name, module in model.named_modules():
        if runtime != "torch" and isinstance(module, kinds) and module.weight.shape[1] % GROUP == 0:
            able.add(name)
    return [unit for unit, names in plan.units(model).items() if able.issuperset(names)]


def round_all(model: nn.Module, four: list[str], runtime: str, rows: Dataset) -> nn.Module:
    """A copy with all units of `four` in 4 bits: by GPTQ in groups of 32, or as bitsandbytes does it."""
    if runtime != "torch":
        return plan.apply(model, dict.fromkeys(four, 4), GROUP, rows)
    small = quantize.clone(model)
    with torch.no_grad():
        for name in plan.widths(model, dict.fromkeys(four, 4)):
            small.get_submodule(name).weight.copy_(shrink_torch.rounded(small.get_submodule(name).weight))
    return small


def mixed(model: nn.Module, rounded: nn.Module, bits: Mapping[str, int], trial: bool = False) -> nn.Module:
    """A copy of `model` with the weights of `rounded` where the plan says 4 bits.

    The others are rounded by the export; for a `trial` in PyTorch those of 8 bits are rounded here, a channel, as it does.
    """
    small = quantize.clone(model)
    with torch.no_grad():
        for name, width in plan.widths(model, bits).items():
            weight = small.get_submodule(name).weight
            if width == 4:
                weight.copy_(rounded.get_submodule(name).weight)
            elif trial and width == 8:
                weight.copy_(quantize.round_to_nearest(weight, 8))
    return small


def costs(model: nn.Module, rounded: nn.Module, four: list[str], runtime: str, rows: Dataset) -> list[plan.Cost]:
    """What each unit of `four` loses alone in 4 bits, and its bytes in `runtime`; in 8 bits (16 for torch) it loses nothing.

    At 8 bits in groups or a channel the loss is below what so few rows can tell.
    """
    upper = high(runtime)

    def size(unit: str, width: int) -> int:
        base = dict.fromkeys(plan.units(model), upper)
        return predicted_bytes(model, base | {unit: width}, runtime)

    found = plan.sensitivity(model, rows, (4,), GROUP, lambda name, weight, *_: rounded.get_submodule(name).weight)
    whole, pairs = size(four[0], upper) if four else 0, []
    for cost in found:
        if cost.unit not in four:
            continue
        saved = whole - size(cost.unit, 4)
        weights = sum(model.get_submodule(n).weight.numel() for n in plan.units(model)[cost.unit])
        at = dataclasses.replace(cost, bytes=weights, loss=max(0.0, cost.loss))
        pairs += [dataclasses.replace(at, bits=upper, bytes=weights + saved, loss=0.0), at]
    return pairs


def high(runtime: str) -> int:
    """Bits of a unit that is not in 4."""
    return 16 if runtime == "torch" else 8


def best(model: nn.Module, table: list[plan.Cost], runtime: str, budget: float) -> Rung:
    """The plan of at most `budget` bytes that should lose least. UserError where even 4 bits everywhere take more."""
    everywhere = dict.fromkeys(plan.units(model), high(runtime))
    lowest = everywhere | {c.unit: 4 for c in table}
    least, most = (predicted_bytes(model, p, runtime) for p in (lowest, everywhere))
    if least > budget:
        whole = float_bytes(model)
        raise UserError(
            f"--budget of {budget / 1e6:.2f} MB: with 4 bits wherever they fit the model takes {least / 1e6:.2f} MB "
            f"({least / whole:.3f}x); ask for that or more, or start from a smaller model"
        )
    chosen = everywhere
    if most > budget:
        movable = sum(c.bytes for c in table if c.bits == 4)
        try:
            chosen = everywhere | plan.knapsack(table, int(budget - least + movable))
        except UserError:  # closer to the least than the knapsack counts
            chosen = lowest
    lost = sum(c.loss for c in table if chosen[c.unit] == c.bits)
    return Rung(chosen, predicted_bytes(model, chosen, runtime), lost)


def ladder(model: nn.Module, table: list[plan.Cost], runtime: str) -> list[Rung]:
    """Plans from 4 bits everywhere to 4 bits nowhere, the smallest first."""
    everywhere = dict.fromkeys(plan.units(model), high(runtime))
    least, most = (predicted_bytes(model, everywhere | {c.unit: 4 for c in table if k}, runtime) for k in (1, 0))
    rungs = [best(model, table, runtime, least + (most - least) * k / (STEPS - 1)) for k in range(STEPS)]
    return [r for i, r in enumerate(rungs) if r.plan not in [s.plan for s in rungs[:i]]]
