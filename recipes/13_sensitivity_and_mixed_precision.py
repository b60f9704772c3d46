# Which part of my model needs its bits?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/13_sensitivity_and_mixed_precision.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
from collections import defaultdict

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS = 3
QUESTIONS = ["What colour is the circle?", "How many objects are there?", "Is there a square?"]  # yours
PICTURE = Image.new("RGB", (512, 512), "teal")  # yours

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in QUESTIONS]
texts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in turns]
batches = [processor(images=[PICTURE], text=[t], return_tensors="pt") for t in texts]


@torch.inference_mode()
def next_words():
    return torch.stack([model(**b).logits[0, -1] for b in batches]).log_softmax(-1)


units = defaultdict(list)  # the layers of one attention or MLP together
for name, layer in model.named_modules():
    if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
        units[name.rpartition(".")[0]].append(layer)
reference, harm, top = next_words(), {}, 2 ** (BITS - 1) - 1
for unit, layers in units.items():
    kept = [layer.weight.data for layer in layers]
    for layer, w in zip(layers, kept, strict=True):
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
        layer.weight.data = (w / scale).round() * scale
    harm[unit] = (reference.exp() * (reference - next_words())).sum(-1).mean().item()
    for layer, w in zip(layers, kept, strict=True):
        layer.weight.data = w
for unit in sorted(harm, key=harm.get, reverse=True)[:8]:
    print(f"{harm[unit]:.4f} nats  {unit}")
