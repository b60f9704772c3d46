# What can a teacher give that labels cannot?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/30_distill_a_student.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TRAIN = range(0, 48)  # seeds of drawn scenes; put thousands of your own images and questions in their place
TEST = range(1000, 1024)  # other scenes
EPOCHS = 3
LEARNING_RATE = 5e-4
TEMPERATURE = 2.0  # above 1, the tokens that the teacher holds for unlikely count for more
OUT = os.environ.get("OUT")  # directory of the student's checkpoint; without it nothing is kept


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, top, colour in zip((20, 190, 360), rng.sample(range(20, 360), 3), colours, strict=True):
        ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    return image, rng.choice(("What shape is the {} object?", "Is there a {} circle?")).format(colours[0])


def log_probs(model, batch):
    return (model(**batch).logits / TEMPERATURE).log_softmax(-1)


@torch.no_grad()
def answered(teacher, processor, seeds):
    for image, question in map(draw_scene, seeds):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        prompt = processor(images=[image], text=[text], return_tensors="pt")
        ids = teacher.generate(**prompt, max_new_tokens=8, do_sample=False, suppress_tokens=[teacher.config.image_token_id])
        new = ids.shape[1] - prompt["input_ids"].shape[1]  # as many logits predict the answer
        batch = {k: torch.nn.functional.pad(v, (0, new - 1)) if k.endswith("type_ids") else v for k, v in prompt.items()}
        batch |= {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1]), "labels": None, "logits_to_keep": new}
        yield batch, log_probs(teacher, batch)  # (1, tokens of the answer, vocabulary)


@torch.no_grad()
def same_answers(student, examples):
    return sum(torch.equal(log_probs(student, batch).argmax(-1), wanted.argmax(-1)) for batch, wanted in examples)


def main():
    teacher, processor = load()
    student, _ = load()
    decoder = student.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[::2])  # every other one
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in the KV cache
    decoder.config.num_hidden_layers = len(decoder.layers)
    train = list(answered(teacher, processor, TRAIN))
    test = list(answered(teacher, processor, TEST))
    print(f"{len(decoder.layers)} layers, untrained: the teacher's answer in {same_answers(student, test)} of {len(TEST)} scenes")
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for batch, wanted in train * EPOCHS:
        divergence = (wanted.exp() * (wanted - log_probs(student, batch))).sum(-1).mean()
        (TEMPERATURE**2 * divergence).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"after {EPOCHS} epochs of {len(TRAIN)} other scenes: in {same_answers(student, test)} of {len(TEST)}")
    if OUT:
        student.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
