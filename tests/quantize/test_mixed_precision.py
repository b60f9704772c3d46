"""Plans: bytes are what packing takes, budgets are kept, and the knapsack finds the best."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from mmrecipes import data, models, quantize
from mmrecipes.errors import UserError


def made(seed: int, units: int = 5) -> list[quantize.Cost]:
    rng = random.Random(seed)
    costs = []
    for u in range(units):
        size, loss = rng.randint(500, 5000), 0.0
        for bits in (8, 4, 3, 2):
            loss += rng.random() ** 3
            costs.append(quantize.Cost(f"u{u}", "vision", bits, size * bits, loss))
    return costs


def total(costs, chosen) -> tuple[int, float]:
    picked = [c for c in costs if chosen[c.unit] == c.bits]
    return sum(c.bytes for c in picked), sum(c.loss for c in picked)


@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_both_keep_the_budget_and_the_knapsack_is_as_good_as_trying_everything(seed, share):
    costs = made(seed)
    budget = int(share * sum(c.bytes for c in costs if c.bits == 8))
    by_step, exact = quantize.greedy(costs, budget), quantize.knapsack(costs, budget)
    assert list(by_step) == list(exact) == [f"u{i}" for i in range(5)]
    for chosen in (by_step, exact):
        assert total(costs, chosen)[0] <= budget
    names = list(exact)
    every = (dict(zip(names, bits, strict=True)) for bits in itertools.product((8, 4, 3, 2), repeat=5))
    best = min(loss for size, loss in (total(costs, c) for c in every) if size <= 0.997 * budget)  # bytes count in 1/4000
    assert total(costs, exact)[1] <= best + 1e-6


@pytest.mark.parametrize("solve", [quantize.greedy, quantize.knapsack])
def test_a_budget_that_is_too_small_is_refused(solve):
    costs = made(0)
    least = sum(c.bytes for c in costs if c.bits == 2)
    with pytest.raises(UserError, match=f"too small.*{least} bytes"):
        solve(costs, least // 2)


@pytest.mark.parametrize("make", [tiny.house, tiny.llava, tiny.qwen2_5_vl], ids=["idefics3", "llava", "qwen2.5-vl"])
def test_units_hold_every_linear_layer_and_the_embeddings_once(make):
    model = make()
    members = [n for names in quantize.units(model).values() for n in names]
    modules = dict(model.named_modules())
    assert len(members) == len(set(members)) == len(dict(models.linears(model))) + 1
    assert modules[members[-1]] is model.get_input_embeddings()


@pytest.mark.parametrize("group_size", [None, 32])
def test_packed_bytes_add_up(group_size):
    model = tiny.house()
    eight, two = ({u: b for u in quantize.units(model)} for b in (8, 2))
    planned = sum(model.get_submodule(n).weight.numel() for names in quantize.units(model).values() for n in names)
    assert quantize.plan_bytes(model, eight, group_size) - quantize.plan_bytes(model, two, group_size) == planned * 6 // 8


@pytest.mark.parametrize("make", [tiny.house, tiny.llava], ids=["idefics3", "llava"])
def test_sensitivity_hurts_one_unit_at_a_time_and_a_plan_is_applied_as_said(make):
    model, rows = make(), data.calibration(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    costs = quantize.sensitivity(model, rows, bits=(8, 2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [(c.unit, c.bits) for c in costs] == [(u, b) for u in quantize.units(model) for b in (8, 2)]
    assert all(c.loss >= -1e-5 for c in costs)
    mild, rough = (sum(c.loss for c in costs if c.bits == b) for b in (8, 2))
    assert rough > 10 * mild
    assert {"vision", "connector", "language"} <= {c.part for c in costs}
    chosen = quantize.knapsack(costs, sum(c.bytes for c in costs if c.bits == 8) // 2)
    small = quantize.apply_plan(model, chosen)
    for unit, bits in chosen.items():
        for name in quantize.units(model)[unit]:
            assert len(small.get_submodule(name).weight[0].unique()) <= 2**bits
    with pytest.raises(UserError, match=r"'model\.nothing', which the model does not have"):
        quantize.apply_plan(model, {"model.nothing": 4})


@pytest.mark.parametrize("make", [tiny.house, tiny.llava], ids=["idefics3", "llava"])
def test_plans_are_rounded_by_gptq_behind_one_another_when_there_is_data(make):
    model, rows = make(), data.calibration(4)
    chosen = {u: 3 if i % 2 else 2 for i, u in enumerate(quantize.units(model))}
    small = quantize.apply_plan(model, chosen, rows=rows)
    for name, bits in quantize.bits_by_module(model, chosen).items():
        assert max(len(row.unique()) for row in small.get_submodule(name).weight) <= 2**bits
    rounding, name = quantize.gptq_rounding(model, rows), next(n for n, _ in models.linears(model))
    weight = model.get_submodule(name).weight
    assert torch.equal(rounding(name, weight, 2, None), small.get_submodule(name).weight), "the first layer has nothing before it"
    assert torch.equal(rounding("embeddings", weight, 3, None), quantize.search_round(weight, 3, None))
