"""Faults of models and inputs that libraries pass over in silence, or tell in a traceback: each is told in one line."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image

import tiny
from mmrecipes import evaluate, models
from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.models import prompts
from mmrecipes.report import doctor
from tests import families

SCENE = scenes.render(scenes.make_scene(1))
QUESTION = "How many objects are there?"


def overflowing(dtype: torch.dtype = torch.float32):
    """A model whose vision encoder ends in numbers that fp16 cannot hold."""
    model = tiny.house()
    with torch.no_grad():
        model.model.vision_model.post_layernorm.weight.fill_(6e4)
    return model.to(dtype)


def test_fp16_that_overflows_is_told_with_the_first_module():
    model = overflowing(torch.float16)
    assert prompts.first_not_finite(model, models.chat(model, SCENE, QUESTION)) == "model.vision_model.post_layernorm"
    for call in (lambda: models.ask(model, SCENE, QUESTION), lambda: evaluate.answers(model, [SCENE], [QUESTION])):
        with pytest.raises(ParityError, match=r"not finite.*first in model\.vision_model\.post_layernorm.*load bf16"):
            call()
    half = overflowing(torch.bfloat16)
    assert prompts.first_not_finite(half, models.chat(half, SCENE, QUESTION)) is None
    assert isinstance(models.ask(half, SCENE, QUESTION, 2), str)


def test_the_doctor_tries_fp16_where_the_checkpoint_was_saved_in_it(tmp_path):
    tiny.save(overflowing(torch.float16), tmp_path / "half")
    tiny.save(tiny.house().half(), tmp_path / "fine")
    found = {}
    for name in ("half", "fine"):
        model = models.load(tmp_path / name)
        assert model.dtype == torch.float32 and model.saved_dtype == "float16"
        found[name] = [f for f in doctor.examine(model, models.chat(model, SCENE, QUESTION)).findings if f.technique == "fp16"]
    assert [(f.where, f.cure) for f in found["half"]] == [("model.vision_model.post_layernorm", "load it in bfloat16")]
    assert not found["fine"]


def test_parts_of_several_dtypes_are_told():
    model = tiny.house().bfloat16()
    model.model.vision_model.float()
    with pytest.raises(UserError, match=r"several dtypes meet.*vision.*float32.*language.*bfloat16.*load the model with one"):
        models.ask(model, SCENE, QUESTION)


def test_an_error_that_has_another_cause_stays():
    model = tiny.house()
    model.model.connector.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.ask(model, SCENE, QUESTION)


def test_the_image_token_in_a_question_is_refused_and_without_an_image_it_is_text():
    model = tiny.house()
    for call in (lambda: models.ask(model, SCENE, "What does <image> mean?"),
                 lambda: models.chat_prompts(model.processor, ["What does <image> mean?"])):  # fmt: skip
        with pytest.raises(UserError, match="contains <image>, which stands for an image; ask without it"):
            call()
    assert "<image>" in models.chat_prompts(model.processor, ["What does <image> mean?"], images=0)[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (6000, 20)])
def test_images_that_show_nothing_are_answered_with_a_warning(size):
    model = tiny.house()
    with pytest.warns(UserWarning, match=f"{size[0]} x {size[1]} px shows nothing, too small or narrow"):
        assert isinstance(models.ask(model, Image.new("RGB", size, "red"), QUESTION, 1), str)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models.chat(model, Image.new("RGB", (8, 400), "red"), QUESTION)


def test_an_aspect_ratio_beyond_the_processors_limit_is_told_with_both():
    model = families.FAMILIES["qwen2_5_vl"]()
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"must be smaller than 200, got 218\.6") as caught:
        models.ask(model, Image.new("RGB", (1093, 5)), QUESTION)
    assert "\n" not in str(caught.value)


def test_images_of_a_folder_that_cannot_be_read_are_left_out_and_listed(tmp_path):
    SCENE.save(tmp_path / "a.jfif", "JPEG")
    SCENE.save(tmp_path / "b.png")
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    with pytest.warns(UserWarning, match=r"2 of 4 images are left out: .*c\.heic: not an image.*d\.png: truncated"):
        found = models.load_images(tmp_path)
    assert [name for name, _ in found] == ["a.jfif", "b.png"]
