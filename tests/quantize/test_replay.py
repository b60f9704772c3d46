"""The language model's own inputs, kept: the same Hessians and logits as from whole passes."""

import pytest
import torch

from mmrecipes import data, evaluate, models, quantize
from mmrecipes.models.modules import linears, part_of
from mmrecipes.quantize.replay import language_calls, replayed_logits
from tests import families


@pytest.fixture(scope="module", params=["smolvlm", "qwen3_vl", "gemma3"])  # tiles; features in several layers; masks
def model(request):
    return families.load(request.param)


@pytest.fixture(scope="module")
def rows():
    return data.questions("train", 3, size=64)


def test_hessians_are_those_of_whole_passes(model, rows):
    names = [name for name, _ in linears(model) if part_of(model)[f"{name}.weight"] == "language"]
    whole = quantize.input_hessians(model, rows, names)
    replayed = quantize.input_hessians(model, rows, names, calls=language_calls(model, rows, 2))
    for name in names:
        torch.testing.assert_close(replayed[name], whole[name], rtol=1e-4, atol=1e-6)


def test_logits_are_those_of_whole_passes(model, rows):
    wanted, _ = evaluate.answer_logits(model, rows)
    torch.testing.assert_close(replayed_logits(model, language_calls(model, rows)), wanted, rtol=1e-4, atol=1e-4)


def test_a_vision_layer_is_calibrated_without_the_language_model(model, rows, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the language model ran")

    first = next(name for name, _ in linears(model) if part_of(model)[f"{name}.weight"] == "vision")
    whole = quantize.input_hessians(model, rows, [first])
    monkeypatch.setattr(models.parts(model)["language"], "forward", never)
    assert torch.equal(quantize.input_hessians(model, rows, [first])[first], whole[first])


def test_large_images_come_in_small_batches(model, monkeypatch):
    from mmrecipes.models import prompts

    rows = {"image": [data.questions("train", 1, size=64)[0]["image"]]}
    assert prompts.rows_at_once(model, rows, 7) == 7
    monkeypatch.setattr(prompts, "PIXEL_VALUES", 1)
    assert prompts.rows_at_once(model, rows, 7) == 1
