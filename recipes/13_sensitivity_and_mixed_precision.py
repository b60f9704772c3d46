# Which part of my model needs its bits?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/13_sensitivity_and_mixed_precision.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
from collections import defaultdict

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS = 3  # low enough to tell the units apart
SCENES = 12  # images that rank the units, with a question each; as many others check the ranking
COLOURS = {"red": "#d62728", "blue": "#2350c8", "green": "#289632", "yellow": "#f0d71e"}


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def prepare(processor, seed):
    """The model's inputs for an image of a circle and a square, and a question. Put your own images and questions here."""
    rng = random.Random(seed)
    circle, square = rng.sample(list(COLOURS), 2)
    top = rng.randint(40, 330)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).ellipse((70, top, 210, top + 140), fill=COLOURS[circle])
    ImageDraw.Draw(image).rectangle((300, 370 - top, 430, 500 - top), fill=COLOURS[square])
    questions = ("What colour is the circle?", f"Which shape does the {square} object have?", f"Is there a {circle} square?")
    content = [{"type": "image"}, {"type": "text", "text": questions[seed % len(questions)]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


@torch.inference_mode()
def next_token_log_probs(model, batches):
    return torch.stack([model(**inputs).logits[0, -1] for inputs in batches]).log_softmax(-1)


def damage(model, layers, batches, reference):
    """Mean KL divergence from `reference`, in nats, while the weights of `layers` are rounded to BITS bits."""
    weights = [layer.weight.data for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (BITS - 1) - 1)
        layer.weight.data = (weight / scale).round() * scale  # to nearest: put the rounding that you will ship here
    rounded = next_token_log_probs(model, batches)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight
    return (reference.exp() * (reference - rounded)).sum(-1).mean().item()


def main(model_id):
    processor, model = load(model_id)
    units = defaultdict(list)  # the linear layers of one attention or one MLP together; the head stays
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            units[name.rpartition(".")[0]].append(layer)
    batches = [prepare(processor, seed) for seed in range(SCENES)]
    reference = next_token_log_probs(model, batches)
    damages = {unit: damage(model, layers, batches, reference) for unit, layers in units.items()}
    ranking = sorted(damages, key=damages.get, reverse=True)
    print(f"the most sensitive of {len(units)} units, each alone at {BITS} bits (n = {SCENES} questions):")
    for unit in ranking[:6]:
        print(f"{damages[unit]:.4f} nats  {unit}")
    others = [prepare(processor, seed) for seed in range(1000, 1000 + SCENES)]
    reference = next_token_log_probs(model, others)
    half = len(ranking) // 2
    for which, chosen in {"more": ranking[:half], "less": ranking[-half:]}.items():
        layers = [layer for unit in chosen for layer in units[unit]]
        nats = damage(model, layers, others, reference)
        print(f"the {which} sensitive half at {BITS} bits: {nats:.4f} nats on other images (n = {SCENES} questions)")


if __name__ == "__main__":
    main(MODEL)
