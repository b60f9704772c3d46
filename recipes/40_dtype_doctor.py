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
COLOURS = ("red", "green", "blue", "orange")


def load():
    try:
        processor = AutoProcessor.from_pretrained(MODEL, trust_remote_code=TRUST)
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=TRUST)
        return model.eval().requires_grad_(False), processor
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def encode(processor, seed):
    """The inputs for a drawn image and a question. Put your own images and questions here."""
    image = Image.new("RGB", (256, 256), "lightgrey")
    ImageDraw.Draw(image).ellipse((20, 30 + 9 * seed, 90, 100 + 9 * seed), fill=COLOURS[seed % 4])
    ImageDraw.Draw(image).rectangle((160, 150 - 9 * seed, 220, 210 - 9 * seed), fill=COLOURS[(seed + seed // 4 + 1) % 4])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


class Watch(TorchFunctionMode):
    """Notes which functions take the weight of a linear layer, or ask for its dtype, while that layer is not running."""

    def __init__(self, layers):
        super().__init__()
        self.owner = {id(layer.weight): name for name, layer in layers.items()}
        self.running, self.found = None, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        what = getattr(getattr(function, "__self__", function), "__name__", str(function))
        for value in (*args, *(kwargs or {}).values()):
            name = self.owner.get(id(value))
            if name not in (None, self.running) and what not in ("device", "shape", "requires_grad"):
                self.found[name] = what
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
    watch = Watch(layers)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: setattr(watch, "running", name))
        layer.register_forward_hook(lambda *_: setattr(watch, "running", None))
    with torch.no_grad(), watch:
        wanted = torch.stack([model(**batch).logits[0, -1] for batch in batches])
    print("left alone, as their weights are read:", watch.found or "none")
    before = sum(p.nbytes for p in model.parameters())
    fits = [n for n, m in layers.items() if n not in watch.found and not m.in_features % 64 and not m.out_features % 32]
    for name in fits:
        model.set_submodule(name, pack(layers[name]))
    with torch.no_grad():
        found = torch.stack([model(**batch).logits[0, -1] for batch in batches])
    same = (found.argmax(-1) == wanted.argmax(-1)).sum().item()
    error = ((found - wanted).norm() / wanted.norm()).item()
    after = sum(p.nbytes for p in model.parameters())
    print(f"NF4 in {len(fits)} of {len(layers)} linear layers: {before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB now")
    print(f"first tokens as before: {same} of {SCENES}; relative error of their logits {error:.2f}")


if __name__ == "__main__":
    main()
