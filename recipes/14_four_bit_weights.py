# Four bits, three, two: what can be saved, and how?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/14_four_bit_weights.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS, PARTS, PICTURE = 3, ("text_model", "language_model"), Image.new("RGB", (512, 512), "teal")
PROMPTS = ["What colour is the circle?", "How many objects are there?", "Is there a square?"]  # yours, a hundred or more

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}] for p in PROMPTS]
texts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in turns]
batches = [processor(images=[PICTURE], text=[t], return_tensors="pt") for t in texts]
named = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(p in n for p in PARTS)]


def add_moments(layer, inputs):
    x = inputs[0].flatten(0, -2)
    layer.moments = getattr(layer, "moments", 0) + x.T @ x


@torch.no_grad()
def next_words():
    return torch.stack([model(**b).logits[0, -1] for b in batches]).log_softmax(-1)


for layer in named:
    layer.register_forward_pre_hook(add_moments)
before, top = next_words(), 2 ** (BITS - 1) - 1
for layer in named:
    w, hessian = layer.weight.detach().T.clone(), layer.moments
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean() + 1e-8)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    scale = 0.7 * w.abs().amax(0).clamp(min=1e-12) / top  # 0.7: at 3 bits it pays to clip
    for i in range(len(w)):  # one input at a time; the error goes to the inputs not yet rounded
        layer.weight.data[:, i] = rounded = (w[i] / scale).round().clamp(-top - 1, top) * scale
        w[i:].addr_(inverse[i, i:], (w[i] - rounded) / inverse[i, i], alpha=-1)
print(f"{len(named)} layers, {BITS} bits: {(before.exp() * (before - next_words())).sum(-1).mean():.4f} nats from fp32")
