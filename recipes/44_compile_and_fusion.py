# When does a compiler make a model faster, and how do I know?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/44_compile_and_fusion.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
VISION_NAMES = ("vision_model", "vision_tower", "visual")  # what model families call their vision encoder
ROUNDS = 15  # timed rounds, each with and without compilation
MARGIN = 0.05  # smaller differences are not claimed
SCENES = 4  # whose logits are compared


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def encode(processor, seed):
    """The inputs for a drawn image and a question. Put your own images and questions here."""
    colours = ("red", "green", "blue", "orange")
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).ellipse((40, 60, 170, 190), fill=colours[seed % 4])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    return processor(images=[image], text=[processor.apply_chat_template(turn, add_generation_prompt=True)], return_tensors="pt")


def vision_layers(model):
    vision_encoder = next(m for name, m in model.named_modules() if name.split(".")[-1] in VISION_NAMES)
    return max((m for m in vision_encoder.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


@torch.inference_mode()
def run(model, batch, stance):
    """Next-token logits (vocabulary,) and seconds; "default" runs compiled layers, "force_eager" the same layers uncompiled."""
    with torch.compiler.set_stance(stance):
        start = time.perf_counter()
        logits = model(**batch).logits[0, -1]
        return logits, time.perf_counter() - start


def main():
    model, processor = load()
    batches = [encode(processor, seed) for seed in range(SCENES)]
    for layer in vision_layers(model):
        layer.compile()  # in place
    try:
        first = run(model, batches[0], "default")[1]
    except Exception as error:  # no C++ compiler
        print(f"not compiled here ({type(error).__name__}); a C++ compiler: g++ (Linux), the command line tools (macOS)")
        return
    times = {"force_eager": [], "default": []}
    for _ in range(ROUNDS):
        for stance, seconds in times.items():
            seconds.append(run(model, batches[0], stance)[1])
    for stance, seconds in times.items():
        print(f"{stance:12s} {1e3 * statistics.median(seconds):7.1f} ms [{1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f}]")
    ratios = [eager / compiled for eager, compiled in zip(*times.values(), strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=ROUNDS)) for _ in range(1000))
    verdict = "faster" if medians[25] > 1 + MARGIN else "slower" if medians[974] < 1 / (1 + MARGIN) else "no verdict"
    print(f"{statistics.median(ratios):.2f} times as fast, 95% interval [{medians[25]:.2f}, {medians[974]:.2f}]: {verdict}")
    print(f"first call {first:.1f} s; graph breaks: {sum(torch._dynamo.utils.counters['graph_break'].values())}")
    if verdict == "faster":
        won = statistics.median(times["force_eager"]) - statistics.median(times["default"])
        print(f"compiling has paid after {first / won:,.0f} calls")
    eager, compiled = (torch.stack([run(model, batch, stance)[0] for batch in batches]) for stance in times)
    agree = (eager.argmax(-1) == compiled.argmax(-1)).sum()
    print(f"error of the logits {(compiled - eager).norm() / eager.norm():.0e}, same next token in {agree} of {SCENES} scenes")


if __name__ == "__main__":
    main()
