"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs torch, transformers, bitsandbytes, accelerate and pillow. Take what you need.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # bitsandbytes would look for further kernels on the hub

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 64
if len(sys.argv) != 3:
    sys.exit(__doc__)

# An ordinary checkpoint: its config.json says which layers have 4 bits. On a GPU, pass device_map="cuda".
processor = AutoProcessor.from_pretrained(HERE)
processor.image_processor = AutoImageProcessor.from_pretrained(HERE, backend="pil")  # torchvision's pixels would be others
model = AutoModelForImageTextToText.from_pretrained(HERE, dtype="auto").eval()
if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and model.device.type == "cpu":
    for p in model.parameters():  # an older CPU computes in bf16 very slowly: float32 gives the same answers
        p.data = p.data.float() if p.is_floating_point() else p.data
    for layer in model.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.float32

# The image, scaled as the model wants it, and the question in the model's chat format, as token ids.
image, question = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"), sys.argv[2]
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[prompt], images=[[image]], return_tensors="pt")
dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

# Greedy decoding, with a KV cache.
with torch.inference_mode():
    ids = model.generate(**inputs.to(model.device, dtype), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
print(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
