# What can a teacher give that labels cannot?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/30_distill_a_student.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TRAIN = range(0, 96)  # seeds of drawn scenes; put thousands of your own images and questions in their place, no labels needed
TEST = range(1000, 1048)  # other scenes
BATCH = 8
EPOCHS = 3
LEARNING_RATE = 5e-4
TEMPERATURE = 2.0  # above 1, the tokens that the teacher holds for unlikely count for more
OUT = os.environ.get("OUT")  # directory of the student's checkpoint; without it nothing is kept


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, top, colour in zip((20, 190, 360), rng.sample(range(20, 360), 3), colours, strict=True):
        ImageDraw.Draw(image).rounded_rectangle((left, top, left + 120, top + 120), rng.choice((0, 60)), fill=colour)
    question = rng.choice(("What shape is the {} object?", "Is there a {} circle?", "How many {} objects are there?"))
    return [image], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.format(colours[0])}]}]


def log_probs(model, batch):
    return (model(**batch).logits / TEMPERATURE).log_softmax(-1)


@torch.no_grad()
def answered(teacher, processor, seeds):
    """Batches with the teacher's greedy answers, a mask of the tokens that count, and its log-probabilities (B, T, V)."""
    processor.tokenizer.padding_side = "left"
    stop = torch.tensor(teacher.generation_config.eos_token_id or processor.tokenizer.eos_token_id)
    for first in range(0, len(seeds), BATCH):
        images, turns = zip(*map(draw_scene, seeds[first : first + BATCH]), strict=True)
        texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        prompt = processor(images=list(images), text=texts, padding=True, return_tensors="pt")
        ids = teacher.generate(**prompt, max_new_tokens=8, do_sample=False, suppress_tokens=[teacher.config.image_token_id])
        new = ids.shape[1] - prompt["input_ids"].shape[1]
        ended = torch.isin(ids[:, -new:], stop).long()
        mask = ended.cumsum(-1) == ended  # up to the first end of sequence, not the padding behind it
        grown = [k for k in prompt if k.endswith("type_ids") or k == "attention_mask"]
        batch = {**prompt, **{k: torch.nn.functional.pad(prompt[k], (0, new - 1), value=int("mask" in k)) for k in grown}}
        batch |= {"input_ids": ids[:, :-1], "logits_to_keep": new}
        yield batch, mask, log_probs(teacher, batch)


def main():
    try:
        processor = AutoProcessor.from_pretrained(MODEL)
        teacher, student = (AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2))
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None
    decoder = student.get_decoder()
    del decoder.layers[1::2]  # half of the layers: untrained, hardly an answer is left
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in the KV cache
    decoder.config.num_hidden_layers = len(decoder.layers)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[: len(decoder.layers)]
    train, test = (list(answered(teacher, processor, seeds)) for seeds in (TRAIN, TEST))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for epoch in range(EPOCHS + 1):
        same = [((log_probs(student, b).argmax(-1) == wanted.argmax(-1)) | ~mask).all(-1) for b, mask, wanted in test]
        print(f"after {epoch} epochs of {len(TRAIN)} scenes: the teacher's answer in {torch.cat(same).sum()} of {len(TEST)} new")
        for batch, mask, wanted in train if epoch < EPOCHS else ():
            divergence = (wanted.exp() * (wanted - log_probs(student, batch))).sum(-1)  # (B, T)
            (TEMPERATURE**2 * divergence[mask].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    if OUT:
        student.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
