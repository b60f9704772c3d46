"""Ask the model in this folder about an image: python example.py IMAGE "QUESTION"

Needs executorch, torch (for its tensors), transformers, pillow and numpy. On a phone the same two programs run from Kotlin, Swift
or C++ (link extension_llm_custom_ops beside the XNNPACK backend); what happens around them is this.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the kernels of the language program's attention
from executorch.runtime import Runtime
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

# Two programs. The first turns images (or tiles of one) into visual tokens, one after the other.
programs = [Runtime.get().load_program(HERE / f"{name}.pte") for name in ("vision", "language")]
vision, language = (program.load_method("forward") for program in programs)
tiles = torch.from_numpy(inputs["pixel_values"].astype(np.float32))
tiles = tiles.reshape(-1, 1, *tiles.shape[-3:])
features = [vision.execute([tile.contiguous()])[0].clone() for tile in tiles]
features = torch.cat([tokens.reshape(-1, tokens.shape[-1]) for tokens in features])

# The second reads token ids and visual tokens, and finds the next token. Its KV cache is inside, and `cache_length` says
# how many tokens of it count.
eos_token_ids = json.loads((HERE / "mmrecipes_export.json").read_text())["eos_token_ids"]
ids, cache_length, answer = torch.from_numpy(inputs["input_ids"].astype(np.int64)), 0, []
while len(answer) < MAX_NEW_TOKENS:
    logits = language.execute([ids, features, torch.tensor([cache_length])])[0]
    cache_length += ids.shape[1]
    token = int(logits[0, -1].argmax())  # greedy: always the likeliest
    if token in eos_token_ids:
        break
    answer.append(token)
    ids = torch.tensor([[token]])  # from now on only the new token goes in

print(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
