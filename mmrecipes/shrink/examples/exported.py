"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs RUNTIME, transformers, pillow and numpy. Take what you need.
"""

import json
import sys
from pathlib import Path

from model_family import FAMILY, load_processor  # beside this file: how images become visual tokens in this family of models
from PIL import Image, ImageOps

from mmrecipes.shrink.examples.onnx import load, np

HERE = Path(__file__).resolve().parent
if len(sys.argv) != 3:
    sys.exit(__doc__)

# The image, scaled as the model wants it, and the question in the model's chat format, as token ids.
processor = load_processor(HERE)
image, question = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"), sys.argv[2]
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
inputs = processor.apply_chat_template(messages, **options)

encode, step = load(HERE)
manifest, generation = (json.loads((HERE / f"{name}.json").read_text()) for name in ("mmrecipes_export", "generation_config"))
settings, penalty = manifest["settings"], generation.get("repetition_penalty") or 1.0
features = FAMILY.merge([encode(run) for run in FAMILY.images(inputs, settings)], inputs, settings)
positions = FAMILY.positions and FAMILY.positions(inputs, settings)  # None: 0, 1, 2, ...
ids = inputs["input_ids"][0].tolist()
start, logits = len(ids), step(ids, features, positions)
for _ in range(64):
    said = np.unique(ids)  # less likely a second time, where the model asks for it
    logits[said] = np.where(logits[said] > 0, logits[said] / penalty, logits[said] * penalty)
    ids.append(int(logits.argmax()))  # greedy: always the likeliest
    if ids[-1] in manifest["eos_token_ids"]:
        break
    positions = None if positions is None else positions[:, :, -1:] * 0 + positions.max() + 1
    logits = step(ids[-1:], features, positions)  # from now on only the new token goes in

print(processor.tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
