# What does a long chat about an image cost, and what may be forgotten?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/43_multi_turn_and_context.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import time
from copy import deepcopy

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
QUESTIONS = ("What colour is the circle?", "Is there a square?", "How many objects are there?")  # put your own here
NEW_TOKENS = 8  # at most, of an answer
TOLERANCE = 1e-3  # relative error of logits, in float32


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def make_inputs(processor, turns):  # questions and answers in turn; put your own image here
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).ellipse((40, 60, 170, 190), fill="red")
    parts = [[{"type": "text", "text": text}] for text in turns]
    parts[0].insert(0, {"type": "image"})
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(parts)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


def new_chat(model):
    return {"cache": DynamicCache(config=model.config.get_text_config()), "ids": torch.zeros(0, dtype=torch.int64)}


def read_prompt(model, chat, inputs):
    """Logits (V) after the prompt; what the cache in `chat` holds of it, the image too, is neither read nor encoded again."""
    ids = inputs["input_ids"]
    kept = len(chat["ids"])
    if kept == 0 or not torch.equal(ids[0, :kept], chat["ids"]):  # the first turn, or a template that rewrote earlier ones
        chat.update(new_chat(model))
    else:
        inputs = {"input_ids": ids[:, kept:]}
    chat["ids"] = ids[0]
    return model(**inputs, past_key_values=chat["cache"], use_cache=True).logits[0, -1]


def greedy(model, chat, logits):
    """Greedy token ids. A copy of the cache reads them, since not every cache can go back (linear attention, sliding windows)."""
    cache = deepcopy(chat["cache"])
    stops = torch.tensor(model.generation_config.eos_token_id)
    found = []
    while len(found) < NEW_TOKENS and logits.argmax() not in stops:
        found.append(logits.argmax().item())
        logits = model(input_ids=torch.tensor([found[-1:]]), past_key_values=cache).logits[0, -1]
    return found


@torch.inference_mode()
def main():
    model, processor = load()
    turns = []
    kept = new_chat(model)
    for question in QUESTIONS:
        turns.append(question)
        found = []
        for chat in (new_chat(model), kept):
            inputs = make_inputs(processor, turns)
            start = time.perf_counter()
            logits = read_prompt(model, chat, inputs)
            found.append((1000 * (time.perf_counter() - start), logits, greedy(model, chat, logits)))
        error = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
        assert error < TOLERANCE and found[0][2] == found[1][2], f"{question}: not what a fresh prompt gives ({error:.1g})"
        turns.append(processor.tokenizer.decode(found[0][2], skip_special_tokens=True).strip())
        print(f"{question} {turns[-1]!r}, both ways; to the first token {found[0][0]:.0f} ms anew, {found[1][0]:.0f} ms kept")


if __name__ == "__main__":
    main()
