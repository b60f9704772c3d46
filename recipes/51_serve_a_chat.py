# How do many users share one compressed model?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/51_serve_a_chat.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
PROMPTS = ("What colour is the circle?", "Is there a square?", "How many objects are there?")  # put your own here
LIMITS = (3, 16, 6, 12, 3, 2, 9, 6)  # tokens of the answers, at most
BATCH = 3  # rows of a batch


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def make_request(processor, i):  # put your own image here
    image = Image.new("RGB", (512, 512), "lightgrey")
    ImageDraw.Draw(image).ellipse((40, 60, 170 + 20 * i, 190 + 20 * i), fill=("red", "blue", "green")[i % 3])
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[i % len(PROMPTS)]}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    return {"inputs": processor(images=[image], text=[text], return_tensors="pt"), "limit": LIMITS[i], "answer": []}


def extend(model, row, logits):
    ends = model.generation_config.eos_token_id
    row["answer"].append(logits.argmax().item())
    row["done"] = row["answer"][-1] in (ends if isinstance(ends, list) else [ends]) or len(row["answer"]) == row["limit"]


def batch(model, rows, joining):  # one cache for rows that stay and join: prompts are read alone, then padded on the left
    for row in joining:
        own = DynamicCache(config=model.config.get_text_config())
        if hasattr(model.model, "rope_deltas") or any(type(layer).__name__ != "DynamicLayer" for layer in own.layers):
            raise SystemExit(f"MODEL={MODEL!r}: M-RoPE, or a cache that is not plain; this is for models like SmolVLM and LLaVA")
        extend(model, row, model(**row["inputs"], past_key_values=own, use_cache=True).logits[0, -1])
        row["cache"] = [(layer.keys, layer.values) for layer in own.layers]
    rows[:] = [row for row in rows + joining if not row["done"]]
    cache = DynamicCache(config=model.config.get_text_config())
    longest = max([row["cache"][0][0].shape[2] for row in rows], default=0)
    for i in range(len(cache.layers) if rows else 0):
        padded = [[torch.nn.functional.pad(x, (0, 0, longest - x.shape[2], 0)) for x in row["cache"][i]] for row in rows]
        cache.update(*map(torch.cat, zip(*padded, strict=True)), i)
    return cache


@torch.inference_mode()
def main():
    model, processor = load()
    requests = [make_request(processor, i) for i in range(len(LIMITS))]
    waiting = requests.copy()
    rows = []
    steps = 0
    while waiting or rows:
        joining = waiting[: BATCH - sum(not row["done"] for row in rows)]
        if joining or any(row["done"] for row in rows):
            del waiting[: len(joining)]
            cache = batch(model, rows, joining)
        if not rows:
            continue
        held = torch.tensor([[row["inputs"]["input_ids"].shape[1] + len(row["answer"]) - 1] for row in rows])
        mask = (torch.arange(held.max() + 1) >= held.max() - held).long()  # zero where a row is padded
        places = {"attention_mask": mask, "position_ids": held, "past_key_values": cache}
        logits = model(input_ids=torch.tensor([row["answer"][-1:] for row in rows]), **places).logits
        steps += 1
        for i, row in enumerate(rows):
            row["cache"] = [tuple(x[i : i + 1, :, -int(held[i]) - 1 :] for x in (y.keys, y.values)) for y in cache.layers]
            extend(model, row, logits[i, -1])
    wanted = [model.generate(**row["inputs"], max_new_tokens=row["limit"], do_sample=False) for row in requests]
    same = sum(found[0, -len(row["answer"]) :].tolist() == row["answer"] for row, found in zip(requests, wanted, strict=True))
    print("answers:", [processor.tokenizer.decode(row["answer"], skip_special_tokens=True).strip() for row in requests])
    print(f"{same} of {len(requests)} as from generate() alone; {len(requests)} prefills and {steps} steps of up to {BATCH} rows")


if __name__ == "__main__":
    main()
