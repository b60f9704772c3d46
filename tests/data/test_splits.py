"""Trainings, calibration and tests draw different scenes: by what they are seen to draw, not by what a table says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mmrecipes import data, models, train
from mmrecipes.data import scenes
from mmrecipes.mini import cnn, curriculum, resampler, siglip, vlm
from mmrecipes.mini.batches import VisionBatches

# longer and larger than any training of the book, and as small and short as its tests
CONFIGS = [train.TrainConfig(*size) for size in ((6, 2), (600, 8), (2400, 16), (2000, 64))]


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of all scenes that are made while a test runs, in order."""
    seeds, make = [], scenes.make_scene
    monkeypatch.setattr(scenes, "make_scene", lambda seed: seeds.append(seed) or make(seed))
    return seeds


def trainings(tokenizer):
    """Name and batches of each training of the book, at its own size and at others."""
    for name, config in vlm.STAGES.items():
        for c in (config, replace(config, steps=7, batch=3)):
            yield f"mini-vlm {name}", vlm.stage_batches(name, c, tokenizer)
    for c in (*CONFIGS, *siglip.STAGES.values()):
        yield "mini-siglip images", VisionBatches(data.block("mini-siglip/images"), c.steps, c.batch)
        yield "mini-siglip captions", curriculum.caption_batches("mini-siglip", c, tokenizer)
        yield "mini-cnn", VisionBatches(data.block("mini-cnn/images"), c.steps, c.batch)
    for c in (*CONFIGS, cnn.CONFIG):
        for purpose in ("student", "recovery", "lora", "connector", "encoder-swap", "qat"):
            yield f"{purpose} chat", curriculum.chat_batches(purpose, c, tokenizer)
        for purpose in ("student", "encoder-swap"):
            yield f"{purpose} images", curriculum.image_batches(purpose, c)
        for purpose in ("student", "recovery"):
            yield f"{purpose} captions", curriculum.caption_batches(purpose, c, tokenizer)
        for replay in (False, True):
            yield "lora chat", curriculum.novel_batches(c, tokenizer, replay)
    for c in (*CONFIGS, *resampler.STAGES.values()):
        yield "mini-resampler chat", resampler.ResizedChats(data.block("mini-resampler/chat"), c.steps, c.batch, tokenizer)


def test_no_scene_is_drawn_for_two_purposes(drawn):
    tokenizer = models.load("mini-vlm").processor.tokenizer
    owner: dict[int, str] = {}

    def claim(name):
        assert drawn, name
        for seed in drawn:
            assert owner.setdefault(seed, name) == name, f"{name} and {owner[seed]} draw scene {seed}"
        drawn.clear()

    for name, batches in trainings(tokenizer):
        for i in (0, len(batches) // 2, len(batches) - 1):
            batches.draw(i)  # what `batches[i]` is made of: see below
            assert set(drawn) <= set(batches.seeds(i)), name
            claim(name)
    # whatever else draws scenes of the training split: what the committed models have seen
    for name, draw in {
        "seen": lambda: data.questions("train", 140),
        "calibration": lambda: data.calibration(140),
        "validation": lambda: data.questions("validation", 140),
        "test": lambda: data.questions("test", 140),
    }.items():
        draw()
        claim(name)
    assert {owner.setdefault(seed, "test") for seed in data.test_split()["seed"]} == {"test"}, "the committed file"
    assert len(set(owner.values())) == len(data.BLOCKS) + 3, "each block belongs to a training that was looked at"


def test_a_batch_is_made_of_the_scenes_that_it_draws_and_of_no_other(drawn):
    tokenizer = models.load("mini-vlm").processor.tokenizer
    config = train.TrainConfig(4, 3)
    for batches in (
        curriculum.image_batches("student", config),
        curriculum.chat_batches("student", config, tokenizer),
        curriculum.novel_batches(config, tokenizer, replay=True),
        curriculum.caption_batches("student", config, tokenizer),
    ):
        for i in range(4):
            batches.draw(i)
            looked_at = list(drawn)
            drawn.clear()
            batches[i]
            assert drawn == looked_at, type(batches).__name__
            drawn.clear()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_no_two_batches_of_a_training_share_a_scene(batch):
    tokenizer = models.load("mini-vlm").processor.tokenizer
    for batches in (
        curriculum.chat_batches("student", train.TrainConfig(40, batch), tokenizer),
        vlm.stage_batches("reading", train.TrainConfig(40, batch), tokenizer),
        curriculum.caption_batches("student", train.TrainConfig(40, batch), tokenizer),
    ):
        seeds = [scene.seed for i in range(40) for scene in batches.draw(i)]
        assert len(set(seeds)) == len(seeds) == 40 * batch


def test_blocks_lie_in_the_training_split_side_by_side():
    blocks = [data.block(name) for name in data.BLOCKS]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(blocks))
    assert blocks[0].start == data.SPLITS["train"].start and blocks[-1].stop <= data.SPLITS["train"].stop
