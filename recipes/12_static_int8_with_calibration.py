# What range will an activation have?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/12_static_int8_with_calibration.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
processor, model = AutoProcessor.from_pretrained(MODEL), AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("vision_model", "vision_tower", "visual"))
layers = {n: m for n, m in tower.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True)


def draw(seed):  # put your own pictures here
    rng, picture = random.Random(seed), Image.new("RGB", (512, 512), "white")
    for x in (10, 180, 350):
        box = (x, y := rng.randint(0, 380), x + 130, y + 130)
        ImageDraw.Draw(picture).ellipse(box, fill=tuple(rng.choices(range(256), k=3)))
    return picture


def features(picture, act=lambda name, x: None):  # act sees each layer's input, and may replace it
    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: act(n, a[0])) for n, m in layers.items()]
    hooks.append(tower.register_forward_hook(lambda *a: outputs.append(a[2].last_hidden_state)))
    torch.no_grad()(model)(**processor(images=[picture], text=[prompt], return_tensors="pt"))
    [h.remove() for h in hooks]
    return outputs.pop()


noise, outputs, top = Image.effect_noise((512, 512), 80).convert("RGB"), [], {}
wanted = torch.stack([features(draw(i)) for i in range(4)])
for m in layers.values():  # weights: symmetric, a scale an output channel
    scale = m.weight.flatten(1).abs().amax(1).view(-1, *[1] * (m.weight.ndim - 1)).clamp(min=1e-12) / 127
    m.weight.data = (m.weight / scale).round() * scale
for name, pictures in {"noise": [noise], "pictures": map(draw, range(10, 18))}.items():
    top.clear()
    [features(p, lambda n, x: top.update({n: max(top.get(n, 0), x.abs().max())})) for p in pictures]
    moved = [features(draw(i), lambda n, x: (x / top[n]).mul(127).round().clamp(-127, 127) / 127 * top[n]) for i in range(4)]
    print(f"calibrated on {name}: features move by {(torch.stack(moved) - wanted).norm() / wanted.norm():.3f} (relative)")
