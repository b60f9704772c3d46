"""Plans for `shrink`: which units get 4 bits, what that should take and lose, within a budget or step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.quantize import mixed_precision, nf4, rounding
from mmrecipes.quantize.groups import GROUP
from mmrecipes.shrink.sizes import float_bytes, predicted_bytes

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.evaluate.fidelity import Loss

STEPS = 4  # plans that are tried without a budget, from 4 bits everywhere to 4 bits nowhere


@dataclass(frozen=True)
class Candidate:
    """A plan {unit: bits}, the bytes its files should take, the sum of its units' losses (nats), and what it lost when tried."""

    plan: dict[str, int] = field(repr=False)
    bytes: int
    divergence: float
    loss: Loss | None = None


# ---- plans


def eligible_units(model: nn.Module, runtime: str, blocked: set[str] = frozenset()) -> list[str]:
    """Units that can have 4 bits: their inputs divide into groups. `blocked`: layers whose weights others read."""
    able = nf4.can_nf4(model) - blocked if runtime == "torch" else set()
    kinds = nn.Linear if runtime == "executorch" else nn.Linear | nn.Embedding
    for name, module in model.named_modules():
        if runtime != "torch" and isinstance(module, kinds) and module.weight.shape[1] % GROUP == 0:
            able.add(name)
    return [unit for unit, names in mixed_precision.units(model).items() if able.issuperset(names)]


def round_all(model: nn.Module, four: list[str], runtime: str, rows: Dataset) -> nn.Module:
    """A copy with all units of `four` in 4 bits: by GPTQ in groups of 32, or as bitsandbytes does it."""
    if runtime != "torch":
        return mixed_precision.apply_plan(model, dict.fromkeys(four, 4), GROUP, rows)
    small = modules.clone(model)
    with torch.no_grad():
        for name in mixed_precision.bits_by_module(model, dict.fromkeys(four, 4)):
            small.get_submodule(name).weight.copy_(nf4.nf4_rounded(small.get_submodule(name).weight))
    return small


def mixed(model: nn.Module, rounded: nn.Module, bits: Mapping[str, int], trial: bool = False) -> nn.Module:
    """A copy of `model` with the weights of `rounded` where the plan says 4 bits.

    The others are rounded by the export; for a `trial` in PyTorch those of 8 bits are rounded here, a channel, as it does.
    """
    small = modules.clone(model)
    with torch.no_grad():
        for name, width in mixed_precision.bits_by_module(model, bits).items():
            weight = small.get_submodule(name).weight
            if width == 4:
                weight.copy_(rounded.get_submodule(name).weight)
            elif trial and width == 8:
                weight.copy_(rounding.round_to_nearest(weight, 8))
    return small


def costs(model: nn.Module, rounded: nn.Module, four: list[str], runtime: str, rows: Dataset) -> list[mixed_precision.Cost]:
    """What each unit of `four` loses alone in 4 bits, and its bytes in `runtime`; in 8 bits (16 for torch) it loses nothing.

    At 8 bits in groups or a channel the loss is below what so few rows can tell.
    """
    upper = high(runtime)

    def size(unit: str, width: int) -> int:
        base = dict.fromkeys(mixed_precision.units(model), upper)
        return predicted_bytes(model, base | {unit: width}, runtime)

    found = mixed_precision.sensitivity(model, rows, (4,), GROUP, lambda name, weight, *_: rounded.get_submodule(name).weight)
    whole, pairs = size(four[0], upper) if four else 0, []
    for cost in found:
        if cost.unit not in four:
            continue
        saved = whole - size(cost.unit, 4)
        weights = sum(model.get_submodule(n).weight.numel() for n in mixed_precision.units(model)[cost.unit])
        at = dataclasses.replace(cost, bytes=weights, loss=max(0.0, cost.loss))
        pairs += [dataclasses.replace(at, bits=upper, bytes=weights + saved, loss=0.0), at]
    return pairs


def high(runtime: str) -> int:
    """Bits of a unit that is not in 4."""
    return 16 if runtime == "torch" else 8


def best(model: nn.Module, table: list[mixed_precision.Cost], runtime: str, budget: float) -> Candidate:
    """The plan of at most `budget` bytes that should lose least. UserError where even 4 bits everywhere take more."""
    everywhere = dict.fromkeys(mixed_precision.units(model), high(runtime))
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
            chosen = everywhere | mixed_precision.knapsack(table, int(budget - least + movable))
        except UserError:  # closer to the least than the knapsack counts
            chosen = lowest
    lost = sum(c.loss for c in table if chosen[c.unit] == c.bits)
    return Candidate(chosen, predicted_bytes(model, chosen, runtime), lost)


def candidates(model: nn.Module, table: list[mixed_precision.Cost], runtime: str) -> list[Candidate]:
    """Plans from 4 bits everywhere to 4 bits nowhere, the smallest first."""
    everywhere = dict.fromkeys(mixed_precision.units(model), high(runtime))
    least, most = (predicted_bytes(model, everywhere | {c.unit: 4 for c in table if k}, runtime) for k in (1, 0))
    rungs = [best(model, table, runtime, least + (most - least) * k / (STEPS - 1)) for k in range(STEPS)]
    return [r for i, r in enumerate(rungs) if r.plan not in [s.plan for s in rungs[:i]]]
