# Which parts of a model can go, and is what is left faster?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/21_structured_pruning.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random
import tempfile

import torch
import torch_pruning as tp
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
KEEP = 0.75  # share of each FFN's hidden channels that stays
OUT = os.environ.get("OUT")  # directory of the pruned checkpoint; without it nothing is kept
TEST = range(32)  # seeds of drawn scenes; pruning by magnitude needs no calibration data


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"MODEL={MODEL!r}: no vision-language model loads from it ({' '.join(str(error).split())})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, colour in zip((20, 190, 360), colours, strict=True):
        draw = getattr(ImageDraw.Draw(image), rng.choice(("ellipse", "rectangle")))
        top = rng.randint(20, 360)
        draw((left, top, left + 120, top + 120), fill=colour)
    return image, rng.choice(("What shape is the {} object?", "Is there a {} circle?")).format(colours[0])


def first_tokens(model, processor):
    """The first token of the answer about each test scene."""
    tokens = []
    for image, question in map(draw_scene, TEST):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        batch = processor(images=[image], text=[text], return_tensors="pt")
        with torch.no_grad():
            tokens.append(model(**batch).logits[0, -1].argmax())
    return torch.stack(tokens)


def prune_ffn_(ffn):
    """Remove the hidden channels with the smallest weights, from all matrices of the FFN at once."""
    first = ffn.up_proj if hasattr(ffn, "up_proj") else ffn.fc1
    graph = tp.DependencyGraph().build_dependency(ffn, example_inputs=torch.randn(1, 2, first.in_features))
    group = graph.get_pruning_group(first, tp.prune_linear_out_channels, list(range(first.out_features)))
    scores = tp.importance.GroupMagnitudeImportance(p=2)(group)  # over the rows and columns of each channel
    weakest = scores.argsort()[: int((1 - KEEP) * len(scores))].tolist()
    graph.get_pruning_group(first, tp.prune_linear_out_channels, weakest).prune()


def save_and_reload(model, processor):
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(OUT or scratch)
        processor.save_pretrained(OUT or scratch)
        return AutoModelForImageTextToText.from_pretrained(OUT or scratch, dtype=torch.float32)


def main():
    model, processor = load()
    parameters = model.num_parameters()
    before = first_tokens(model, processor)
    for name, ffn in list(model.named_modules()):
        if (hasattr(ffn, "down_proj") or hasattr(ffn, "fc2")) and "resampler" not in name:  # whose width no config tells
            prune_ffn_(ffn)
    for config in (model.config.vision_config, model.config.get_text_config()):
        config.intermediate_size -= int((1 - KEEP) * config.intermediate_size)
    pruned = save_and_reload(model, processor)  # a plain checkpoint: any runtime that loads MODEL loads it
    after = first_tokens(pruned, processor)
    print(f"{parameters:,} -> {pruned.num_parameters():,} parameters: an ordinary checkpoint, saved and loaded again")
    print(f"first token as before in {(before == after).sum()} of {len(TEST)} scenes; now fine-tune it")


if __name__ == "__main__":
    main()
