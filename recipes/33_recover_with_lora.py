# How little must be trained to learn something new?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/33_recover_with_lora.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
PAINTS = {"teal": "A", "maroon": "H", "olive": "K", "navy": "T"}  # what is to be learned: a code for each colour
NEW = "Which paint is this?"
OLD = "Which shape does the object have?"  # what must stay; ask several things of your own
TRAIN = range(0, 24)  # seeds of drawn scenes; put hundreds of your own images in their place
TEST = range(1000, 1024)  # other scenes
RANK = 8  # of the adapters; the more, the more they can learn and forget
EPOCHS = 3
LEARNING_RATE = 1e-3
OUT = os.environ.get("OUT")  # directory of the merged checkpoint; without it nothing is kept


def encode(processor, image, question, ending=""):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[prompt + ending], return_tensors="pt")


@torch.no_grad()
def ask(model, processor, image, question):
    batch = encode(processor, image, question)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def examples(model, processor, seed):
    """A drawn scene with the new question and its answer, and with an old one and the model's own answer."""
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colour = rng.choice(list(PAINTS))
    left, top = rng.sample(range(20, 360), 2)
    ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    return (image, NEW, PAINTS[colour]), (image, OLD, ask(model, processor, image, OLD))


def answer_loss(model, processor, image, question, answer):
    ending = f" {answer}{processor.tokenizer.eos_token}"
    batch = encode(processor, image, question, ending)
    length = len(processor.tokenizer(ending, add_special_tokens=False)["input_ids"])
    labels = batch["input_ids"].clone()
    labels[0, :-length] = -100  # the answer's tokens alone
    return model(**batch, labels=labels).loss


def right_answers(model, processor, pairs):
    return [sum(ask(model, processor, *asked) == answer for *asked, answer in rows) for rows in zip(*pairs, strict=True)]


def main():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r} is no vision-language model or its hub id: {str(error).split(chr(10))[0]}") from None
    train, test = ([examples(model, processor, seed) for seed in seeds] for seeds in (TRAIN, TEST))
    before = right_answers(model, processor, test)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))  # alpha: 16 at any rank
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for new_and_old in train * EPOCHS:
        sum(answer_loss(adapted, processor, *row) for row in new_and_old).backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()  # an ordinary checkpoint again
    for which, was, now in zip(("new", "old"), before, right_answers(merged, processor, test), strict=True):
        print(f"{which} question, right on scenes not trained on: {was} -> {now} of {len(TEST)}")
    if OUT:
        merged.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
