# Can one tower get smaller without losing the other?
# The recipe of https://github.com/mmrecipes/mmrecipes/blob/main/notebooks/32_contrastive_distillation.ipynb
# Extracted by tools/recipes.py; change the notebook instead. Licence: Apache-2.0.

import os
import random

import torch
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor

MODEL = os.environ.get("MODEL", "google/siglip-base-patch16-224")  # or a CLIP
TRAIN = [range(i, i + 32) for i in range(0, 128, 32)]  # seeds of drawn scenes, by batches; put thousands of your pairs there
TEST = range(1000, 1064)  # other scenes
EPOCHS = 10
LEARNING_RATE = 5e-4
FEATURE_WEIGHT = 10.0  # of staying at the teacher's embeddings, against keeping its image-text similarities
OUT = os.environ.get("OUT")  # directory of the student's checkpoint; without it nothing is kept


def load():
    try:
        model = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
        return model, model.logit_scale.exp().detach(), AutoProcessor.from_pretrained(MODEL)
    except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"MODEL={MODEL!r}: set it to the hub id or directory of a CLIP or SigLIP model ({reason})") from None


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


@torch.no_grad()
def report(name, model, batch, old):
    new = embed(model, batch)
    hits = ((new[0] @ old[1].T).argmax(1) == torch.arange(len(TEST))).sum()
    print(f"{name}: cosine {(new * old).sum(-1).mean():.2f} with the old, {hits} of {len(TEST)} images find their caption")


def main():
    teacher, scale, processor = load()
    student, _, _ = load()
    for encoder in (student.vision_model.encoder, student.text_model.encoder):
        encoder.layers = encoder.layers[::2]  # every other one
        encoder.config.num_hidden_layers = len(encoder.layers)
    batches = [encode(teacher, processor, seeds) for seeds in (*TRAIN, TEST)]
    wanted = [embed(teacher, batch).detach() for batch in batches]
    report("teacher", teacher, batches[-1], wanted[-1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for batch, old in list(zip(batches[:-1], wanted[:-1], strict=True)) * EPOCHS:
        new = embed(student, batch)
        student_scores = (scale * new @ new.flip(0).mT).log_softmax(-1)  # images against captions and the other way round
        teacher_scores = (scale * old @ old.flip(0).mT).log_softmax(-1)
        affinity = (teacher_scores.exp() * (teacher_scores - student_scores)).sum(-1).mean()
        (FEATURE_WEIGHT * (1 - (new * old).sum(-1).mean()) + affinity).backward()
        optimizer.step()
        optimizer.zero_grad()
    report("student", student, batches[-1], wanted[-1])
    if OUT:
        student.save_pretrained(OUT)
        processor.save_pretrained(OUT)


if __name__ == "__main__":
    main()
