"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs onnxruntime, transformers, pillow and numpy. Take what you need.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps
from transformers import AutoProcessor

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

# Two graphs. The first turns images (or tiles of one) into visual tokens, one after the other.
vision, language = (
    ort.InferenceSession(str(HERE / f"{name}.onnx"), providers=["CPUExecutionProvider"]) for name in ("vision", "language")
)
tiles = inputs["pixel_values"].astype(np.float32)
tiles = tiles.reshape(-1, 1, *tiles.shape[-3:])
features = [vision.run(None, {vision.get_inputs()[0].name: tile})[0] for tile in tiles]
features = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in features])

# The second reads token ids and visual tokens after what its KV cache holds, and finds the next token. The cache starts empty:
# its third axis counts tokens.
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in language.get_inputs()[2:]}
outputs = ["logits", *(name.replace("input.", "output.", 1) for name in past)]
eos_token_ids = json.loads((HERE / "mmrecipes_export.json").read_text())["eos_token_ids"]
ids, answer = inputs["input_ids"].astype(np.int64), []
while len(answer) < MAX_NEW_TOKENS:
    logits, *new = language.run(outputs, {"input_ids": ids, "image_features": features, **past})
    past = dict(zip(past, new, strict=True))
    token = int(logits[0, -1].argmax())  # greedy: always the likeliest
    if token in eos_token_ids:
        break
    answer.append(token)
    ids = np.array([[token]])  # from now on only the new token goes in

print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
