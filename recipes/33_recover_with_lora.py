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
QUESTION = "Which paint is this?"
TRAIN = range(0, 24)  # seeds of drawn scenes; put hundreds of your own images in their place, and examples of what must stay
TEST = range(1000, 1024)  # other scenes
RANK = 8  # of the adapters; the more, the more they can learn and forget
EPOCHS = 3
LEARNING_RATE = 1e-3
OUT = os.environ.get("OUT")  # directory of the merged checkpoint; without it nothing is kept


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colour = rng.choice(list(PAINTS))
    left, top = rng.sample(range(20, 360), 2)
    ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    return image, PAINTS[colour]


def encode(processor, seed):
    """Prompt and answer as one batch; only the answer's tokens have labels."""
    image, answer = draw_scene(seed)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    ending = f" {answer}{processor.tokenizer.eos_token}"
    length = len(processor.tokenizer(ending, add_special_tokens=False)["input_ids"])
    batch = processor(images=[image], text=[prompt + ending], return_tensors="pt")
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :-length] = -100
    return batch


@torch.no_grad()
def right_answers(model, batches):
    right = 0
    for batch in batches:
        labels = batch["labels"][0, 1:]
        found = model(**batch).logits[0, :-1].argmax(-1)
        right += (found == labels)[labels != -100].all().item()
    return right


def main():
    model, processor = load()
    train = [encode(processor, seed) for seed in TRAIN]
    test = [encode(processor, seed) for seed in TEST]
    before = right_answers(model, test)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for batch in train * EPOCHS:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()  # an ordinary checkpoint again
    print(f"right answers on scenes not trained on: {before} -> {right_answers(merged, test)} of {len(test)}")
    if OUT:
        merged.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
