# Why is my quantized model slower, and how could I have known?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/01_measure_before_you_shrink.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TOWERS = ("vision_model", "vision_tower", "visual")  # what model families call their vision part

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (512, 512), "teal")], text=[prompt], return_tensors="pt")

clock, spent = time.perf_counter, {"vision": 0.0}
tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in TOWERS)
tower.register_forward_pre_hook(lambda *_: spent.update(start=clock()))
tower.register_forward_hook(lambda *_: spent.update(vision=clock() - spent["start"]))

rounds = []
with torch.inference_mode():
    for _ in range(6):
        start = clock()
        out = model(**inputs, use_cache=True)
        first = clock()
        for _ in range(8):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        rounds.append((spent["vision"], first - start - spent["vision"], (clock() - first) / 8))
stages = zip(*rounds[1:], strict=True)  # the first round warms up
for name, seconds in zip(("vision", "prefill", "decode, a token"), stages, strict=True):
    print(f"{name:16s} {1000 * statistics.median(seconds):8.1f} ms")
