# When is training at few bits worth it after GPTQ?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/15_quantization_aware_training.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from torch.nn.utils import parametrize
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS = 3
HIGH = 2 ** (BITS - 1) - 1  # the last level; the first is -HIGH - 1
GROUP = 32  # inputs that share a scale, where they divide into such groups
STEPS = 30  # take some hundreds, of new images each
BATCH = 4
WEIGHT_RATE = 1e-5  # learning rate of the floats behind the rounded weights
OTHER_RATE = 5e-4  # of scales, norms, biases, embeddings


def load(model_id):
    try:
        models = [AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32) for _ in range(2)]
        return AutoProcessor.from_pretrained(model_id), models[0].requires_grad_(False), models[1]
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None


def prepare(processor, first):  # an object, and a question: put your own images and questions here
    images = []
    for rng in map(random.Random, range(first, first + BATCH)):
        images.append([Image.new("RGB", (512, 512), "gainsboro")])
        ImageDraw.Draw(images[-1][0]).ellipse((70, 90, rng.randint(150, 480), 400), fill=rng.choice(("red", "blue", "green")))
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the object?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=images, text=[prompt] * BATCH, return_tensors="pt")


class FakeQuantizer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        rows = weight.detach().reshape(-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1])
        tried = torch.linspace(0.4, 1, 7)[:, None, None] * rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / HIGH
        errors = torch.stack([(self.on_levels(rows, scale) - rows).square().sum(1, keepdim=True) for scale in tried])
        self.scale = torch.nn.Parameter(tried.gather(0, errors.argmin(0, keepdim=True))[0])  # learned, too (LSQ)

    def on_levels(self, rows, scale):
        level = (rows / scale).clamp(-HIGH - 1, HIGH)
        return (level + (level.round() - level).detach()) * scale  # straight through the rounding

    def forward(self, weight):
        return self.on_levels(weight.reshape(len(self.scale), -1), self.scale).view_as(weight)


def divergence(student, teacher, batch):  # of what both predict at the last 8 tokens of each prompt
    wanted = teacher(**batch).logits[:, -8:].log_softmax(-1).detach()
    return (wanted.exp() * (wanted - student(**batch).logits[:, -8:].log_softmax(-1))).sum(-1).mean()


def main(model_id):
    processor, teacher, student = load(model_id)
    layers = [m for m in student.modules() if isinstance(m, torch.nn.Linear) and m is not student.get_output_embeddings()]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", FakeQuantizer(layer.weight))
    floats = {layer.parametrizations.weight.original for layer in layers}
    groups = [{"params": [*floats], "lr": WEIGHT_RATE}, {"params": [p for p in student.parameters() if p not in floats]}]
    optimizer = torch.optim.AdamW(groups, lr=OTHER_RATE, weight_decay=0)
    for step in range(STEPS + 1):
        if step in (0, STEPS):
            nats = sum(divergence(student, teacher, prepare(processor, seed)).item() for seed in range(10_000, 10_012, BATCH)) / 3
            print(f"{BITS} bits, {step:2d} steps: {nats:.4f} nats (KL divergence) from fp32 on {3 * BATCH} other images")
        if step < STEPS:
            divergence(student, teacher, prepare(processor, step * BATCH)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for layer in layers:  # plain weights again, on their levels
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


if __name__ == "__main__":
    main(MODEL)
