# Why does a quantized model stop with "Half and Byte", and which layers must a quantizer skip?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/40_dtype_doctor.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import bitsandbytes as bnb
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
TRUST = os.environ.get("TRUST_REMOTE_CODE") == "1"  # runs code from MODEL: read it first
SCENES = 8  # images with a question each, that the answers are compared on


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=TRUST)
        return model.eval(), AutoProcessor.from_pretrained(MODEL, trust_remote_code=TRUST)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def encode(processor, seed):  # put your own images and questions here
    image = Image.new("RGB", (256, 256), "lightgrey")
    ImageDraw.Draw(image).ellipse((20 + 9 * seed, 30, 90 + 9 * seed, 100), fill=("red", "green", "blue", "orange")[seed % 4])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    return processor(images=[image], text=[processor.apply_chat_template(turn, add_generation_prompt=True)], return_tensors="pt")


@torch.no_grad()
def first_logits(model, batches):
    return torch.stack([model(**batch).logits[0, -1] for batch in batches])


class Watch(TorchFunctionMode):
    """Notes who, other than the product with it, takes the weight of a linear layer or asks for its dtype."""

    def __init__(self, layers):
        super().__init__()
        self.read = {}
        self.owner = {id(layer.weight): name for name, layer in layers.items()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        what = getattr(function, "__name__", str(function))
        what = function.__self__.__name__ if what == "__get__" else what  # an attribute, such as dtype
        for value in (*args, *(kwargs or {}).values()):
            if id(value) in self.owner and what not in ("linear", "device", "shape", "requires_grad"):
                self.read[self.owner[id(value)]] = what
        return function(*args, **(kwargs or {}))


def pack(layer):
    small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4")
    small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = layer.bias
    return small.to(layer.weight.device).eval()  # moving it packs it


def main():
    model, processor = load()
    batches = [encode(processor, seed) for seed in range(SCENES)]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    never = set(layers)  # called: their weights are read, or they are not used
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: never.discard(name))
    with Watch(layers) as watch:
        wanted = first_logits(model, batches)
    print("left alone:", dict.fromkeys(sorted(never), "never called") | watch.read or "none")
    before = sum(p.nbytes for p in model.parameters())
    fits = [n for n, m in layers.items() if m.in_features % 64 == 0 == m.out_features % 32 and n not in never | watch.read.keys()]
    for name in fits:
        model.set_submodule(name, pack(layers[name]))
    found = first_logits(model, batches)
    after = sum(p.nbytes for p in model.parameters())
    print(f"NF4 in {len(fits)} of {len(layers)} linear layers: {before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB now")
    print(f"first tokens as before: {(found.argmax(-1) == wanted.argmax(-1)).sum()} of {SCENES}")


if __name__ == "__main__":
    main()
