"""mini-siglip: what it is made of, what it is trained on, and how good the committed one is."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from mmrecipes import data, distill, evaluate, models, train
from mmrecipes.data import families, scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import batches, labels, siglip
from paths import ROOT

HOUSE = ROOT / "data" / "models" / "mini-siglip"


@pytest.fixture(scope="module")
def processor():
    return siglip.make_processor()


def test_captions_are_padded_to_one_length_and_end_in_the_same_token(processor):
    texts = [families.caption(scenes.make_scene(s), full=True) for s in range(500)]
    ids = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (500, batches.CAPTION_LENGTH)
    assert (ids[:, -1] == processor.tokenizer.eos_token_id).all(), "a caption was cut"
    assert processor.tokenizer.decode(ids[7], skip_special_tokens=True) == texts[7]


def test_pixels_are_what_the_processor_makes(processor):
    scene = scenes.make_scene(5)
    made = processor(images=[scenes.render(scene)], return_tensors="pt")["pixel_values"][0]
    assert (made - torch.from_numpy(labels.pixels(scene))).abs().max() < 1e-6


def test_a_batch_is_a_function_of_its_number(processor):
    one, two, other = (batches.CaptionBatches(range(20, 60), 9, 4, processor.tokenizer)[k] for k in (2, 2, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.images, other.images)
    scene = scenes.make_scene(7 * 4)
    assert {k for k, i in batches.NAMES.items() if one.there[0, 0, i]} == {t.name for t in scene.things}
    assert processor.tokenizer.decode(one.captions[0], skip_special_tokens=True) == families.caption(scene)
    assert (one.captions != one.negatives).any(-1).all()


def test_the_loss_is_the_librarys(processor):
    model = siglip.make_siglip(len(processor.tokenizer), 64, 1, 1).eval()
    batch = batches.CaptionBatches(range(6), 1, 6, processor.tokenizer)[0]
    with torch.no_grad():
        wanted = model(input_ids=batch.captions, pixel_values=batch.images, return_loss=True).loss
        image, text = distill.embed(model, batch.images), distill.embed(model, ids=batch.captions)
        assert distill.siglip_loss(image, text, model.logit_scale, model.logit_bias).item() == pytest.approx(
            wanted.item(), rel=1e-5
        )


def test_the_first_loss_is_that_of_a_model_that_expects_nothing():
    image, text = torch.eye(4, 8), torch.zeros(8, 8)
    text[:, -1] = 1  # at right angles: every logit is the bias
    loss = distill.siglip_loss(image, text, torch.tensor(math.log(10)), torch.tensor(-10.0))
    assert loss.item() == pytest.approx(10, abs=0.01)  # only the four true pairs are a surprise


def test_training_writes_a_model_that_the_library_loads(tmp_path):
    stages = {"dense": train.TrainConfig(2, 2, 0.005, 1e-3), "contrast": train.TrainConfig(2, 2, 0.005, 1e-3)}
    out = siglip.train_mini_siglip(tmp_path / "out", tmp_path / "work", stages)
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = AutoProcessor.from_pretrained(out)(text=["a red circle"], padding="max_length", return_tensors="pt")
    assert type(model).__name__ == "SiglipModel" and found["input_ids"].shape == (1, batches.CAPTION_LENGTH)
    assert "attention_mask" not in found, "SigLIP's text encoder is trained, and must be asked, without one"
    assert (out / "training.json").is_file()


def test_a_foreign_directory_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        siglip.train_mini_siglip(tmp_path, tmp_path / "work")
    assert not (tmp_path / "work").exists()


# ---- the committed model


@pytest.fixture(scope="module")
def house():
    return models.load("mini-siglip")


def test_it_is_small(house):
    assert (HOUSE / "model.safetensors").stat().st_size < 12e6
    assert sum(p.numel() for p in house.parameters()) < 3.5e6


def test_it_finds_pictures_and_captions(house):
    found = evaluate.retrieval_scores(house, evaluate.gallery(n=200))
    assert found.text_r1.value > 0.9 and found.image_r1.value > 0.9
    assert found.hard_negative_accuracy.value > 0.95 and found.matching_accuracy.value > 0.85


def test_it_names_attributes_without_training_for_it(house):
    found = evaluate.zero_shot(house, n=100)
    assert {k: v.value > 0.8 for k, v in found.items()} == dict.fromkeys(("colour", "shape", "size"), True), found


def test_it_loads_without_this_package():
    model, processor = AutoModel.from_pretrained(HOUSE), AutoProcessor.from_pretrained(HOUSE)
    scene = scenes.make_scene(data.SPLITS["test"][0])
    texts = [families.caption(scene), families.hard_negative(scene)[0]]
    inputs = processor(images=[scenes.render(scene)], text=texts, padding="max_length", return_tensors="pt")
    assert set(inputs) == {"input_ids", "pixel_values"}, "a mask would change what it was trained on"
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    assert logits[0] > logits[1]


def test_it_cannot_chat_and_says_so(house):
    with pytest.raises(UserError, match="compares images with texts"):
        models.chat(house, scenes.render(scenes.make_scene(1)), "What is this?")


def test_published_results_are_of_this_model():
    import json

    found = json.loads((ROOT / "results" / "mini-siglip.json").read_text())
    assert found["parameters"] == sum(p.numel() for p in AutoModel.from_pretrained(HOUSE).parameters())
    assert found["text_r1"]["n"] >= 1000 and evaluate.Share(**found["text_r1"]).low > 0.85
