"""Retrieval, matching and zero-shot naming: right where the answer is known, on SigLIP and on CLIP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from mmrecipes import data, evaluate
from mmrecipes.data import families, scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate import retrieval


class Perfect(nn.Module):
    """A dual encoder whose vectors are what a lookup says: pictures by their bytes, captions by their words."""

    def __init__(self, table: dict, width: int):
        super().__init__()
        self.table, self.width = table, width
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-10.0))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=64))

    def processor(self, images=None, text=None, **_):
        keys = [i.tobytes() for i in images] if text is None else text
        rows = F.one_hot(torch.tensor([self.table[k] for k in keys]), self.width).float()

        class Inputs(dict):
            def to(self, *_):
                return self

        return Inputs(pixel_values=rows) if text is None else Inputs(input_ids=rows)

    def get_image_features(self, pixel_values):
        return pixel_values

    def get_text_features(self, input_ids):
        return input_ids


@pytest.fixture(scope="module")
def seen():
    return evaluate.gallery("validation", 20)


def test_a_perfect_model_is_perfect_and_one_that_is_blind_to_the_change_is_not(seen):
    table = {i.tobytes(): k for k, i in enumerate(seen.images)} | {c: k for k, c in enumerate(seen.captions)}
    apart = {i.tobytes(): 20 + k for k, i in enumerate(seen.near_images)} | {c: 20 + k for k, c in enumerate(seen.negatives)}
    found = evaluate.retrieval_scores(Perfect(table | apart, 40), seen, pool=10)
    shares = (found.text_r1, found.image_r1, found.hard_negative_accuracy, found.matching_accuracy)
    assert [s.value for s in shares] == [1, 1, 1, 1]
    assert found.text_r1.n == 20 and found.matching_accuracy.n == 40 and sum(s.n for s in found.attributes.values()) == 20
    same = {i.tobytes(): k for k, i in enumerate(seen.near_images)} | {c: k for k, c in enumerate(seen.negatives)}
    blind = evaluate.retrieval_scores(Perfect(table | same, 40), seen, pool=10)
    assert blind.hard_negative_accuracy.value == 0 and blind.matching_accuracy.value == 0.5, "a tie is no telling apart"


def test_a_random_model_finds_by_chance(seen):
    found = evaluate.retrieval_scores(tiny.siglip_128(), evaluate.gallery("validation", 100), pool=50)
    assert found.text_r1.value < 0.2 and found.image_r1.value < 0.2
    assert 0.2 < found.hard_negative_accuracy.value < 0.8 and len(found.right["text_r1"]) == 100


def test_clip_is_measured_too(seen):
    found = evaluate.retrieval_scores(tiny.clip_128(), seen, pool=10)
    assert found.text_r1.n == 20 and found.matching_accuracy is None, "CLIP has no yes or no"
    assert evaluate.zero_shot(tiny.clip_128(), "validation", 4)["colour"].n == 4


def test_hard_negatives_differ_in_one_word_and_their_pictures_in_one_object(seen):
    for k in range(20):
        scene = scenes.make_scene(data.SPLITS["validation"][k])
        near, key = scenes.changed(scene)
        assert (families.caption(near), key) == families.hard_negative(scene)
        odd = [(a, b) for a, b in zip(scene.things, near.things, strict=True) if a != b]
        assert len(odd) == 1 and key == seen.attributes[k] and key in ("colour", "shape")
        (old, new) = odd[0]
        assert (old.rgb != new.rgb) == (key == "colour") and (old.x, old.y, old.radius) == (new.x, new.y, new.radius)
        assert seen.images[k].tobytes() != seen.near_images[k].tobytes()


def test_zero_shot_tries_every_value_that_is_free():
    scene = scenes.make_scene(3)
    texts = retrieval._variants(scene, 0, "colour", evaluate.CHOICES["colour"])
    taken = {t.colour for t in scene.things[1:] if t.shape == scene.things[0].shape}
    assert texts[0] == families.caption(scene, full=True) and len(texts) == len(set(texts)) == 8 - len(taken)


def test_the_gap_between_modalities():
    image, text = F.normalize(torch.randn(50, 8), dim=-1), F.normalize(torch.randn(50, 8), dim=-1)
    assert evaluate.modality_gap(image, image) == 0
    assert evaluate.modality_gap(image, -image) == pytest.approx(2 * image.mean(0).norm().item())
    assert evaluate.modality_gap(image, text) > 0


def test_what_cannot_be_measured_is_refused(seen):
    model = tiny.siglip_128()
    with pytest.raises(UserError, match="20 scenes in pools of 100"):
        evaluate.retrieval_scores(model, seen)
    with pytest.raises(UserError, match="is no dual encoder"):
        evaluate.embeddings(tiny.house(), seen.images)
    with pytest.raises(UserError, match="either images or texts"):
        evaluate.embeddings(model)
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ParityError, match="broken, not lossy"):
        evaluate.embeddings(model, seen.images)
