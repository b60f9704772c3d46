"""`mini-resampler`: images of any size, alone and padded beside others, saved with its own code, and trained."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmrecipes import data, evaluate, export, inference, models, train
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import modeling_mini_resampler as modeling
from mmrecipes.mini import resampler

SIZES = st.tuples(st.integers(resampler.SMALLEST, 256), st.integers(resampler.SMALLEST, 256))  # width, height in px
QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def model():
    return resampler.make_resampler(models.load("mini-vlm")).eval()


def inputs_of(model, *images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """One conversation for each list of images, together as the processor pads them."""
    content = [[*({"type": "image"} for _ in own), {"type": "text", "text": QUESTION}] for own in images]
    turns = [[{"role": "user", "content": each}] for each in content]
    prompts = [model.processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    given_images = {"images": list(images)} if any(images) else {}
    return dict(model.processor(text=prompts, padding=True, return_tensors="pt", **given_images))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(SIZES, min_size=2, max_size=4))
def test_images_padded_beside_others_become_the_tokens_they_become_alone(model, sizes):
    drawn = [scenes.render(scenes.make_scene(i), 200).resize(size) for i, size in enumerate(sizes)]
    with torch.inference_mode():
        together = model(**inputs_of(model, *([image] for image in drawn))).logits
        for image, found in zip(drawn, together, strict=True):
            alone = model(**inputs_of(model, [image])).logits[0]
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=1e-4)


def test_two_images_and_none(model):
    image = scenes.render(scenes.make_scene(1), 160)
    with torch.inference_mode():
        assert model(**inputs_of(model, [image, image.resize((96, 200))])).logits.isfinite().all()
        assert model(**inputs_of(model, [])).logits.isfinite().all()


def test_an_image_too_many_is_told(model):
    inputs = inputs_of(model, [scenes.render(scenes.make_scene(1), 160)])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(1, 2, 1, 1, 1)
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match="do not match, tokens: 64, features: 128"):
        model(**inputs)


def test_what_mini_vlm_knows_is_of_use_before_any_training(model):
    """Queries that look around a place of their own hand on what the vision encoder sees."""
    rows = data.test_split(140)
    found = evaluate.vqa(model, rows, progress=False)
    assert found.overall.value > 0.6 > max(found.floors.values())


def test_positions_are_shares_of_the_image():
    narrow = torch.zeros(1, 4, 6, dtype=torch.bool)
    narrow[:, :4, :2] = True  # two real columns, four of padding
    at = modeling.places(narrow)[0].view(4, 6, 2)
    torch.testing.assert_close(at[0, :2, 0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(at[:, 0, 1], torch.tensor([0.125, 0.375, 0.625, 0.875]))


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("int8", 0.1)])
def test_exports_answer_as_it_does_at_any_size(model, tmp_path, runtime, precision, close):
    out = export.export(model, tmp_path / "out", runtime, precision)
    loaded = inference.load_exported(out)
    assert max(export.parity(model, loaded, close).values()) <= close
    for size in ((96, 96), (384, 130), (100, 301), (1, 700)):
        image = scenes.render(scenes.make_scene(4), 200).resize(size)
        with torch.inference_mode():
            wanted = model.get_image_features(*(inputs_of(model, [image])[k] for k in ("pixel_values", "pixel_attention_mask")))
        found = loaded.encode_images(loaded.inputs(image, QUESTION))
        error = torch.dist(torch.from_numpy(found), wanted.pooler_output) / wanted.pooler_output.norm()
        assert error <= close, size


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_four_bits_of_the_committed_model_answer_as_it_does(runtime, tmp_path):
    model, rows = models.load("mini-resampler"), data.test_split(12)
    loaded = inference.load_exported(export.export(model, tmp_path / "out", runtime, "int4"))
    wanted = [models.ask(model, row["image"], row["question"]) for row in rows]
    assert sum(loaded.generate(r["image"], r["question"]) == w for r, w in zip(rows, wanted, strict=True)) >= 10


def test_training_resumes_and_writes_a_model_with_its_code(tmp_path):
    stages = {name: train.TrainConfig(2, 2, 1e-4, 1e-4, checkpoint_every=1) for name in resampler.STAGES}
    out = resampler.train_mini_resampler(tmp_path / "model", tmp_path / "work", stages)
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].startswith("modeling_mini_resampler.")
    assert (out / "modeling_mini_resampler.py").is_file()
    with pytest.raises(UserError, match="trust_remote_code=True"):
        models.load(out)
    loaded = models.load(out, trust_remote_code=True)
    assert list(models.parts(loaded)) == ["vision", "connector", "language", "head"]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    again = resampler.train_mini_resampler(tmp_path / "again", tmp_path / "work", stages)  # nothing is left to do
    for name, p in models.load(again, trust_remote_code=True).named_parameters():
        torch.testing.assert_close(p, loaded.get_parameter(name), rtol=0, atol=0)


def test_the_code_beside_the_committed_weights_is_the_packages():
    beside = models.data_dir() / "models" / "mini-resampler" / "modeling_mini_resampler.py"
    assert beside.read_text(encoding="utf-8") == Path(modeling.__file__).read_text(encoding="utf-8")


def test_batches_hold_images_of_many_shapes(model):
    drawn = resampler.ResizedChats(data.block("mini-resampler/chat"), 40, 1, model.processor.tokenizer)
    shapes = {tuple(drawn[i].images.shape[-2:]) for i in range(40)}
    sides = [side for shape in shapes for side in shape]
    assert min(sides) >= resampler.SMALLEST and max(sides) <= resampler.LARGEST
    assert {"wide", "tall", "square"} == {"wide" if w > h else "tall" if h > w else "square" for h, w in shapes}


def test_the_vision_encoder_learns_from_what_it_sees_at_128_px(model):
    drawn = resampler.TwoSizes(data.block("mini-resampler/chat"), 40, 1)
    teacher = models.load("mini-vlm").model.vision_model
    for i in range(20):
        images, small, inside = drawn[i]
        side = int(inside.sum() ** 0.5)
        corner = inside[0].nonzero()[0] * 16
        y, x = (int(n) for n in corner)
        scene = images[:, :, y : y + 16 * side, x : x + 16 * side]  # what the patches that `inside` marks show
        torch.testing.assert_close(scene.mean((2, 3)), small.mean((2, 3)), atol=0.02, rtol=0)
        with torch.no_grad():
            loss = resampler.sizes_loss(model, drawn[i], teacher)[0].item()
        assert 0 <= loss < 2 and (loss > 0.1 or min(images.shape[-2:]) <= 128)
    same = torch.ones(1, 8, 8, dtype=torch.bool)
    with torch.no_grad():  # at 128 px an untrained encoder still is its teacher
        assert resampler.sizes_loss(model, (small, small, same), teacher)[0] < 1e-6


@pytest.mark.parametrize("size", [(96, 96), (256, 256), (384, 384), (384, 192)])
def test_the_committed_model_answers_at_any_size(size):
    """The whole measurement is benchmarks/resampler.py; here its lower end, so that a damaged model is found."""
    found = evaluate.vqa(models.load("mini-resampler"), resampler.resized(data.test_split(84), size), progress=False)
    assert found.overall.value > 0.8


def test_prompts_of_training_are_the_processors(model):
    """The tokens of a packed question are those that its processor makes of it alone."""
    batch = resampler.ResizedChats(data.block("mini-resampler/chat"), 1, 1, model.processor.tokenizer)[0]
    ids, segments = batch.ids[0], batch.segments[0]
    prompt = ids[(segments == 0) | ((segments == 1) & (batch.answers[0] < 0))]
    text = model.processor.tokenizer.decode(ids[(segments == 1) & (batch.answers[0] < 0)])
    question = text.partition("<end_of_utterance>")[0].strip()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    asked = model.processor.apply_chat_template(turn, add_generation_prompt=True)
    image = scenes.render(scenes.make_scene(1), 128)
    assert model.processor(text=[asked], images=[[image]])["input_ids"][0] == prompt.tolist()
