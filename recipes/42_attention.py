# Why does attention run out of memory, and what do tiles and a cache change?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/42_attention.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import statistics
import time

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
# the first is what the others are compared with; add "flash_attention_2" on a GPU, or a name of yours from AttentionInterface
ATTENTION = ("eager", "sdpa")
ROUNDS = 9  # timed rounds, each with every implementation
SCENES = 4  # whose logits are compared
TOLERANCE = 1e-3  # relative error of logits, in float32


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
    ImageDraw.Draw(image).rectangle((320, 300, 440, 410), fill=colours[-seed % 4])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


@torch.inference_mode()
def two_tokens(model, batch):
    """Logits (2, vocabulary): of the token after the prompt, and of the next one, which comes from the cache."""
    options = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
    return torch.cat(model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True).logits)


@torch.inference_mode()
def prompt_milliseconds(model, batch):
    start = time.perf_counter()
    model(**batch)
    return 1000 * (time.perf_counter() - start)


def main():
    model, processor = load()
    batches = [encode(processor, seed) for seed in range(SCENES)]
    logits = {}
    for name in ATTENTION:
        model.set_attn_implementation(name)
        logits[name] = torch.stack([two_tokens(model, batch) for batch in batches])
    times = {name: [] for name in ATTENTION}
    for _ in range(ROUNDS):
        for name in ATTENTION:
            model.set_attn_implementation(name)
            times[name].append(prompt_milliseconds(model, batches[0]))
    reference = logits[ATTENTION[0]]
    for name in ATTENTION:
        error = (logits[name] - reference).norm(dim=-1) / reference.norm(dim=-1)
        verdict = "same" if error.max() < TOLERANCE else "NOT the same"
        spread = f"[{min(times[name]):.1f}, {max(times[name]):.1f}]"
        print(f"{name:18s} prompt {statistics.median(times[name]):7.1f} ms {spread}, {verdict}: largest error", end=" ")
        print(f"after the prompt {error[:, 0].max():.0e}, from the cache {error[:, 1].max():.0e}")
    with torch.inference_mode():
        cache = model(**batches[0], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"KV cache: {held / batches[0]['input_ids'].shape[1]:,.0f} bytes a token in float32")


if __name__ == "__main__":
    main()
