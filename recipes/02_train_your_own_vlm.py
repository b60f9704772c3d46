# Why is a VLM trained in stages, and can I train one at home?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/02_train_your_own_vlm.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
from math import log

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
CONNECTORS = ("connector", "multi_modal_projector", "merger")  # what model families call the connector
LIGHTS = {"red": "no", "green": "yes"}  # a rule that the model has not been taught
QUESTION = "May I go?"
STEPS = 120  # one image each; more images and steps for a harder task
LEARNING_RATE = 1e-3  # high, since only the connector is trained
HELD_OUT = range(1000, 1012)  # images that are never trained on


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return AutoProcessor.from_pretrained(MODEL), model.eval().requires_grad_(False)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r} does not load; give a vision-language model's hub id or directory: {reason}") from None


def draw_scene(seed):
    """A traffic light in one colour, somewhere in the image, and what it says. Put your own images and answers here."""
    colour = list(LIGHTS)[seed % len(LIGHTS)]
    x, y = random.Random(seed).choices(range(20, 350), k=2)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).ellipse((x, y, x + 140, y + 140), fill=colour)
    return image, LIGHTS[colour]


def prepare(processor, image, ending=""):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[prompt + ending], return_tensors="pt")


def token_loss(model, processor, image, answer):
    """Mean cross-entropy, in nats, of the answer's tokens and the one that ends it."""
    ending = f" {answer}{processor.tokenizer.eos_token}"
    inputs = prepare(processor, image, ending)
    n_tokens = len(processor.tokenizer(ending, add_special_tokens=False)["input_ids"])
    logits = model(**inputs).logits[0, -n_tokens - 1 : -1]  # the logits before a token predict it
    return torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -n_tokens:])


@torch.no_grad()
def evaluate(model, processor, when):
    """Loss on held-out images, and what the model answers when it is asked about them."""
    scenes = [draw_scene(seed) for seed in HELD_OUT]
    loss = sum(token_loss(model, processor, *scene).item() for scene in scenes) / len(scenes)
    prompts = [prepare(processor, image) for image, _ in scenes]
    tokens = [model.generate(**p, max_new_tokens=4, do_sample=False)[0, p["input_ids"].shape[1] :] for p in prompts]
    said = [processor.decode(t, skip_special_tokens=True).strip() for t in tokens]
    right = sum(text == answer for text, (_, answer) in zip(said, scenes, strict=True))
    print(f"{when}: loss {loss:.2f} nats per token, {right} of {len(scenes)} answers right, the first two: {said[:2]}")


def main():
    processor, model = load()
    connectors = [module for name, module in model.named_modules() if name.split(".")[-1] in CONNECTORS]
    if not connectors:
        raise SystemExit(f"MODEL={MODEL!r} has no module called one of {CONNECTORS}: add its connector's name there")
    connector = connectors[0].requires_grad_(True)
    print(f"uniform guessing: {log(len(processor.tokenizer)):.2f} nats per token. On held-out images:")
    evaluate(model, processor, "before")
    optimizer = torch.optim.AdamW(connector.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        token_loss(model, processor, *draw_scene(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluate(model, processor, f"after {STEPS} steps")


if __name__ == "__main__":
    main()
