"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs RUNTIME, transformers, pillow and numpy. Take what you need.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageOps
from transformers import AutoProcessor

from mmrecipes.shrink.examples.onnx import load

HERE = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 64
if len(sys.argv) != 3:
    sys.exit(__doc__)

# The image, scaled as the model wants it, and the question in the model's chat format, as token ids.
processor = AutoProcessor.from_pretrained(HERE)
image, question = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"), sys.argv[2]
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[prompt], images=[[image]], return_tensors="np")

encode, step = load(HERE)
pixels = inputs["pixel_values"].astype("float32")
features = encode(pixels.reshape(-1, 1, *pixels.shape[-3:]))  # of images, or tiles of one
eos_token_ids = json.loads((HERE / "mmrecipes_export.json").read_text())["eos_token_ids"]
ids, answer = inputs["input_ids"][0].tolist(), []
while len(answer) < MAX_NEW_TOKENS:
    token = int(step(ids, features)[0, -1].argmax())  # greedy: always the likeliest
    if token in eos_token_ids:
        break
    answer.append(token)
    ids = [token]  # from now on only the new token goes in

print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
