# Can half the weights be zero, and what does that buy?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/20_unstructured_and_2_4_pruning.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolVLM-256M-Instruct")
KEPT = 2  # weights that stay in each group: 2 of 4 is the pattern that GPUs have kernels for
GROUP = 4  # neighbouring weights of one output; KEPT, GROUP = 64, 128 leaves any 64 of each 128 neighbours
DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it, so that it can be inverted
CALIBRATION = range(0, 32)  # seeds of drawn scenes; put a hundred or more of your own images and questions in their place
TEST = range(1000, 1032)  # other scenes


def load():
    try:
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a vision-language model ({reason})") from None


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (512, 512), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "blue", "purple", "black"), 3)
    for left, colour in zip((20, 190, 360), colours, strict=True):
        draw = getattr(ImageDraw.Draw(image), rng.choice(("ellipse", "rectangle")))
        top = rng.randint(20, 360)
        draw((left, top, left + 120, top + 120), fill=colour)
    return image, rng.choice(("What shape is the {} object?", "Is there a {} circle?")).format(colours[0])


def first_token_log_probs(model, processor, seeds):
    logits = []
    for image, question in map(draw_scene, seeds):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        logits.append(model(**processor(images=[image], text=[text], return_tensors="pt")).logits[0, -1])
    return torch.stack(logits).log_softmax(-1)


def record_hessian(layer, inputs):
    x = inputs[0].flatten(0, -2)
    layer.hessian = getattr(layer, "hessian", 0) + x.T @ x


def sparsegpt_(weight, hessian):  # prunes (out, in) in place; the columns not yet visited compensate each zero (OBS)
    damped = hessian.double() + (DAMPING * hessian.diagonal().mean() + 1e-8) * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    for i in range(weight.shape[1]):
        if i % GROUP == 0:
            rank = (weight[:, i : i + GROUP] / factor.diagonal()[i : i + GROUP]).abs().argsort(1).argsort(1)
            pruned = rank < rank.shape[1] * (GROUP - KEPT) // GROUP
        column = weight[:, i].masked_fill(pruned[:, i % GROUP], 0)
        weight[:, i:].addr_((weight[:, i] - column) / factor[i, i], factor[i, i:], alpha=-1)
        weight[:, i] = column  # exactly zero, not almost


@torch.no_grad()
def main():
    model, processor = load()
    dense = first_token_log_probs(model, processor, TEST)
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(record_hessian)
    first_token_log_probs(model, processor, CALIBRATION)
    for layer in layers:
        sparsegpt_(layer.weight, layer.hessian)
    sparse = first_token_log_probs(model, processor, TEST)
    nats = (dense.exp() * (dense - sparse)).sum(-1)  # KL divergence on each scene
    same = (dense.argmax(-1) == sparse.argmax(-1)).sum()
    print(f"{len(layers)} layers pruned to {KEPT}:{GROUP}; first token as before in {same} of {len(TEST)} other scenes")
    print(f"KL divergence {nats.mean():.4f} +- {1.96 * nats.std() / len(nats) ** 0.5:.4f} nats (95%)")


if __name__ == "__main__":
    main()
