# Can one encoder get smaller without losing the other?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/32_contrastive_distillation.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor

MODEL = os.environ.get("MODEL", "google/siglip-base-patch16-224")  # or a CLIP
TRAIN = [range(i, i + 32) for i in range(0, 128, 32)]  # seeds of drawn scenes, by batches; put thousands of your pairs there
TEST = range(1000, 1064)  # other scenes
EPOCHS = 10
LEARNING_RATE = 5e-4
FEATURE_WEIGHT = 10.0  # of keeping the teacher's embeddings, against keeping its image-text similarities
OUT = os.environ.get("OUT")  # directory of the student's checkpoint; without it nothing is kept


def draw_scene(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (256, 256), "lightgrey")
    colours = rng.sample(("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black"), 3)
    shapes = rng.choices(("square", "circle"), k=3)
    for left, colour, shape in zip((10, 95, 180), colours, shapes, strict=True):
        ImageDraw.Draw(image).rounded_rectangle((left, left, left + 60, left + 60), 30 * (shape == "circle"), fill=colour)
    return image, ", ".join(f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))


def encode(model, processor, seeds):
    images, captions = map(list, zip(*map(draw_scene, seeds), strict=True))
    fixed = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings, "truncation": True}
    return processor(images=images, text=captions, return_tensors="pt", **fixed)


def embed(model, batch):
    out = model(**batch)
    return torch.stack([out.image_embeds, out.text_embeds])  # (2, batch, width), unit vectors


def similarity_loss(teacher, new, old):
    student, wanted = (teacher.logit_scale.exp() * images @ texts.T for images, texts in (new, old))
    if hasattr(teacher, "logit_bias"):  # SigLIP: each pair has the teacher's probability
        targets = (wanted + teacher.logit_bias).sigmoid()
        return F.binary_cross_entropy_with_logits(student + teacher.logit_bias, targets, reduction="sum") / len(student)
    return sum(F.kl_div(student.log_softmax(d), wanted.log_softmax(d), log_target=True, reduction="batchmean") for d in (0, 1))


@torch.no_grad()
def report(name, model, batch, old):
    new = embed(model, batch)
    hits = ((new[0] @ old[1].T).argmax(1) == torch.arange(len(TEST))).sum()
    print(f"{name}: cosine {(new * old).sum(-1).mean():.2f} with the old, {hits} of {len(TEST)} images find their old caption")


def main():
    try:
        teacher = AutoModel.from_pretrained(MODEL, dtype=torch.float32).requires_grad_(False)
        processor = AutoProcessor.from_pretrained(MODEL)
        batches = [encode(teacher, processor, seeds) for seeds in (*TRAIN, TEST)]
    except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
        raise SystemExit(f"MODEL={MODEL!r} is no CLIP or SigLIP (hub id or directory): {str(error).split(chr(10))[0]}") from None
    student = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
    for encoder in (student.vision_model.encoder, student.text_model.encoder):
        encoder.layers = encoder.layers[::2]  # every other one
        encoder.config.num_hidden_layers = len(encoder.layers)
    wanted = [embed(teacher, batch) for batch in batches]
    report("untrained", student, batches[-1], wanted[-1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for batch, old in list(zip(batches[:-1], wanted[:-1], strict=True)) * EPOCHS:
        new = embed(student, batch)
        (FEATURE_WEIGHT * (1 - (new * old).sum(-1).mean()) + similarity_loss(teacher, new, old)).backward()
        optimizer.step()
        optimizer.zero_grad()
    report("distilled", student, batches[-1], wanted[-1])
    if OUT:
        student.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
