# Same arithmetic, less waiting: what do attention kernels, compilation and fusion bring?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/42_attention_compile_and_fusion.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
VISION_NAMES = ("vision_model", "vision_tower", "visual")  # what model families call their vision encoder
STEPS = ("eager", "sdpa", "sdpa, compiled")  # the first is what the others are compared with
REPEATS = 6  # forward passes a step; the first one, which compiles, is told apart
SCENES = 4  # whose logits are compared


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def draw_scene(seed):
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = ("red", "green", "blue", "orange")
    ImageDraw.Draw(image).ellipse((40, 60, 170, 190), fill=colours[seed])
    ImageDraw.Draw(image).rectangle((320, 300, 440, 410), fill=colours[-seed])
    return image, "What colour is the circle?"


def encode(processor, image, question):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


def vision_layers(model):
    vision_encoder = next(m for name, m in model.named_modules() if name.split(".")[-1] in VISION_NAMES)
    return max((m for m in vision_encoder.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def timed_logits(model, batches):
    """Seconds of each forward pass, and the next token's logits for each batch: (batches, vocabulary)."""
    seconds = []
    logits = []
    for batch in batches[:1] * (REPEATS - 1) + batches:
        start = time.perf_counter()
        with torch.inference_mode():
            logits.append(model(**batch).logits[0, -1])
        seconds.append(time.perf_counter() - start)
    return seconds, torch.stack(logits[-len(batches) :])


def main():
    model, processor = load()
    batches = [encode(processor, *draw_scene(seed)) for seed in range(SCENES)]
    for step in STEPS:
        model.set_attn_implementation(step.split(",")[0])
        if "compiled" in step:
            for layer in vision_layers(model):
                layer.compile()  # in place; all layers are alike, so one compilation serves them all
        try:
            seconds, logits = timed_logits(model, batches)
        except Exception as error:  # no C++ compiler: the other steps stand
            print(f"{step:15s} not here ({type(error).__name__}); install g++ (Linux) or the command line tools (macOS)")
            break
        milliseconds = 1000 * statistics.median(seconds[1:])
        if step == STEPS[0]:
            eager_logits = logits
            eager_milliseconds = milliseconds
        error = ((logits - eager_logits).norm() / eager_logits.norm()).item()
        same = (logits.argmax(-1) == eager_logits.argmax(-1)).sum()
        print(f"{step:15s} {milliseconds:7.1f} ms, {eager_milliseconds / milliseconds:4.2f}x eager, first {seconds[0]:4.1f} s")
        print(f"{'':15s} error of the logits {error:.0e}, next token as in eager in {same} of {len(batches)} scenes")


if __name__ == "__main__":
    main()
