# How few bits can a weight have?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/10_quantization_from_scratch.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS = (8, 4, 3, 2)  # widths to try; 2 is ternary: -1, 0 and 1
GROUP = 32  # weights that share a scale: a smaller group is more accurate and costs more bytes
SCENES = 12  # images, with a question each
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
    """Log-probabilities of each answer's first token, (questions, vocabulary)."""
    return torch.stack([model(**inputs).logits[0, -1] for inputs in batches]).log_softmax(-1)


def round_to_levels(weight, bits):
    """Symmetric absmax rounding, a scale per group of inputs (per output channel if groups do not divide it)."""
    group = GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]
    largest_level = 2 ** (bits - 1) - 1
    groups = weight.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest_level
    return ((groups / scale).round() * scale).reshape(weight.shape)


def main(model_id):
    processor, model = load(model_id)
    batches = [prepare(processor, seed) for seed in range(SCENES)]
    # the head stays as it is: it may share its weights with the embedding
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    originals = [layer.weight.detach().clone() for layer in linears]
    reference = next_token_log_probs(model, batches)
    print(f"{len(linears)} linear layers rounded, against fp32 (n = {len(batches)} questions):")
    for bits in BITS:
        for layer, weight in zip(linears, originals, strict=True):
            layer.weight.data = round_to_levels(weight, bits)
        rounded = next_token_log_probs(model, batches)
        divergences = (reference.exp() * (reference - rounded)).sum(-1)
        margin = 1.96 * divergences.std() / len(batches) ** 0.5  # of a 95% interval
        same = (reference.argmax(-1) == rounded.argmax(-1)).sum()
        divergence = f"KL divergence {divergences.mean():.4f} ± {margin:.4f} nats"
        print(f"{bits} bits: first answer token the same in {same} of {len(batches)}, {divergence}")


if __name__ == "__main__":
    main(MODEL)
