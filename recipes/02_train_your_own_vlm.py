# Why is a VLM trained in stages, and can I train one at home?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/02_train_your_own_vlm.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
CONNECTORS = ("connector", "multi_modal_projector", "merger")  # what model families call the connector
LIGHTS = {"red": "no", "green": "yes"}  # a rule that the model has not been taught
QUESTION = "May I go?"
STEPS = 120  # one image each; more images and steps for a harder task
LEARNING_RATE = 1e-3  # high, since only the connector is trained
HELD_OUT = 12  # images that are never trained on


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def freeze_all_but_connector(model):
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.split(".")[-1] in CONNECTORS:
            return module.requires_grad_(True)
    raise SystemExit(f"MODEL={MODEL!r} has no module called one of {CONNECTORS}: add its connector's name there")


def draw_scene(seed):
    """A traffic light in one colour, somewhere in the image, and what it says. Put your own images and answers here."""
    rng = random.Random(seed)
    colour = list(LIGHTS)[seed % len(LIGHTS)]
    x = rng.randint(20, 350)
    y = rng.randint(20, 350)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).ellipse((x, y, x + 140, y + 140), fill=colour)
    return image, LIGHTS[colour]


def answer_loss(model, processor, image, answer):
    """Mean cross-entropy of the answer's tokens in nats, and whether each of them is the most likely one."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=[image], text=[f"{prompt} {answer}"], return_tensors="pt")
    n_tokens = len(processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
    target = inputs["input_ids"][0, -n_tokens:]
    logits = model(**inputs).logits[0, -n_tokens - 1 : -1]  # the logits before a token predict it
    loss = torch.nn.functional.cross_entropy(logits, target)
    return loss, bool((logits.argmax(-1) == target).all())


@torch.no_grad()
def evaluate(model, processor, seeds):
    results = [answer_loss(model, processor, *draw_scene(seed)) for seed in seeds]
    loss = sum(loss.item() for loss, _ in results) / len(results)
    return f"held-out loss {loss:.2f} nats per token, {sum(right for _, right in results)} of {len(results)} answers right"


def main(model_id):
    processor, model = load(model_id)
    connector = freeze_all_but_connector(model)
    held_out = range(1000, 1000 + HELD_OUT)
    print("before:", evaluate(model, processor, held_out))
    optimizer = torch.optim.AdamW(connector.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        loss, _ = answer_loss(model, processor, *draw_scene(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"after {STEPS} steps:", evaluate(model, processor, held_out))


if __name__ == "__main__":
    main(MODEL)
