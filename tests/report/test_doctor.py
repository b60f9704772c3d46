"""The doctor finds what resists: weights read past their layer, group norms, custom operators, odd shapes, mixed dtypes."""

import pytest
import torch
from torch import nn

import tiny
from mmrecipes import models
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.report import doctor


@torch.library.custom_op("mmrecipes_test::swirl", mutates_args=())
def swirl(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


class Resists(nn.Module):
    """A wrapper that does to a tower's output what quantizers can't follow."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner, self.side = inner, nn.Linear(width, width)
        self.norm, self.odd = nn.GroupNorm(4, width), nn.Linear(width, 24)
        self.back = nn.Linear(24, width)

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        x = out.last_hidden_state
        y = nn.functional.linear(x, self.side.weight)  # reads the weight past the layer
        y = self.norm(swirl(y).flatten(0, 1)).view_as(y)
        out.last_hidden_state = x + self.back(self.odd(y))
        return out


@pytest.fixture(scope="module")
def asked():
    model = tiny.house()
    return model, models.chat(model, scenes.render(scenes.make_scene(1)), "How many objects are there?")


def test_a_plain_model_has_only_its_tied_embeddings_noted(asked):
    found = doctor.examine(*asked)
    assert [(f.technique, f.where) for f in found.findings] == [("4-bit weights", "lm_head")]
    assert {(v.technique, v.stage) for v in found.verdicts} == {
        (t, s) for t in ("bf16", "dynamic int8") for s in ("vision", "prefill", "decode")
    }
    assert all(v.runs and v.faster > 0 for v in found.verdicts)


def test_what_resists_is_found_and_named():
    model = tiny.house()
    model.model.vision_model = Resists(model.model.vision_model, 128)
    inputs = models.chat(model, scenes.render(scenes.make_scene(1)), "How many objects are there?")
    found = {(f.technique, f.where): f for f in doctor.examine(model, inputs).findings}
    assert "past its layer" in found["dynamic int8, 4-bit layers", "model.vision_model.side"].what
    assert "GroupNorm" in found["static int8", "model.vision_model.norm"].what
    assert "called 1x" in found["static int8, export", "mmrecipes_test::swirl"].what
    assert "24 inputs do not divide by 32, 64, 128" in found["4-bit weights in groups", "model.vision_model.back"].what
    assert not any(v.runs for v in doctor.examine(model, inputs).verdicts if v.technique == "dynamic int8")


@pytest.mark.parametrize("make", [tiny.llava], ids=["llava"])
def test_a_foreign_model_is_examined_too(make):
    model = make()
    found = doctor.examine(model, models.chat(model, scenes.render(scenes.make_scene(1), 64), "How many?"))
    assert {p["part"] for p in found.parts} >= {"vision", "connector", "language"}
    assert found.verdicts


def test_mixed_and_half_dtypes_are_noted(asked):
    model = tiny.house().bfloat16()
    inputs = models.chat(model, scenes.render(scenes.make_scene(1)), "How many?")
    assert any("bfloat16; eager int8 starts from float32" in f.what for f in doctor.examine(model, inputs).findings)
    with pytest.raises(UserError, match="does not answer questions"):
        models.chat(tiny.siglip(), scenes.render(scenes.make_scene(1)), "How many?")
