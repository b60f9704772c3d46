"""A chat with the KV cache kept answers as one whose whole prompt is read anew each time, whatever comes in between."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DynamicCache

from mmrecipes import export, inference, models
from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.inference.chat import Chat, Turn, messages
from mmrecipes.models.messages import conversation
from tests import families

QUESTIONS = ("How many objects are there?", "What colour is the circle?", "Is there a red square?")


def image(seed: int, size: int = 128) -> Image.Image:
    return scenes.render(scenes.make_scene(seed), size)


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def two(request, house_exports):
    """The fp32 export, loaded twice: one to chat with, one that reads every prompt anew."""
    folder = house_exports(request.param, "fp32")
    return inference.load_exported(folder), inference.load_exported(folder)


@pytest.fixture(scope="module")
def plain(house_exports):
    folder = house_exports("onnx", "fp32")
    return inference.load_exported(folder), inference.load_exported(folder)


def last_prompt(exported, chat: Chat) -> dict[str, np.ndarray]:
    """What the chat's last answer is an answer to."""
    *before, last = chat.turns
    return exported.prompt(None, messages([*before, replace(last, answer=None)], chat.forgotten))


def anew(reference, chat: Chat, max_new_tokens: int = 64) -> str:
    """The chat's last answer, from its whole prompt."""
    ids = list(reference.tokens(last_prompt(reference, chat), max_new_tokens))
    return reference.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def spied(exported, monkeypatch) -> dict[str, list]:
    """What is encoded, what each step reads, and the logits after each prompt, from now on."""
    seen, graphs = {"encoded": [], "steps": [], "logits": []}, exported.graphs
    encode, step, read = graphs.encode, graphs.step, exported.read
    monkeypatch.setattr(graphs, "encode", lambda run: seen["encoded"].append(run) or encode(run))
    monkeypatch.setattr(graphs, "step", lambda ids, *more: seen["steps"].append(ids.shape[1]) or step(ids, *more))
    monkeypatch.setattr(exported, "read", lambda *given: seen["logits"].append(read(*given)) or seen["logits"][-1])
    return seen


def test_three_turns_and_two_images(two, monkeypatch):
    """Each turn's answer, and the logits of its first token, are those of a fresh prompt; nothing is encoded or read twice."""
    exported, reference = two
    seen, chat = spied(exported, monkeypatch), Chat(exported)
    for turn, (text, images) in enumerate(zip(QUESTIONS, (image(1), None, [image(2)]), strict=True)):
        answer = chat.say(text, images)
        prompt = last_prompt(reference, chat)
        assert answer == anew(reference, chat)
        assert np.allclose(seen["logits"][-1], reference.prefill(prompt), atol=1e-3)
        assert len(seen["encoded"]) == (1, 1, 2)[turn]
        assert (chat.tokens_read < 30) == (turn == 1), "the first and the third have an image to read"
    answers = [len(reference.processor.tokenizer(f" {turn.answer}")["input_ids"]) for turn in chat.turns]
    assert sum(seen["steps"]) <= prompt["input_ids"].shape[1] + max(answers)


def test_another_image_with_the_same_ids_is_read(plain):
    """Placeholders are the same for all images: their content counts."""
    exported, reference = plain
    chat = Chat(exported)
    chat.say(QUESTIONS[1], [image(3), image(4)])
    chat.turns[0] = replace(chat.turns[0], images=(image(3), image(5)))
    chat.say(QUESTIONS[0])
    assert 64 < chat.tokens_read < 128, "the first image is the same"
    assert chat.turns[-1].answer == anew(reference, chat)


def test_chats_and_single_questions_share_a_model(plain):
    exported, reference = plain
    chats = [Chat(exported), Chat(exported)]
    for turn, text in enumerate(QUESTIONS):
        for seed, chat in enumerate(chats):
            chat.say(text, image(seed) if turn == 0 else None)
            assert chat.turns[-1].answer == anew(reference, chat)
        exported.generate(image(6), text)


def test_a_template_that_rewrites_earlier_turns(plain, monkeypatch):
    """As those that drop the reasoning of earlier answers: the cache is kept up to the first token that differs."""
    exported, reference = plain
    hint = "{% if loop.last %} Short.{% endif %}<end_of_utterance>"
    for each in plain:
        template = each.processor.chat_template.replace("<end_of_utterance>", hint)
        monkeypatch.setattr(each.processor, "chat_template", template)
    chat = Chat(exported)
    for turn, text in enumerate(QUESTIONS):
        chat.say(text, image(5) if turn == 0 else None)
        assert chat.turns[-1].answer == anew(reference, chat)
        assert (chat.tokens_read < 64) == (turn > 0)
    assert "Short" not in exported.processor.apply_chat_template(messages(chat.turns[:2]))[:-40]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=2, max_size=4), st.sampled_from((None, 330)))
def test_turns_of_any_length(plain, turns, budget):
    exported, reference = plain
    chat = Chat(exported, budget)
    for i, (words, shows) in enumerate(turns):
        text = " ".join(("red", "circle", "Is", "there")[n % 4] for n in range(words))
        chat.say(text, image(i) if shows else None, max_new_tokens=4)
        assert chat.turns[-1].answer == anew(reference, chat, 4)


# ---- budgets


def test_the_oldest_turns_are_forgotten_and_the_image_is_not(two):
    exported, reference = two
    chat, budget = Chat(exported, budget=130), 130
    for i in range(8):
        chat.say(QUESTIONS[i % 3], image(6) if i == 0 else None, max_new_tokens=8)
        ids = last_prompt(reference, chat)["input_ids"]
        assert ids.shape[1] + 8 <= budget
        assert (ids == exported.manifest["image_token_id"]).sum() == 64
        assert exported.graphs.places.mask.shape[1] <= budget
        assert chat.turns[-1].answer == anew(reference, chat, 8)
    assert 3 <= chat.forgotten < 8
    assert chat.tokens_read < 64, "the image stays in the cache when what follows it changes"


def test_images_of_forgotten_turns_come_first():
    turns = [Turn((image(i),), f"{i}?", f"{i}.") for i in range(3)] + [Turn((), "3?")]
    found = messages(turns, forgotten=2)
    assert [message["role"] for message in found] == ["user", "assistant", "user"]
    assert [part.get("image") for part in found[0]["content"]] == [turn.images[0] for turn in turns[:3]] + [None]
    assert found[0]["content"][-1]["text"] == "2?"


def test_a_turn_that_does_not_fit_is_refused_and_changes_nothing(plain):
    exported, reference = plain
    chat = Chat(exported, budget=120)
    chat.say(QUESTIONS[0], image(7), max_new_tokens=8)
    before = list(chat.turns)
    for text, images in (("Is there a red circle? " * 30, None), (QUESTIONS[0], image(8))):
        with pytest.raises(UserError, match="the budget is 120"):
            chat.say(text, images, max_new_tokens=8)
        assert chat.turns == before
    chat.say(QUESTIONS[1], max_new_tokens=8)
    assert chat.turns[-1].answer == anew(reference, chat, 8)
    with pytest.raises(UserError, match="begin anew"):
        Chat(exported).say("Is there a red circle? " * 2000)


def test_a_failed_step_leaves_nothing_behind(plain, monkeypatch):
    exported, reference = plain
    chat = Chat(exported)
    chat.say(QUESTIONS[0], image(9))
    with monkeypatch.context() as patched:
        patched.setattr(exported.graphs, "step", lambda *_: np.full(1024, np.nan))
        with pytest.raises(ParityError):
            chat.say(QUESTIONS[1])
    chat.say(QUESTIONS[1])
    assert len(chat.turns) == 2
    assert chat.tokens_read > 64
    assert chat.turns[-1].answer == anew(reference, chat)


# ---- other families and runtimes

WAYS = [("qwen2_5_vl", "openvino"), ("gemma3", "onnx"), ("minicpmv4_6", "onnx"), ("paligemma", "onnx"), ("llava", "executorch")]


@pytest.mark.parametrize(("name", "runtime"), WAYS)
def test_families(name, runtime, tmp_path, monkeypatch):
    """M-RoPE goes on behind the cache; images whose tokens see each other; states of fixed size; prompts that see both ways."""
    folder = export.export(families.load(name), tmp_path / name, runtime)
    exported, reference = inference.load_exported(folder), inference.load_exported(folder)
    seen, chat, whole = spied(exported, monkeypatch), Chat(exported), []
    length = (
        0 if exported.family.piece else 4
    )  # the random answer's text is not made of the same tokens, and states cannot go back
    for turn, text in enumerate(QUESTIONS):
        chat.say(text, None if turn == 1 else image(turn, 64).resize((96, 64)), max_new_tokens=length)
        prompt = last_prompt(reference, chat)
        whole.append(prompt["input_ids"].shape[1] == chat.tokens_read)
        assert chat.turns[-1].answer == anew(reference, chat, length)
        assert np.allclose(seen["logits"][-1], reference.prefill(prompt), atol=1e-3)
    assert whole == ([True, True, True] if name == "paligemma" else [True, False, False])


@torch.inference_mode()
def test_the_model_itself_with_its_cache_cropped():
    """`DynamicCache.crop` between turns, images of two sizes in two of three turns: the logits of fresh prompts."""
    model, turns, held = models.load("mini-resampler"), [], np.zeros(0, np.int64)
    cache = DynamicCache(config=model.config.text_config)
    for text, images in zip(QUESTIONS, ((image(10, 256),), (), (image(11).resize((192, 128)),)), strict=True):
        turns.append(Turn(images, text))
        inputs = {k: torch.from_numpy(np.asarray(v)) for k, v in conversation(model.processor, None, messages(turns)).items()}
        ids = inputs["input_ids"][0].numpy()
        kept = int(np.append(ids[: len(held)] != held[: len(ids)], True).argmax())
        cache.crop(kept - len(held))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        pixels = {name: x for name, x in inputs.items() if name.startswith("pixel")}
        embeds[inputs["input_ids"] == model.config.image_token_id] = model.get_image_features(**pixels).pooler_output
        logits = model(inputs_embeds=embeds[:, kept:], past_key_values=cache, use_cache=True).logits[0, -1]
        assert torch.allclose(logits, model(**inputs).logits[0, -1], atol=1e-3)
        assert (kept > 64) == (len(turns) > 1)
        held, turns[-1] = ids, replace(turns[-1], answer="red")
