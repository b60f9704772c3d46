# Can a model that sees be made small without going blind?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/00_start_here.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import time
import warnings

import torch
from PIL import Image, ImageDraw
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
QUESTION = "What colour is the circle?"

processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()

picture = Image.new("RGB", (512, 512), "white")
ImageDraw.Draw(picture).ellipse((150, 150, 280, 280), fill=(214, 39, 40))
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(images=[picture], text=[prompt], return_tensors="pt")

# linear layers become int8, one scale an output channel; the head stays as it is, it may share its weights with the embedding
warnings.filterwarnings("ignore", message="(?s).*torch.(ao.)?quanti.*deprecated.*")  # on its way out, and still the quickest
linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
small = quantize_dynamic(model, dict.fromkeys(linear, per_channel_dynamic_qconfig))

for name, m in {"fp32": model, "int8": small}.items():
    m.generate(**inputs, max_new_tokens=2, do_sample=False)  # warm-up
    start = time.perf_counter()
    out = m.generate(**inputs, max_new_tokens=8, do_sample=False)
    seconds = time.perf_counter() - start
    answer = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    print(f"{name}: {answer.strip()!r} in {seconds:.2f} s")
