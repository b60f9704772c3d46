# How does your own model get from a directory on disk to a deployment?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/61_your_own_model.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
QUESTIONS = 60  # with none changed, up to 6 points may be; 381 exclude one point
WORST = 25.0  # points of changed first tokens that are allowed, at the upper end of the 95% interval: set it before you look
OUT = os.environ.get("OUT")  # a folder for the record; without it the record is only printed


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def example(processor, seed):
    """Inputs for a drawn image and a question. Put your own images and questions here."""
    rng = random.Random(seed)
    colours = rng.sample(["red", "green", "blue", "yellow", "purple"], 2)
    image = Image.new("RGB", (256, 256), "lightgrey")
    top = rng.randint(10, 150)
    ImageDraw.Draw(image).ellipse((20, top, 110, top + 90), fill=colours[0])
    ImageDraw.Draw(image).rectangle((150, 160 - top, 230, 240 - top), fill=colours[1])
    asked = rng.choice(["What colour is the circle?", "What colour is the square?", "Is there a red circle?"])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


@torch.inference_mode()
def first_tokens(model, batches):
    return [model(**batch).logits[0, -1].argmax().item() for batch in batches]


def megabytes(model):
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if callable(getattr(module, "weight", None)):  # an int8 layer: its weight is no parameter
            total += module.weight().numel()
    return total / 1e6


def main():
    warnings.filterwarnings("ignore", message="(?s).*(torch.ao.quantization|quantize_per_tensor|reduce_range).*")  # deprecated
    model, processor = load()
    batches = [example(processor, seed) for seed in range(QUESTIONS)]
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    small = quantize_dynamic(deepcopy(model), dict.fromkeys(linears, per_channel_dynamic_qconfig))
    before = first_tokens(model, batches)
    after = first_tokens(small, batches)
    n = len(batches)
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    share = changed / n
    z = 1.96  # of a 95% interval
    worst = (share + z**2 / 2 / n + z * (share * (1 - share) / n + z**2 / 4 / n**2) ** 0.5) / (1 + z**2 / n)
    decision = "deploy" if 100 * worst <= WORST else "do not deploy"
    record = f"# Decision: {decision}\nmodel {Path(MODEL).name}, dynamic int8, {len(linears)} layers\n"
    record += f"size {megabytes(model):.1f} -> {megabytes(small):.1f} MB\n"
    record += f"first tokens changed: {changed} of {n}, at worst {100 * worst:.1f} points; allowed {WORST}\n"
    print(record, end="")
    if OUT:
        (Path(OUT) / "DECISION.md").write_text(record)


if __name__ == "__main__":
    main()
