"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs openvino, transformers, pillow and numpy. Take what you need.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
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

# Two graphs. The first turns images (or tiles of one) into visual tokens, one after the other. "f32" is what the model was
# checked in; without it a CPU with instructions for bf16 would compute in that.
core, settings = ov.Core(), {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
vision, language = (
    core.compile_model(HERE / f"{name}.xml", "CPU", settings).create_infer_request() for name in ("vision", "language")
)
tiles = inputs["pixel_values"].astype(np.float32)
features = [vision.infer([tile])[0].copy() for tile in tiles.reshape(-1, 1, *tiles.shape[-3:])]
features = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in features])

# The second reads token ids and visual tokens after what its KV cache holds, and finds the next token. The cache is inside.
language.reset_state()
eos_token_ids = json.loads((HERE / "mmrecipes_export.json").read_text())["eos_token_ids"]
ids, answer = inputs["input_ids"].astype(np.int64), []
while len(answer) < MAX_NEW_TOKENS:
    given = {"input_ids": ids, "image_features": features, "beam_idx": np.zeros(1, np.int32)}
    token = int(language.infer(given)["logits"][0, -1].argmax())  # greedy: always the likeliest
    if token in eos_token_ids:
        break
    answer.append(token)
    ids = np.array([[token]])  # from now on only the new token goes in

print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
