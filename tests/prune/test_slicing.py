"""Slicing: turning changes nothing, cutting keeps what flows, and the house model survives what cutting channels would not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

import tiny
from mmrecipes import data, evaluate, models, prune
from mmrecipes.errors import UserError
from mmrecipes.prune import slicing


@pytest.fixture(scope="module")
def rows():
    return data.calibration(16)


@pytest.fixture(scope="module")
def house():
    return models.load("mini-vlm")


def noisy(model, seed: int = 0):
    """Norms and biases of a fresh model are ones and zeros: with noise in them nothing is right by chance."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=chance))
    return model


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (lambda: noisy(tiny.house(layers=2)), prune.slice_language),
        (lambda: noisy(tiny.house(layers=2)), prune.slice_vision),
        (lambda: noisy(tiny.llava()), prune.slice_language),
    ],
    ids=["language", "vision", "llava"],
)
def test_turning_alone_changes_no_answer(make, cut, rows):
    model = make()
    part = "vision" if cut is prune.slice_vision else "language"
    width = models.config_of(model, part).hidden_size
    before = {k: v.clone() for k, v in model.state_dict().items()}
    turned = cut(model, width, rows)
    logits = [evaluate.answer_logits(m, rows)[0] for m in (model, turned)]
    # LayerNorm's vectors have one direction less than channels: nothing is lost with it
    assert torch.allclose(*logits, atol=2e-3 * logits[0].abs().max().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "a copy is turned"


def test_directions_are_a_rotation_that_sorts_what_flows(rows):
    model = tiny.house(layers=2)
    turn, shares = prune.directions(model, "language", rows)
    assert torch.allclose(turn.T @ turn, torch.eye(128), atol=1e-4)
    assert shares.sum().item() == pytest.approx(1, abs=1e-5) and (shares.diff() <= 1e-7).all()
    assert prune.kept(shares, [0, 128]) == {0: 0, 128: pytest.approx(1, abs=1e-5)}


def test_a_sliced_model_is_a_plain_checkpoint(rows, tmp_path):
    model = tiny.house(layers=2)
    thin = prune.slice_vision(prune.slice_language(model, 64, rows), 96, rows)
    models.save(thin, model.processor, tmp_path / "thin", dtype="auto")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "thin", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    again.processor = model.processor
    logits = [evaluate.answer_logits(m.eval(), rows)[0] for m in (thin, again)]
    assert torch.allclose(*logits, atol=1e-4)


def test_the_house_model_still_sees_and_speaks_where_cut_channels_would_silence_it(house, rows):
    probe = data.questions("validation", 42)
    reference = evaluate.answer_logits(house, probe)[0]

    def apart(model):
        return evaluate.divergence(reference, evaluate.answer_logits(model, probe)[0])

    scores = prune.magnitude_importance(house)["language"]["hidden"]
    cut = prune.keep_hidden_channels(house, "language", scores.topk(128).indices.sort().values.tolist())
    assert apart(prune.slice_language(house, 128, rows)) < 0.3 * apart(cut)
    assert apart(prune.slice_vision(house, 192, rows)) < 0.3


def test_factors_of_full_rank_are_exact_and_of_low_rank_the_closest():
    product = torch.randn(9, 4) @ torch.randn(4, 7)
    left, right = slicing._factor(product, 4)
    assert torch.allclose(left @ right, product, atol=1e-4) and (left.shape, right.shape) == ((9, 4), (4, 7))
    left, right = slicing._factor(product, 2)
    assert (left @ right - product).norm().item() == pytest.approx(torch.linalg.svdvals(product)[2:].norm().item(), rel=1e-3)


@pytest.mark.parametrize("width", [0, 63, 130])
def test_sizes_that_do_not_fit_are_refused(width, rows):
    for cut in (prune.slice_language, prune.slice_vision):
        with pytest.raises(UserError, match=f"hidden size {width}; expected a multiple of"):
            cut(tiny.house(), width, rows)


def test_other_vision_encoders_are_refused(rows):
    with pytest.raises(UserError, match="expected SigLIP's vision encoder"):
        prune.slice_vision(tiny.llava(), 16, rows)


def test_only_float32_on_the_cpu_is_sliced(rows):
    with pytest.raises(UserError, match=r"torch\.bfloat16 on cpu; slice it in float32"):
        prune.slice_language(tiny.house().to(torch.bfloat16), 64, rows)
