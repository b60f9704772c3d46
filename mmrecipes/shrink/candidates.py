"""Candidate plans: which units get 4 bits, what that should take and lose, within a budget or step by step."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.models.prompts import Rows
from mmrecipes.quantize import mixed_precision, nf4, rounding
from mmrecipes.quantize.groups import GROUP
from mmrecipes.quantize.mixed_precision import Cost
from mmrecipes.shrink.fidelity import Loss
from mmrecipes.shrink.source import Source, predicted_bytes, unit_bytes

STEPS = 4  # candidates that are tried without a budget, from 4 bits everywhere to 4 bits nowhere


@dataclass(frozen=True)
class Candidate:
    """A plan {unit: bits}, the bytes its files should take, the sum of its units' losses (nats), and what it lost when tried."""

    plan: dict[str, int] = field(repr=False)
    bytes: int
    divergence: float
    loss: Loss | None = None


def eligible_units(source: Source, blocked: set[str] = frozenset()) -> list[str]:
    """Units that can have 4 bits: their inputs divide into groups. `blocked`: layers whose weights others read."""
    if source.runtime == "torch":
        able = nf4.can_nf4(source.model) - blocked
    else:
        kinds = nn.Linear if source.runtime == "executorch" else nn.Linear | nn.Embedding
        able = {n for n, m in source.modules.items() if isinstance(m, kinds) and m.weight.shape[1] % GROUP == 0}
    return [unit for unit, names in source.units.items() if able.issuperset(names)]


def round_all(source: Source, four: list[str], rows: Rows) -> nn.Module:
    """A copy with all units of `four` in 4 bits: by GPTQ in groups of 32, or in NF4 as bitsandbytes does it."""
    plan = dict.fromkeys(four, 4)
    if source.runtime == "torch":
        return rounding.changed(source.model, source.module_bits(plan), lambda weight, _: nf4.nf4_rounded(weight))
    return mixed_precision.apply_plan(source.model, plan, GROUP, rows)


def mixed(source: Source, rounded: nn.Module, plan: Mapping[str, int], trial: bool = False) -> nn.Module:
    """A copy of the source with the weights of `rounded` where the plan says 4 bits. The others are rounded by the export; for
    a `trial` in PyTorch those of 8 bits are rounded here, a channel, as it does."""
    bits = source.module_bits(plan)
    new = {
        name: rounded.get_submodule(name).weight if b == 4 else None for name, b in bits.items() if b == 4 or (trial and b == 8)
    }
    return rounding.changed(
        source.model, new, lambda w, four: rounding.round_to_nearest(w, 8) if four is None else four, share=True
    )


def costs(source: Source, rounded: nn.Module, four: list[str], rows: Rows) -> list[Cost]:
    """What each unit of `four` loses alone in 4 bits, and its bytes. In `source.high` bits it loses nothing: less, at least,
    than so few rows can tell."""
    found = []
    for cost in mixed_precision.sensitivity(source.model, rows, (4,), GROUP, lambda name, *_: rounded.get_submodule(name).weight):
        if cost.unit in four:
            for bits, loss in ((source.high, 0.0), (4, max(0.0, cost.loss))):
                found.append(dataclasses.replace(cost, bits=bits, bytes=unit_bytes(source, cost.unit, bits), loss=loss))
    return found


def best(source: Source, table: Sequence[Cost], budget: float) -> Candidate:
    """The plan of at most `budget` bytes that should lose least. UserError where even 4 bits everywhere take more."""
    lowest, chosen = source.plan({c.unit for c in table}), source.plan()
    least = predicted_bytes(source, lowest)
    if least > budget:
        raise UserError(
            f"--budget of {budget / 1e6:.2f} MB: with 4 bits wherever they fit the model takes {least / 1e6:.2f} MB "
            f"({least / source.float_bytes:.3f}x); ask for that or more, or start from a smaller model"
        )
    if predicted_bytes(source, chosen) > budget:
        movable = sum(c.bytes for c in table if c.bits == 4)
        try:
            chosen |= mixed_precision.knapsack(table, int(budget - least + movable))
        except UserError:  # closer to the least than the knapsack counts
            chosen = lowest
    lost = sum(c.loss for c in table if chosen[c.unit] == c.bits)
    return Candidate(chosen, predicted_bytes(source, chosen), lost)


def series(source: Source, table: Sequence[Cost]) -> list[Candidate]:
    """Candidates from 4 bits everywhere to 4 bits nowhere, the smallest first."""
    least, most = (predicted_bytes(source, source.plan(four)) for four in ({c.unit for c in table}, ()))
    found = [best(source, table, least + (most - least) * k / (STEPS - 1)) for k in range(STEPS)]
    return [c for i, c in enumerate(found) if c.plan not in [before.plan for before in found[:i]]]
