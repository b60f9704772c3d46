"""Sort-of-CLEVR: another domain than the scenes, for the tokenizer's text and for calibration that fits badly (notebook 12)."""

import math
import random

from PIL import Image, ImageDraw

from mmrecipes.data.families import Question
from mmrecipes.data.scenes import COLOURS

CLEVR_COLOURS = {k: COLOURS[k] for k in ("red", "green", "blue", "orange", "cyan", "yellow")}


def sort_of_clevr(seed: int) -> tuple[Image.Image, list[Question]]:
    """Sort-of-CLEVR (Santoro et al. 2017, arXiv:1706.01427), questions in words: one 75 x 75 image with six objects, one of each
    of six colours, and its 10 non-relational and 10 relational questions."""
    rng = random.Random(seed)
    spots: list[tuple[int, int]] = []
    while len(spots) < 6:
        spot = (rng.randint(6, 68), rng.randint(6, 68))
        if all(max(abs(spot[0] - x), abs(spot[1] - y)) > 10 for x, y in spots):
            spots.append(spot)
    things = {c: (x, y, rng.choice(("circle", "square"))) for c, (x, y) in zip(CLEVR_COLOURS, spots, strict=True)}
    canvas = Image.new("RGB", (300, 300), (245, 245, 245))
    draw = ImageDraw.Draw(canvas)
    for colour, (x, y, shape) in things.items():
        paint = draw.ellipse if shape == "circle" else draw.rectangle
        paint((4 * x - 20, 4 * y - 20, 4 * x + 20, 4 * y + 20), fill=CLEVR_COLOURS[colour])
    questions = []
    for _ in range(10):
        colour = rng.choice(tuple(things))
        x, y, shape = things[colour]
        alone = (
            (f"What shape is the {colour} object?", shape),
            (f"Is the {colour} object on the left of the picture?", "yes" if x < 37.5 else "no"),
            (f"Is the {colour} object at the top of the picture?", "yes" if y < 37.5 else "no"),
        )
        questions.append(Question(*rng.choice(alone), "non-relational"))
        order = sorted((c for c in things if c != colour), key=lambda c: math.dist(things[c][:2], (x, y)))
        together = (
            (f"What shape is the object closest to the {colour} object?", things[order[0]][2]),
            (f"What shape is the object furthest from the {colour} object?", things[order[-1]][2]),
            (f"How many objects have the shape of the {colour} object?", str(sum(t[2] == shape for t in things.values()))),
        )
        questions.append(Question(*rng.choice(together), "relational"))
    return canvas.reduce(4), questions
