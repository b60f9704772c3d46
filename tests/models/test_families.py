"""Each family's directory is loaded, its image tokens are as many as its visual tokens, and it answers on all shapes."""

import json
import shutil

import pytest
import torch
from PIL import Image

from mmrecipes.errors import UserError
from mmrecipes.models import ask, load
from mmrecipes.models.processors import load_processor
from mmrecipes.models.prompts import batch_inputs, chat, chat_prompts
from tests import tiny
from tests.families import CHATS, DUALS, FAMILIES, family_dir

QUESTION = "What is there?"
SHAPES = {"landscape": (96, 48), "portrait": (40, 100), "square": (64, 64), "tiny": (9, 7)}
SMALLEST = {"mistral3": (20, 9)}  # for one visual token the library's own model raises


def drawn(width: int, height: int) -> Image.Image:
    noise = torch.Generator().manual_seed(width)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=noise, dtype=torch.uint8).numpy())


def visual_tokens(model, inputs) -> int:
    """How many tokens the vision encoder and the connector make of the images."""
    text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    found = model.get_image_features(**{k: v for k, v in inputs.items() if k not in text})
    found = getattr(found, "pooler_output", found)
    found = torch.cat([f.flatten(0, -2) for f in found]) if isinstance(found, list | tuple) else found.flatten(0, -2)
    return len(found)


@pytest.mark.parametrize("name", CHATS)
@torch.inference_mode()
def test_image_tokens_are_as_many_as_visual_ones_and_it_answers(name):
    model = FAMILIES[name]()
    for shape, size in SHAPES.items():
        image = drawn(*(SMALLEST.get(name, size) if shape == "tiny" else size))
        inputs = chat(model, image, QUESTION)
        image_id = getattr(model.config, "image_token_id", None) or model.config.image_token_index
        assert int((inputs["input_ids"] == image_id).sum()) == visual_tokens(model, inputs)
        assert torch.isfinite(model(**inputs).logits).all()
        assert isinstance(ask(model, image, QUESTION), str)


@pytest.mark.parametrize("name", CHATS)
def test_answers_without_an_image(name):
    model = FAMILIES[name]()
    if name == "paligemma":
        with pytest.raises(UserError, match="`images` are expected"):
            ask(model, None, QUESTION)
    else:
        assert isinstance(ask(model, None, QUESTION), str)


@pytest.mark.parametrize("name", DUALS)
def test_dual_encoders_compare(name):
    model = FAMILIES[name]()
    inputs = model.processor(images=[drawn(40, 30)], text=["a", "b"], padding="max_length", max_length=16, return_tensors="pt")
    assert model(**inputs).logits_per_image.shape == (1, 2)


def test_one_bos_whether_the_template_or_the_tokenizer_writes_it():
    for name in ("gemma3", "pixtral", "llava"):
        model = FAMILIES[name]()
        bos = model.processor.tokenizer.bos_token_id
        batch = batch_inputs(model, [drawn(40, 30)], chat_prompts(model.processor, [QUESTION]))
        for inputs in (batch, chat(model, drawn(40, 30), QUESTION)):
            assert inputs["input_ids"][0].tolist().count(bos) == 1, name


def test_templates_of_strings_are_filled(tmp_path):
    source = tmp_path / "strings"
    shutil.copytree(family_dir("llava"), source)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}")
    model = load(source)
    assert chat_prompts(model.processor, [QUESTION]) == [f"user: <image>\n{QUESTION} "]
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}")
    assert isinstance(ask(load(source), [drawn(40, 30), drawn(30, 40)], QUESTION), str)


def test_template_of_the_tokenizers_file_is_found(tmp_path):
    source = tmp_path / "old"
    shutil.copytree(family_dir("llava"), source)
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert load_processor(source).chat_template == template


def test_refused_with_the_cure():
    with pytest.raises(UserError, match="requires the Torchvision library"):
        FAMILIES["lfm2_vl"]()
    with pytest.raises(UserError, match="encoder-decoder"):
        ask(FAMILIES["florence2"](), drawn(40, 30), QUESTION)
    assert tiny.processor().tokenizer.bos_token == "<|im_start|>"  # families extend copies of the house tokenizer
