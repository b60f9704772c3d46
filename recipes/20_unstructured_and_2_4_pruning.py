# Can half the weights be zero, and what does that buy?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/20_unstructured_and_2_4_pruning.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
STAY, OF, PARTS = 2, 4, ("text_model", "language_model")  # two of each four; 64, 128 takes any half
PICTURE, PROMPTS = Image.new("RGB", (512, 512), "teal"), ["What colour is it?", "Is there a square?"]  # yours, a hundred or more
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
before = next_words()
for layer in named:
    h = layer.moments.double() + (0.01 * layer.moments.diagonal().mean() + 1e-8) * torch.eye(len(layer.moments))
    w, inverse = layer.weight.detach().clone(), torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    for i in range(w.shape[1]):  # one input at a time; what a zero changes, the inputs after it make up for
        if i % OF == 0:
            rank = (w[:, i : i + OF] / inverse.diagonal()[i : i + OF]).abs().argsort(1).argsort(1)
            gone = rank < rank.shape[1] * (OF - STAY) // OF
        layer.weight.data[:, i] = kept = w[:, i].masked_fill(gone[:, i % OF], 0)
        w[:, i:].addr_((w[:, i] - kept) / inverse[i, i], inverse[i, i:], alpha=-1)
print(f"{len(named)} layers, {STAY}:{OF}: {(before.exp() * (before - next_words())).sum(-1).mean():.4f} nats from before")
