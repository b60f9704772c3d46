"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"
Needs RUNTIME, transformers, pillow and numpy. Take what you need.
"""

import json
import sys
from pathlib import Path

from model_family import FAMILY, load_processor  # beside this file: how images become visual tokens in this family of models
from PIL import Image, ImageOps

from mmrecipes.shrink.examples.onnx import load, np

if len(sys.argv) != 3:
    sys.exit(__doc__)
here, question = Path(__file__).resolve().parent, sys.argv[2]
# The image, scaled as the model wants it, and the question in the model's chat format, as token ids.
image, processor = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"), load_processor(here)
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np")
encode, step = load(here)
manifest = json.loads((here / "mmrecipes_export.json").read_text())
settings, rules = manifest["settings"], manifest["generation"]
features = FAMILY.merge([encode(run) for run in FAMILY.images(inputs, settings)], inputs, settings)
positions = FAMILY.positions and FAMILY.positions(inputs, settings)  # None: 0, 1, 2, ...
ids, answer = inputs["input_ids"][0].tolist(), []
piece = FAMILY.piece or len(ids)  # decoders with states read a prompt in pieces
for i in range(0, len(ids), piece):
    before = ids[:i].count(manifest["image_token_id"])
    logits = step(
        ids[i : i + piece],
        features[min(before, len(features) - 1) :],
        positions if positions is None else positions[:, :, i : i + piece],
    )
if (here / "image_token.npy").is_file():  # what the model's image token means, should it generate one: no image is there then
    own = np.load(here / "image_token.npy")
    features = np.pad(own, ((0, 0), (0, features.shape[1] - own.shape[1])))
for _ in range(64):
    seen, penalty = np.unique(ids + answer), rules.get("repetition_penalty", 1.0)
    logits[seen] *= np.where(logits[seen] > 0, 1 / penalty, penalty)
    logits[rules.get("suppress_tokens", [])] = -np.inf
    token = int(logits.argmax())  # greedy: always the likeliest
    if token in manifest["eos_token_ids"]:
        break
    answer.append(token)
    positions = None if positions is None else positions[:, :, -1:] * 0 + positions.max() + 1
    logits = step([token], features, positions)  # from now on only the new token goes in
print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
