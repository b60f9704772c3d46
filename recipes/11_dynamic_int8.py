# Int8 without calibration: who makes it fast?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/11_dynamic_int8.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import time
import warnings
from copy import deepcopy

import torch
from PIL import Image, ImageDraw
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
warnings.filterwarnings("ignore", message="(?s).*(torch.ao.quantization|quantize_per_tensor|reduce_range).*")  # it is deprecated
processor = AutoProcessor.from_pretrained(MODEL)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
picture = Image.new("RGB", (512, 512), "white")
ImageDraw.Draw(picture).ellipse((150, 150, 280, 280), fill=(214, 39, 40))
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
inputs = processor(images=[picture], text=[processor.apply_chat_template(turn, add_generation_prompt=True)], return_tensors="pt")
linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
int8 = quantize_dynamic(deepcopy(model), dict.fromkeys(linears, per_channel_dynamic_qconfig))
simulated = deepcopy(model)  # the same arithmetic in floats: 8-bit weights a channel, 7-bit inputs a tensor
for n in linears:
    layer = simulated.get_submodule(n)
    scale = layer.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.5
    layer.weight.data = (layer.weight.data / scale).round().clamp(-128, 127) * scale
    step = lambda x: ((x.max().clamp(min=0) - x.min().clamp(max=0)) / 127).clamp(min=1e-12)  # noqa: E731
    layer.register_forward_pre_hook(lambda _, args, step=step: ((args[0] / step(args[0])).round() * step(args[0]), *args[1:]))
said = {}
for name, m in {"fp32": model, "bf16": deepcopy(model).bfloat16(), "int8": int8, "simulated": simulated}.items():
    own = {k: v.to(torch.bfloat16) if name == "bf16" and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.inference_mode():
        m(**own)  # warm-up
        start = time.perf_counter()
        said[name] = m(**own).logits[0, -1].float()
    ms = 1000 * (time.perf_counter() - start)
    print(f"{name:9s} {ms:6.0f} ms, next word {processor.tokenizer.decode(said[name].argmax())!r}")
gap = ((said["int8"] - said["simulated"]).norm() / said["simulated"].norm()).item()
print(f"int8 is {gap:.3f} (relative) from its simulation:", "as it should" if gap < 0.15 else "BROKEN, do not use it")
