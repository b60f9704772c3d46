# How does a chat with many images stay within a memory budget?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/16_kv_cache.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.cache_utils import DynamicLayer

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
BLOCK = 32  # tokens that are quantized together
NEW_TOKENS = 12


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def quantize(x, bits, axis):
    """Codes, scale and lowest value: of a channel over the block's tokens (axis -2), or of a token over channels (axis -1)."""
    low = x.amin(axis, keepdim=True).half()
    scale = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).clamp(min=2**-14).half()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1).byte(), scale, low  # a kernel would pack the codes


class KiviLayer(DynamicLayer):
    """Keys per channel and values per token in blocks; the newest tokens stay as they are, in `keys` and `values`."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        self.blocks = []

    def update(self, key_states, value_states, *args, **kwargs):
        back = [[codes * scale.float() + low.float() for codes, scale, low in block] for block in self.blocks]
        super().update(key_states, value_states)
        keys = torch.cat([*(block[0] for block in back), self.keys], dim=-2)
        values = torch.cat([*(block[1] for block in back), self.values], dim=-2)
        while self.keys.shape[-2] >= BLOCK:
            oldest = (quantize(self.keys[..., :BLOCK, :], self.bits, -2), quantize(self.values[..., :BLOCK, :], self.bits, -1))
            self.blocks.append(oldest)
            self.keys = self.keys[..., BLOCK:, :]
            self.values = self.values[..., BLOCK:, :]
        return keys, values

    def get_seq_length(self):
        return BLOCK * len(self.blocks) + super().get_seq_length()

    def nbytes(self):
        packed = sum(part[0].numel() * self.bits // 8 + 2 * part[1].nbytes for block in self.blocks for part in block)
        return packed + self.keys.nbytes + self.values.nbytes


@torch.inference_mode()
def main():
    model, processor = load()
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).ellipse((40, 60, 170, 190), fill="red")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    own = DynamicCache(config=model.config.get_text_config())
    wanted = model.generate(**inputs, **options, past_key_values=own)[0, -NEW_TOKENS:]
    for bits in (8, 4, 2):
        cache = DynamicCache(config=model.config.get_text_config())
        full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
        for i in full:
            cache.layers[i] = KiviLayer(bits)
        found = model.generate(**inputs, **options, past_key_values=cache)[0, -NEW_TOKENS:]
        before = sum(own.layers[i].keys.nbytes + own.layers[i].values.nbytes for i in full)
        after = sum(cache.layers[i].nbytes() for i in full)
        same = int((found == wanted).cumprod(0).sum())
        print(f"{bits} bits in {len(full)} layers: {before} to {after} bytes, first {same} of {NEW_TOKENS} tokens equal")


if __name__ == "__main__":
    main()
