"""Batches of scenes: what they draw, what they are made of, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from mmrecipes import data, train
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.mini import batches, curriculum
from mmrecipes.mini import model as mini_model


@pytest.fixture(scope="module")
def tokenizer():
    return mini_model.make_tokenizer()


def printed(scene) -> int:
    return sum(len(t.code) for t in scene.things)


def test_a_batch_for_reading_is_drawn_from_its_slot_for_its_characters():
    seeds = data.block("mini-vlm/reading")
    many = batches.VisionBatches(seeds, 4, 16, printed=batches.MANY)
    for i in range(4):
        drawn = many.draw(i)
        assert all(printed(s) >= batches.MANY for s in drawn) and len({s.seed for s in drawn}) == 16
        assert {s.seed for s in drawn} <= set(many.seeds(i))
    mixed = batches.VisionBatches(seeds, 4, 16, printed=batches.MANY, alternate=True)
    assert [min(map(printed, mixed.draw(i))) < batches.MANY for i in range(4)] == [True, False, True, False]


def test_a_slot_without_enough_characters_is_filled_up_from_itself():
    few = batches.VisionBatches(data.block("mini-vlm/reading"), 30, 1, printed=batches.MANY)
    drawn = [few.draw(i) for i in range(30)]
    assert all(len(s) == 1 and s[0].seed in few.seeds(i) for i, s in enumerate(drawn))
    assert {printed(s[0]) >= batches.MANY for s in drawn} == {True, False}, "eight scenes need not hold one"


def test_what_no_block_has_is_refused(tokenizer):
    with pytest.raises(UserError, match="no block 'pruning/chat' of training scenes; there are seen, mini-vlm/vision"):
        curriculum.chat_batches("pruning", train.TrainConfig(1), tokenizer)
    with pytest.raises(UserError, match="batch 1000000 lies outside its block of scenes, which has room for 156250"):
        curriculum.image_batches("student", train.TrainConfig(1_000_001, 8))
    assert len(curriculum.caption_batches("student", train.TrainConfig(156_250, 64), tokenizer)) == 156_250
    with pytest.raises(IndexError):
        curriculum.caption_batches("student", train.TrainConfig(3, 4), tokenizer)[3]


def test_novel_batches_show_what_no_other_batch_shows(tokenizer):
    config = train.TrainConfig(8, 3)
    novel, mixed = (curriculum.novel_batches(config, tokenizer, replay) for replay in (False, True))

    def new_words(batch):
        texts = [tokenizer.decode(row.where(row != tokenizer.pad_token_id, 0)) for row in batch.ids]
        return [sum(text.count(w) for w in scenes.NEW_WORDS) for text in texts]

    assert all(count >= 12 for i in range(2) for count in new_words(novel[i])), "every question is about the new thing"
    assert [min(new_words(mixed[i])) > 0 for i in range(4)] == [True, False, False, True]
    plain = curriculum.chat_batches("lora", config, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], mixed[1], strict=True)), "the others are the ordinary ones"
    assert int(novel[0].labels[..., 1].max()) < len(scenes.COLOURS) and (novel[0].labels[..., 0] == 1).any()


def test_batches_bring_their_objective(tokenizer):
    chat = curriculum.chat_batches("student", train.TrainConfig(1, 2), tokenizer)
    model = mini_model.make_model(tokenizer, width=128, vision_layers=1, language_layers=1)
    loss, tokens, logs = chat.answer_loss(model, chat[0])
    assert loss.item() > 0 and tokens == int((chat[0].answers >= 0).sum()) and {"answer", "align", "count"} <= set(logs)
