"""Adapters: they begin as nothing, learn alone, merge into the same function, and stand beside 4-bit and pruned matrices."""

from __future__ import annotations

import pytest
import torch

import tiny
from mmrecipes import data, evaluate, fit, lora, models, prune, quantize, shrink_torch
from mmrecipes.errors import ParityError, UserError

COURSE = fit.Course(6, 4, 0.001, 5e-3)


@pytest.fixture(scope="module")
def rows():
    return data.questions("train", 8)


def logits(model, rows):
    return evaluate.answer_logits(model, rows)[0]


@pytest.mark.parametrize("make", [tiny.house, tiny.llava])
def test_adapters_begin_as_nothing_and_learn_alone(make, rows):
    base = make()
    model = lora.adapted(base, 4)
    assert torch.allclose(logits(model.get_base_model(), rows), logits(base, rows), atol=1e-5)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model = lora.learn(model, COURSE, rows)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), make().parameters(), strict=True)), "a copy is adapted"
    merged = lora.merged(model)
    assert type(merged) is type(base) and not any("lora" in n for n, _ in merged.named_parameters())
    assert torch.allclose(logits(merged, rows), logits(model.get_base_model(), rows), atol=1e-4)
    assert not torch.allclose(logits(merged, rows), logits(base, rows), atol=1e-4)
    assert any("lora_" in n for n, _ in model.named_parameters()), "merging leaves the adapted model as it was"


def test_the_loss_of_its_rows_falls(rows):
    def loss(m):
        found, wanted = evaluate.answer_logits(m, rows)
        return torch.nn.functional.cross_entropy(found, wanted).item()

    base = tiny.house()
    taught = lora.merged(lora.learn(lora.adapted(base, 4), fit.Course(20, 4, 0.001, 1e-2), rows))
    assert loss(taught) < loss(base) - 0.3


def test_house_lessons_are_the_default_and_parts_can_be_chosen(house_vlm, tmp_path):
    model = lora.adapted(models.load(house_vlm), 2, parts=("language",))
    assert not any("vision" in n for n, p in model.named_parameters() if p.requires_grad)
    lora.learn(model, fit.Course(2, 4, 0.001, 1e-3), work=tmp_path)
    assert "reading" in fit.log(tmp_path), "lessons log what is right, by family"


def test_a_training_is_taken_up_where_it_was_left(rows, tmp_path):
    whole = lora.learn(lora.adapted(tiny.house(), 2), COURSE, rows)
    lora.learn(lora.adapted(tiny.house(), 2), COURSE, rows, tmp_path)
    again = lora.learn(lora.adapted(tiny.house(), 2), COURSE, rows, tmp_path)  # its last checkpoint is the end
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_merging_fills_zeros_and_adapters_beside_keep_them(rows):
    sparse = tiny.house()
    with torch.no_grad():
        for _, layer in quantize.linears(sparse):
            layer.weight.copy_(prune.magnitude_prune(layer.weight, 0.5))
    model = lora.learn(lora.adapted(sparse, 4), COURSE, rows)

    def zeros(m):
        return {n.replace(".base_layer", "").replace("base_model.model.", ""): (p == 0).float().mean().item()
                for n, p in m.named_parameters() if p.ndim == 2 and "lora_" not in n}  # fmt: skip

    name = next(n for n, _ in quantize.linears(sparse)) + ".weight"
    assert zeros(model)[name] == zeros(sparse)[name] >= 0.49
    assert zeros(lora.merged(model))[name] < 0.01


def test_four_bit_matrices_are_adapted_too(house_vlm, rows, tmp_path):
    house = models.load(house_vlm)
    shrink_torch.write(house, shrink_torch.can(house), tmp_path / "nf4")
    four = shrink_torch.load(tmp_path / "nf4")
    model = lora.adapted(four, 4)
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed, "the matrices are packed"
    model = lora.learn(model, COURSE, rows)
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    found = logits(model.get_base_model(), rows)
    assert torch.isfinite(found).all() and not torch.allclose(found, logits(four, rows), atol=1e-3)
    again = lora.merged(model)
    assert any(p.dtype == torch.uint8 for p in again.parameters()), "rounded to four bits again"
    assert torch.isfinite(logits(again, rows)).all()


def test_bad_input_is_refused(rows):
    with pytest.raises(UserError, match="rank 0 in vision, connector, language; expected 1 or more"):
        lora.adapted(tiny.house(), 0)
    with pytest.raises(UserError, match="in wings; expected 1 or more, in vision"):
        lora.adapted(tiny.house(), 2, parts=("wings",))
    with pytest.raises(UserError, match="8 rows for batches of 16"):
        lora.learn(lora.adapted(tiny.house(), 2), fit.Course(1, 16), rows)
    broken = lora.adapted(tiny.house(), 2)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n).fill_(float("inf"))
    with pytest.raises(ParityError, match="not finite; train with a lower rate"):
        lora.merged(broken)
