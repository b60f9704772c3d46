# How few bits can a weight have?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/10_quantization_from_scratch.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BITS, GROUP = (8, 4, 3, 2), 32

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()

picture = Image.new("RGB", (512, 512), "white")
ImageDraw.Draw(picture).ellipse((150, 150, 280, 280), fill=(214, 39, 40))
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
originals = [m.weight.detach().clone() for m in linears]


def next_word():
    with torch.inference_mode():
        return model(**inputs).logits[0, -1].log_softmax(-1)


reference = next_word()
for bits in BITS:
    top = 2 ** (bits - 1) - 1
    for layer, weight in zip(linears, originals, strict=True):
        group = GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]
        rows = weight.reshape(-1, group)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
        layer.weight.data = ((rows / scale).round() * scale).reshape(weight.shape)
    said = next_word()
    shift = (reference.exp() * (reference - said)).sum().item()
    word = processor.tokenizer.decode(said.argmax())
    print(f"{bits} bits: next word {word!r}, {shift:.4f} nats away from fp32 (Kullback-Leibler divergence)")
