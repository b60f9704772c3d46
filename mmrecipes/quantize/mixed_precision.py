"""Mixed precision: round each unit alone, measure its loss, then spend a byte budget where it helps. By hand in notebook 13."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrecipes import quiet
from mmrecipes.errors import UserError
from mmrecipes.evaluate.generation import answer_logits, divergence
from mmrecipes.models.modules import clone, linears, part_of
from mmrecipes.models.prompts import Rows
from mmrecipes.quantize.calibration import calibrate_, input_hessians
from mmrecipes.quantize.gptq import gptq_round
from mmrecipes.quantize.replay import Call, language_calls, replayed_logits
from mmrecipes.quantize.rounding import changed, packed_bytes, packed_weight_bytes, search_round

BITS = (8, 6, 4, 3, 2)
Round = Callable[[str, Tensor, int, int | None], Tensor]  # module's name, weight (out, in), bits, group size -> rounded weight


def gptq_rounding(model: nn.Module, rows: Rows) -> Round:
    """Rounding by GPTQ on the inputs that each layer of `model` gets from `rows`; embeddings have none, so `search_round`."""
    hessians = input_hessians(model, rows, [n for n, _ in linears(model)])
    return lambda name, w, *how: gptq_round(w, hessians[name], *how) if name in hessians else search_round(w, *how)


@dataclass(frozen=True)
class Cost:
    """What one unit costs at one precision, everything else left alone."""

    unit: str
    part: str
    bits: int
    bytes: int
    loss: float  # Kullback-Leibler divergence from the unrounded model, nats an answer token


def units(model: nn.Module) -> dict[str, list[str]]:
    """What a plan decides on {name: its weights' modules}: the linear layers of one attention or MLP; the token embeddings."""
    members: dict[str, list[str]] = {}
    for name, _ in linears(model):
        members.setdefault(name.rpartition(".")[0] or name, []).append(name)
    embeddings = model.get_input_embeddings()
    return members | {n: [n] for n, m in model.named_modules() if m is embeddings}


def bits_by_module(model: nn.Module, plan: Mapping[str, int]) -> dict[str, int]:
    """The plan a module instead of a unit: {module's name: bits}. UserError when it names a unit that is not there."""
    members = units(model)
    if missing := sorted(set(plan) - set(members)):
        raise UserError(f"the plan names {missing[0]!r}, which the model does not have; expected quantize.units(model)")
    return {n: bits for unit, bits in plan.items() for n in members[unit]}


def plan_bytes(model: nn.Module, plan: Mapping[str, int], group_size: int | None = None) -> int:
    """Bytes when each unit is packed to its bits: a 16-bit scale a row or group; everything else in 16 bits."""
    return packed_bytes(model, bits_by_module(model, plan), "group" if group_size else "channel", group_size or 0)


def sensitivity(
    model: nn.Module, rows: Rows, bits: Sequence[int] = BITS, group_size: int | None = None, rounding: Round | None = None
) -> list[Cost]:
    """The cost of each unit of `model` at each of `bits`, alone, on `rows`; by `search_round` where no `rounding` is given."""
    from tqdm.auto import tqdm

    small, parts, per, costs = clone(model), part_of(model), "group" if group_size else "channel", []
    embeddings = [n for n, m in small.named_modules() if isinstance(m, nn.Embedding)]
    reference, _ = answer_logits(small, rows)
    replay = _replay(small, rows, reference)
    for unit, names in tqdm(units(small).items(), disable=quiet.progress_hidden(), desc="sensitivity", leave=False):
        weights = {n: small.get_submodule(n).weight.detach() for n in names}
        originals = {n: w.clone() for n, w in weights.items()}
        for b in bits:
            for n, w in originals.items():
                weights[n].copy_(rounding(n, w, b, group_size) if rounding else search_round(w, b, group_size))
            inside = all(parts[f"{n}.weight"] == "language" and n not in embeddings for n in names)
            logits = replayed_logits(small, replay) if inside and replay else answer_logits(small, rows)[0]
            loss = divergence(reference, logits)
            size = sum(packed_weight_bytes(w, b, per, group_size or 0) for w in weights.values())
            costs.append(Cost(unit, parts[f"{names[0]}.weight"], b, size, loss))
        for n, w in originals.items():
            weights[n].copy_(w)
    return costs


def _replay(model: nn.Module, rows: Rows, logits: Tensor) -> list[Call]:
    """Calls of the language model that give the same `logits` again; none where a model does more than that around it."""
    try:
        calls = language_calls(model, rows)
        return calls if torch.allclose(replayed_logits(model, calls), logits, rtol=1e-3, atol=1e-3) else []
    except (AttributeError, KeyError, TypeError, ValueError):  # an output or a call of another shape: the whole model, then
        return []


def greedy(costs: Sequence[Cost], budget: int) -> dict[str, int]:
    """{unit: bits} of at most `budget` bytes: from the most bits on, always take the step down that loses least a byte saved."""
    table = _table(costs)
    plan = {unit: max(row) for unit, row in table.items()}
    while sum(table[u][b].bytes for u, b in plan.items()) > budget:
        steps = [(row[plan[u]], c) for u, row in table.items() for b, c in row.items() if b < plan[u]]
        if not steps:
            raise _too_small(table, budget)
        _, unit, b = min(((c.loss - now.loss) / (now.bytes - c.bytes), c.unit, c.bits) for now, c in steps)
        plan[unit] = b
    return plan


def knapsack(costs: Sequence[Cost], budget: int, slots: int = 4000) -> dict[str, int]:
    """{unit: bits} of at most `budget` bytes with the least sum of losses, up to bytes counted in 1/`slots` of it.
    Multiple-choice knapsack by dynamic programming. Assumes that losses add up: roughly so where they are small.
    """
    table, slot = _table(costs), budget / slots
    least, picks = torch.zeros(slots + 1), []  # least[s]: the smallest loss of the units so far in at most s slots
    for row in table.values():
        options = torch.full((len(row), slots + 1), torch.inf)
        for i, c in enumerate(row.values()):
            if (k := int(-(-c.bytes // slot))) <= slots:
                options[i, k:] = least[: slots + 1 - k] + c.loss
        least, pick = options.min(0)
        picks.append(pick)
    if not torch.isfinite(least[-1]):
        raise _too_small(table, budget)
    plan, s = {}, slots
    for (unit, row), pick in zip(reversed(table.items()), reversed(picks), strict=True):
        cost = list(row.values())[int(pick[s])]
        plan[unit] = cost.bits
        s -= int(-(-cost.bytes // slot))
    return dict(reversed(plan.items()))


def _table(costs: Sequence[Cost]) -> dict[str, dict[int, Cost]]:
    return {unit: {c.bits: c for c in costs if c.unit == unit} for unit in dict.fromkeys(c.unit for c in costs)}


def _too_small(table: dict[str, dict[int, Cost]], budget: int) -> UserError:
    least = sum(min(c.bytes for c in row.values()) for row in table.values())
    return UserError(f"a budget of {budget} bytes is too small: at the fewest bits tried, the units take {least} bytes")


def apply_plan(model: nn.Module, plan: Mapping[str, int], group_size: int | None = None, rows: Rows | None = None) -> nn.Module:
    """A copy with each unit rounded to its bits in `plan`, in floating point; with `rows`, linear layers by `calibrate`."""
    bits = bits_by_module(model, plan)
    by_gptq = {n: bits[n] for n, _ in linears(model) if n in bits} if rows is not None else {}
    by_search = {n: b for n, b in bits.items() if n not in by_gptq}
    small = changed(model, by_search, lambda weight, b: search_round(weight, b, group_size))
    return calibrate_(small, rows, by_gptq, group_size=group_size) if by_gptq else small
