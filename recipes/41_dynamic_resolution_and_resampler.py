# What does an image's size cost, and how does a model take every size?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/41_dynamic_resolution_and_resampler.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import sys
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
SIZES = ((256, 256), (512, 512), (768, 768), (1024, 512), (1024, 1024))  # width and height in pixels, from small to large
ROUNDS = 5  # timed rounds
# settings of image processors that limit the size, the slices or the visual tokens
SETTINGS = ("size", "crop_size", "max_pixels", "max_image_size", "max_slice_nums", "scale_resolution")
SETTINGS += ("max_patches", "image_grid_pinpoints", "do_image_splitting")


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def encode(processor, size):
    """The inputs for a drawn image of `size` and a question. Put your own image and question here."""
    image = Image.new("RGB", size, "lightgrey")
    ImageDraw.Draw(image).ellipse((40, 60, 170, 190), fill="red")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


def milliseconds(run):
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def peak_mb():
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return int(status.read().split("VmHWM:")[1].split()[0]) / 1000
    import psutil

    return psutil.Process().memory_info().rss / 1e6


@torch.inference_mode()
def main():
    model, processor = load()
    core = getattr(model, "model", model)
    image_token = getattr(processor, "image_token_id", None) or getattr(model.config, "image_token_id", None)
    seen = set()
    print("size, px      visual tokens  prompt tokens  vision, ms  vision and prompt, ms  peak so far, MB")
    for size in SIZES:
        batch = encode(processor, size)
        images = {name: value for name, value in batch.items() if value.shape != batch["input_ids"].shape}
        visual = int((batch["input_ids"] == image_token).sum())
        vision = milliseconds(lambda images=images: core.get_image_features(**images))
        prompt = milliseconds(lambda batch=batch: model(**batch))
        seen.add(visual)
        row = f"{visual:13d} {batch['input_ids'].shape[1]:14d} {vision:11.1f} {prompt:22.1f} {peak_mb():16.0f}"
        print(f"{size[0]:4d} x {size[1]:4d} {row}")
    if len(seen) == 1:
        print("The number of visual tokens does not depend on the size: the processor or the connector fixes it.")
    found = {name: getattr(processor.image_processor, name, None) for name in SETTINGS}
    plain = {name: dict(value) if hasattr(value, "longest_edge") else value for name, value in found.items()}
    chosen = ", ".join(f"{name}={value}" for name, value in plain.items() if value)
    print(f"Set in processor.image_processor, then save_pretrained: {chosen}")


if __name__ == "__main__":
    main()
