# Same arithmetic, less waiting: what do attention kernels, compilation and fusion bring?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/42_attention_compile_and_fusion.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TOWERS = ("vision_model", "vision_tower", "visual")  # what model families call their vision part
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
image = Image.new("RGB", (512, 512), "white")
ImageDraw.Draw(image).ellipse((150, 150, 280, 280), fill="red")
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(images=[image], text=[text], return_tensors="pt")
tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in TOWERS)
layers = max((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)

for step in ("eager", "sdpa", "sdpa, compiled"):
    model.set_attn_implementation(step.split(",")[0])
    if "compiled" in step:
        [layer.compile() for layer in layers]  # in place; all are alike, so one compilation serves them all
    spent = []
    try:
        for _ in range(6):
            start = time.perf_counter()
            with torch.inference_mode():
                logits = model(**inputs).logits[0, -1]
            spent.append(time.perf_counter() - start)
    except Exception as e:  # no C++ compiler: the rest stands
        print(f"{step:15s} not here ({type(e).__name__}); install g++ (Linux) or the command line tools (macOS)")
        break
    ms = 1e3 * statistics.median(spent[1:])
    if step == "eager":
        wanted, slow = logits, ms
    gap = ((logits - wanted).norm() / wanted.norm()).item()
    print(f"{step:15s} {ms:7.1f} ms, {slow / ms:4.2f}x eager, error {gap:.0e}, first call {spent[0]:5.1f} s")
