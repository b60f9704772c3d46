# Four bits, three, two: what can be saved, and how?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/14_four_bit_weights.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS = 3
LARGEST_LEVEL = 2 ** (BITS - 1) - 1
CLIP = 0.7 if BITS <= 3 else 1.0  # of the largest weight: with few levels clipping pays
DAMPING = 0.01  # of the Hessian's mean diagonal, so that it can be inverted
LANGUAGE_MODELS = ("text_model", "language_model")  # what model families call the part to quantize
SCENES = 12  # images to calibrate on, with a question each (take a hundred of yours); as many others evaluate


def load(model_id):
    try:
        processor = AutoProcessor.from_pretrained(model_id)
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError) as error:
        message = f"MODEL={model_id!r} does not load; give a vision-language model's hub id or directory: {str(error).strip()}"
        raise SystemExit(message.partition("\n")[0]) from None
    return processor, model.eval()


def prepare(processor, seed):  # a circle and a square, and a question: put your own images and questions here
    rng = random.Random(seed)
    circle, square = rng.sample(["red", "blue", "green", "yellow"], 2)
    top = rng.randint(40, 330)
    image = Image.new("RGB", (512, 512), "gainsboro")
    ImageDraw.Draw(image).ellipse((70, top, 210, top + 140), fill=circle)
    ImageDraw.Draw(image).rectangle((300, 370 - top, 430, 500 - top), fill=square)
    questions = ("What colour is the circle?", f"Which shape does the {square} object have?", f"Is there a {circle} square?")
    content = [{"type": "image"}, {"type": "text", "text": questions[seed % len(questions)]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


@torch.no_grad()
def next_token_log_probs(model, batches):
    return torch.stack([model(**inputs).logits[0, -1] for inputs in batches]).log_softmax(-1)


def add_to_hessian(layer, args):  # sums X^T X, the Hessian of the layer's squared output error
    x = args[0].flatten(0, -2)
    layer.hessian = getattr(layer, "hessian", 0) + x.T @ x


def round_(layer, weight, hessian):
    """Give the layer the rounded weight, one input channel at a time; its error goes to the channels not yet rounded."""
    hessian = hessian + torch.eye(len(hessian)) * (DAMPING * hessian.diagonal().mean() + 1e-8)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight = weight.T.clone()  # (inputs, outputs)
    scale = CLIP * weight.abs().amax(0).clamp(min=1e-12) / LARGEST_LEVEL
    for i in range(len(weight)):
        rounded = (weight[i] / scale).round().clamp(-LARGEST_LEVEL - 1, LARGEST_LEVEL) * scale
        weight[i:].addr_(inverse[i, i:], (weight[i] - rounded) / inverse[i, i], alpha=-1)
        layer.weight.data[:, i] = rounded


def main(model_id):
    processor, model = load(model_id)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(p in n for p in LANGUAGE_MODELS)]
    hooks = [layer.register_forward_pre_hook(add_to_hessian) for layer in layers]
    next_token_log_probs(model, [prepare(processor, seed) for seed in range(SCENES)])  # calibrates
    for hook in hooks:
        hook.remove()
    batches = [prepare(processor, seed) for seed in range(1000, 1000 + SCENES)]
    reference = next_token_log_probs(model, batches)
    originals = [layer.weight.data.clone() for layer in layers]
    for method in ("round to nearest", "GPTQ"):
        for layer, weight in zip(layers, originals, strict=True):
            round_(layer, weight, layer.hessian if method == "GPTQ" else torch.eye(weight.shape[1]))  # identity: no correction
        nats = (reference.exp() * (reference - next_token_log_probs(model, batches))).sum(-1).mean()
        print(f"{method:16s} {BITS} bits: {nats:.4f} nats (KL divergence) from fp32 on other images (n = {SCENES} questions)")


if __name__ == "__main__":
    main(MODEL)
