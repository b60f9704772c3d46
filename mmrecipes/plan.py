"""Which module takes which precision: hurt each alone, then spend a byte budget where it helps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrecipes import evaluate, models
from mmrecipes.calibrated import search_round
from mmrecipes.errors import UserError
from mmrecipes.quantize import clone, linears

if TYPE_CHECKING:
    from datasets import Dataset

BITS = (8, 6, 4, 3, 2)
Round = Callable[[Tensor, int, int | None], Tensor]  # weight (out, in), bits, group size -> rounded weight


@dataclass(frozen=True)
class Cost:
    """What one unit costs at one precision, everything else left alone."""

    unit: str
    part: str
    bits: int
    bytes: int
    loss: float  # Kullback-Leibler divergence from the whole model, nats an answer token


def units(model: nn.Module) -> dict[str, list[str]]:
    """What a plan decides on: {name: the names of its weights' modules}.

    All linear layers of one attention or one MLP together, and the word embeddings (with the output head, where it is tied).
    """
    found: dict[str, list[str]] = {}
    for name, _ in linears(model):
        found.setdefault(name.rpartition(".")[0] or name, []).append(name)
    embeddings = model.get_input_embeddings()
    return found | {n: [n] for n, m in model.named_modules() if m is embeddings}


def packed_bytes(model: nn.Module, bits: dict[str, int], group_size: int | None = None) -> int:
    """Bytes on disk when each unit is packed to its `bits`: a 16-bit scale a row or group; everything else in 16 bits."""
    modules, total, counted = dict(model.named_modules()), 0, set()
    for unit, names in units(model).items():
        for name in names:
            total += _packed(modules[name].weight, bits[unit], group_size)
            counted.add(id(modules[name].weight))
    return total + sum(2 * p.numel() for p in model.parameters() if id(p) not in counted)


def _packed(weight: Tensor, bits: int, group_size: int | None) -> int:
    if bits >= 16:
        return weight.numel() * bits // 8
    return -(-weight.numel() * bits // 8) + 2 * (weight.numel() // (group_size or weight.shape[1]))


def sensitivity(
    model: nn.Module,
    rows: Dataset,
    bits: Sequence[int] = BITS,
    group_size: int | None = None,
    rounding: Round = search_round,
    progress: bool | None = None,
) -> list[Cost]:
    """The cost of each unit of `model` at each of `bits`, alone, on `rows` (image, question, answer)."""
    from tqdm.auto import tqdm

    if progress is None:
        progress = not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    small, found, part = clone(model), [], models.part_of(model)
    modules = dict(small.named_modules())
    reference, _ = evaluate.answer_logits(small, rows)
    for unit, names in tqdm(units(small).items(), disable=not progress, desc="sensitivity", leave=False):
        kept = {n: modules[n].weight.detach().clone() for n in names}
        for b in bits:
            with torch.no_grad():
                for n in names:
                    modules[n].weight.copy_(rounding(kept[n], b, group_size))
            logits, _ = evaluate.answer_logits(small, rows)
            size = sum(_packed(w, b, group_size) for w in kept.values())
            found.append(Cost(unit, part[f"{names[0]}.weight"], b, size, evaluate.divergence(reference, logits)))
        with torch.no_grad():
            for n in names:
                modules[n].weight.copy_(kept[n])
    return found


def greedy(costs: Sequence[Cost], budget: int) -> dict[str, int]:
    """{unit: bits} of at most `budget` bytes: from the most bits on, always take the step down that loses least a byte saved."""
    table = _table(costs)
    plan = {unit: max(row) for unit, row in table.items()}
    while sum(table[u][b].bytes for u, b in plan.items()) > budget:
        steps = [
            ((c.loss - table[u][plan[u]].loss) / (table[u][plan[u]].bytes - c.bytes), u, b)
            for u, row in table.items()
            for b, c in row.items()
            if b < plan[u]
        ]
        if not steps:
            raise _too_small(table, budget)
        _, unit, b = min(steps)
        plan[unit] = b
    return plan


def knapsack(costs: Sequence[Cost], budget: int, slots: int = 4000) -> dict[str, int]:
    """{unit: bits} of at most `budget` bytes with the least sum of losses, exactly, up to bytes counted in 1/`slots` of it.

    Dynamic programming over the units (the multiple-choice knapsack).
    Assumes that losses add up, which is roughly so where they are small.
    """
    table, slot = _table(costs), budget / slots
    least, chosen = torch.zeros(slots + 1), []  # least[s]: the smallest loss of the units so far in at most s slots
    for row in table.values():
        options = torch.full((len(row), slots + 1), torch.inf)
        for i, c in enumerate(row.values()):
            k = int(-(-c.bytes // slot))
            if k <= slots:
                options[i, k:] = least[: slots + 1 - k] + c.loss
        least, pick = options.min(0)
        chosen.append(pick)
    if not torch.isfinite(least[-1]):
        raise _too_small(table, budget)
    plan, s = {}, slots
    for (unit, row), pick in zip(reversed(table.items()), reversed(chosen), strict=True):
        cost = list(row.values())[int(pick[s])]
        plan[unit] = cost.bits
        s -= int(-(-cost.bytes // slot))
    return dict(reversed(plan.items()))


def _table(costs: Sequence[Cost]) -> dict[str, dict[int, Cost]]:
    table: dict[str, dict[int, Cost]] = {}
    for c in costs:
        table.setdefault(c.unit, {})[c.bits] = c
    return table


def _too_small(table: dict[str, dict[int, Cost]], budget: int) -> UserError:
    least = sum(min(c.bytes for c in row.values()) for row in table.values())
    return UserError(f"a budget of {budget} bytes is too small: at the fewest bits tried, the units take {least} bytes")


def apply(model: nn.Module, plan: dict[str, int], group_size: int | None = None, rounding: Round = search_round) -> nn.Module:
    """A copy of `model` with each unit rounded to its bits in `plan`, kept in floating point."""
    small, members = clone(model), units(model)
    if missing := set(plan) - set(members):
        raise UserError(f"the plan names {sorted(missing)[0]!r}, which the model does not have; expected plan.units(model)")
    modules = dict(small.named_modules())
    with torch.no_grad():
        for unit, bits in plan.items():
            for n in members[unit]:
                modules[n].weight.copy_(rounding(modules[n].weight, bits, group_size))
    return small
