"""Images of unusual sizes and kinds go through `mini-resampler`; a prompt too short for its image tokens is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmrecipes import data, evaluate, models
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import resampler
from tests import families

QUESTION = "How many objects are there?"
SCENE = scenes.render(scenes.make_scene(3), 128)
WIDE = SCENE.resize((128, 100))


@pytest.fixture(scope="module")
def model():
    return resampler.make_resampler(models.load("mini-vlm")).eval()


def tokens_of(model, image) -> torch.Tensor:
    """The visual tokens (64, width) of an image, or of an image file."""
    inputs = models.chat(model, image, QUESTION)
    with torch.inference_mode():
        return model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output


def saved(kind: str, folder):
    """An image file of `kind`, and the plain RGB image that it shows."""
    grey = SCENE.convert("L")
    deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by a quarter: show it turned back
    shown, image, options = {
        "grey.png": (grey, grey, {}),
        "alpha.png": (SCENE, SCENE.convert("RGBA"), {}),
        "deep.png": (grey, deep, {}),
        "animated.webp": (SCENE, SCENE, {"save_all": True, "append_images": [SCENE.rotate(180)], "lossless": True}),
        "turned.png": (WIDE.transpose(Image.Transpose.ROTATE_270), WIDE, {"exif": turned}),
    }[kind]
    image.save(folder / kind, **options)
    return folder / kind, shown.convert("RGB")


@pytest.mark.parametrize("kind", ["grey.png", "alpha.png", "deep.png", "animated.webp", "turned.png"])
def test_a_file_becomes_the_tokens_of_the_image_that_it_shows(model, tmp_path, kind):
    file, shown = saved(kind, tmp_path)
    torch.testing.assert_close(tokens_of(model, file), tokens_of(model, shown), rtol=0, atol=0)
    assert models.ask(model, file, QUESTION) == models.ask(model, shown, QUESTION)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (2000, 3), (7, 9)])
def test_a_very_small_or_narrow_image_is_read_with_a_warning_if_it_shows_nothing(model, size):
    with pytest.warns(UserWarning, match=f"{size[0]} x {size[1]} px shows nothing"):
        found = tokens_of(model, SCENE.resize(size))
    assert found.shape == (64, 256)
    assert found.isfinite().all()


@pytest.mark.parametrize("size", [(384, 96), (96, 384), (97, 383), (1024, 700)])
def test_any_other_size_is_read_without_one(model, size, recwarn):
    assert tokens_of(model, SCENE.resize(size)).isfinite().all()
    assert not [w for w in recwarn if "shows nothing" in str(w.message)]


# ---- prompts that are too short for their image tokens

CUT = ("mini-resampler", "llava", "minicpmv4_6", "qwen2_vl")


@pytest.fixture(scope="module", params=CUT)
def any_model(request, model):
    return model if request.param == "mini-resampler" else families.load(request.param)


def image_tokens(found, inputs) -> torch.Tensor:
    """Where the tokens of images are in the first prompt."""
    return (inputs["input_ids"][0] == found.processor.image_token_id).nonzero()[:, 0]


def test_a_truncated_prompt_is_refused_by_the_processor_or_the_model(any_model):
    """Never an answer about a part of an image."""
    text = models.prompts.chat_prompts(any_model.processor, [QUESTION])
    whole = any_model.processor(text=text, images=[[SCENE]], return_tensors="pt")
    keep = int(image_tokens(any_model, whole)[-1])  # the last one is cut off
    with pytest.raises(ValueError, match=r"[Mm]ismatch|do not match|match"):
        cut = any_model.processor(text=text, images=[[SCENE]], truncation=True, max_length=keep, return_tensors="pt")
        any_model(**cut)


def test_inputs_cut_by_hand_are_refused_by_the_model(any_model):
    inputs = dict(models.chat(any_model, SCENE, QUESTION))
    keep = int(image_tokens(any_model, inputs)[-1])
    length = inputs["input_ids"].shape[1]
    cut = {k: v[:, :keep] if v.ndim == 2 and v.shape[1] == length else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match="match"):
        any_model(**cut)


def test_images_that_do_not_fit_into_the_context_are_told_with_their_tokens(any_model, monkeypatch):
    inputs = models.chat(any_model, SCENE, QUESTION)
    n, length = len(image_tokens(any_model, inputs)), inputs["input_ids"].shape[1]
    monkeypatch.setattr(any_model.config.get_text_config(), "max_position_embeddings", n)
    says = rf"{length} tokens, {n} of them for images, and the model takes {n}: shorten it, or give fewer or smaller images"
    with pytest.raises(UserError, match=says):
        models.chat(any_model, SCENE, QUESTION)
    with pytest.raises(UserError, match="fewer or smaller images"):
        evaluate.vqa(any_model, data.test_split(2), progress=False)
