"""The world: procedural scenes with exact ground truth, their pictures, questions, captions and hard negatives.

Everything is a pure function of an integer seed. Seeds of different splits never overlap (`SPLITS`).
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (240, 215, 30),
    "green": (40, 150, 50),
    "cyan": (60, 200, 215),
    "blue": (35, 80, 200),
    "purple": (140, 60, 170),
    "black": (35, 35, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
NEW_COLOURS = {"pink": (245, 130, 190), "brown": (120, 75, 35)}  # never in a scene of any split: a domain to adapt to
NEW_SHAPES = ("heart", "arrow")
NEW_WORDS = (*NEW_COLOURS, *NEW_SHAPES)
SIZES = {"small": 0.075, "large": 0.13}  # mean radius, as a fraction of the image side
ALPHABET = "ACEHKLPTX247"  # characters of printed codes, chosen to stay distinct at 8 pixels
FAMILIES = ("colour", "shape", "size", "count", "exists", "relation", "reading")
DIRECTIONS = ("left of", "right of", "above", "below")
SPLITS = {  # the seeds of each split; the test suite proves that they do not overlap
    "train": range(0, 10**9),
    "calibration": range(10**9, 10**9 + 10**6),
    "validation": range(2 * 10**9, 2 * 10**9 + 10**6),
    "test": range(3 * 10**9, 3 * 10**9 + 10**6),
}


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` (centre, y down) and `radius` are fractions of the image side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    code: str = ""
    rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        """Colour and shape, unique within a scene: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two to six objects on a plain background; no two share both colour and shape, none overlap."""

    seed: int
    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """A question in plain English with a one-word answer, and the family it belongs to."""

    text: str
    answer: str
    family: str


def make_scene(seed: int) -> Scene:
    """The scene of `seed` (an integer >= 0). The same seed gives the same scene on every machine."""
    rng = random.Random(seed)
    while True:  # a crowded draw that does not fit is thrown away whole
        things = _place(rng, rng.randint(2, 6))
        if things:
            break
    shade = rng.randint(200, 245)
    return Scene(seed, things, tuple(shade + rng.randint(-8, 8) for _ in range(3)))


def _place(rng: random.Random, n: int) -> tuple[Thing, ...]:
    things: list[Thing] = []
    for colour, shape in rng.sample([(c, s) for c in COLOURS for s in SHAPES], n):
        size = rng.choice(tuple(SIZES))
        radius = SIZES[size] * rng.uniform(0.94, 1.08)
        for _ in range(40):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            if all(math.dist((x, y), (t.x, t.y)) > radius + t.radius + 0.01 for t in things):
                break
        else:
            return ()
        code = ""
        if size == "large" and rng.random() < 0.6:
            code = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 3)))
        rgb = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour])
        things.append(Thing(colour, shape, size, x, y, radius, code, rgb))
    return tuple(things)


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "cross":
        a = 0.36 * r
        points = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]
        return [(x + dx, y + dy) for dx, dy in points]
    if shape == "arrow":
        points = [(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)]
        return [(x + r * dx, y + r * dy) for dx, dy in points]
    if shape == "heart":  # x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, over 16
        turns = [2 * math.pi * i / 60 for i in range(60)]
        highs = [sum(f * math.cos(k * t) for k, f in ((1, 13), (2, -5), (3, -2), (4, -1))) for t in turns]
        return [(x + r * math.sin(t) ** 3, y - r * high / 16) for t, high in zip(turns, highs, strict=True)]
    corners, inner = {"square": (4, 1), "diamond": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}[shape]
    turn = math.pi / 4 if shape == "square" else 0
    radii = [r if i % 2 == 0 else r * inner for i in range(corners)]
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + q * math.sin(a), y - q * math.cos(a)) for q, a in zip(radii, angles, strict=True)]


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Draw `scene` as a square RGB image of `size` x `size` pixels, 64 <= size <= 1024, anti-aliased."""
    if not 64 <= size <= 1024:
        raise ValueError(f"render: size is {size} px; it must be between 64 and 1024")
    over = 3 if size <= 256 else 2  # draw larger, then average: the anti-aliasing
    side = size * over
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for t in scene.things:
        x, y, r = t.x * side, t.y * side, t.radius * side
        if t.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=t.rgb)
        else:
            draw.polygon(_polygon(t.shape, x, y, r), fill=t.rgb)
        if t.code:  # a white sticker with one fixed cell a character
            cell, high = 0.5 * r, 0.39 * r
            wide = cell * len(t.code) / 2 + 0.08 * r
            draw.rectangle((x - wide, y - high, x + wide, y + high), fill=(255, 255, 255))
            for i, char in enumerate(t.code):
                cx = x + (i - (len(t.code) - 1) / 2) * cell
                draw.text((cx, y), char, font=_font(round(0.82 * r)), fill=(0, 0, 0), anchor="mm")
    return canvas.reduce(over)


# ---- questions: each family lists every (answer, text) that the scene supports; one is drawn so that answers balance


def _unique(scene: Scene, key: Callable[[Thing], object]) -> list[Thing]:
    counts = Counter(key(t) for t in scene.things)
    return [t for t in scene.things if counts[key(t)] == 1]


def _colour(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("What colour is the {}?", "Which colour does the {} have?"))
    found = [(t.colour, ask.format(t.shape)) for t in _unique(scene, lambda t: t.shape)]
    return found + [(t.colour, ask.format(f"{t.size} {t.shape}")) for t in _unique(scene, lambda t: (t.size, t.shape))]


def _shape(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("What shape is the {}?", "Which shape does the {} have?"))
    found = [(t.shape, ask.format(f"{t.colour} object")) for t in _unique(scene, lambda t: t.colour)]
    pairs = _unique(scene, lambda t: (t.size, t.colour))
    return found + [(t.shape, ask.format(f"{t.size} {t.colour} object")) for t in pairs]


def _size(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("What size is the {}?", "Is the {} small or large?"))
    return [(t.size, ask.format(t.name)) for t in scene.things]


def _count(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("How many {} are there?", "How many {} do you see?"))
    found = [(len(scene.things), "objects")]
    for key, names in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
        counts = Counter(getattr(t, key) for t in scene.things)
        for name in dict.fromkeys((*names, *counts)):
            plural = {"shape": f"{name}es" if name == "cross" else f"{name}s"}.get(key, f"{name} objects")
            found.append((counts[name], plural))
    return [(str(n), ask.format(what)) for n, what in found]


def _exists(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("Is there a {}?", "Do you see a {}?"))
    here = {t.name for t in scene.things}
    # an absent pair is made of a colour and a shape that are both in the picture where one can be
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    near = sorted({f"{c} {s}" for c in colours for s in shapes} - here)
    far = sorted({f"{c} {s}" for c in colours.union(COLOURS) for s in shapes.union(SHAPES)} - here)
    absent = near if near and rng.random() < 0.7 else far
    return [("yes", ask.format(n)) for n in sorted(here)] + [("no", ask.format(n)) for n in absent]


def closest(scene: Scene, thing: Thing) -> Thing | None:
    """The object whose centre is nearest to `thing`'s, or None when the second nearest is within 15% of it."""
    others = sorted((math.dist((t.x, t.y), (thing.x, thing.y)), i) for i, t in enumerate(scene.things) if t != thing)
    if len(others) > 1 and others[1][0] < 1.15 * others[0][0]:
        return None
    return scene.things[others[0][1]]


def _relation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    if rng.random() < 0.4:
        attribute = rng.choice(("colour", "shape"))
        pairs = [(t, closest(scene, t)) for t in scene.things]
        found = [
            (getattr(near, attribute), f"What {attribute} is the object closest to the {t.name}?") for t, near in pairs if near
        ]
        if found:
            return found
    found = []
    for a in scene.things:
        for b in scene.things:
            for axis, names in (("x", ("left of", "right of")), ("y", ("above", "below"))):
                gap = getattr(b, axis) - getattr(a, axis)
                if a != b and abs(gap) >= 0.1:  # never ask about a hair's breadth
                    for name, true in zip(names, (gap > 0, gap < 0), strict=True):
                        found.append(("yes" if true else "no", f"Is the {a.name} {name} the {b.name}?"))
    return found


def _reading(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    ask = rng.choice(("What is printed on the {}?", "What does the {} say?"))
    return [(t.code, ask.format(t.name)) for t in scene.things if t.code]


_ASK = dict(zip(FAMILIES, (_colour, _shape, _size, _count, _exists, _relation, _reading), strict=True))


def ask(scene: Scene, family: str, seed: int = 0, about: str = "") -> Question | None:
    """One question of `family` about `scene`, or None when the scene supports none (no printed code, say).

    An answer is drawn first, evenly among those possible, then a question that has it: this is the balancing. Only questions
    with the word `about` in them or in their answers, if it is given.
    """
    if family not in _ASK:
        raise ValueError(f"ask: no question family {family!r}; the families are {', '.join(FAMILIES)}")
    rng = random.Random(scene.seed * 1_000_003 + seed * 7 + FAMILIES.index(family))
    by_answer: dict[str, list[str]] = {}
    for answer, text in _ASK[family](scene, rng):
        if about in f"{text} {answer}":
            by_answer.setdefault(answer, []).append(text)
    if not by_answer:
        return None
    answer = rng.choice(sorted(by_answer))
    return Question(rng.choice(by_answer[answer]), answer, family)


# ---- captions, for retrieval and image-text matching


def _describe(t: Thing, full: bool) -> str:
    words = f"a {t.size} {t.name}" if full else f"a {t.name}"
    return f"{words} labelled {t.code}" if full and t.code else words


def caption(scene: Scene, full: bool = False) -> str:
    """`a red circle, a blue star` from left to right; with `full`, sizes and printed codes too."""
    return ", ".join(_describe(t, full) for t in sorted(scene.things, key=lambda t: t.x))


def hard_negative(scene: Scene, seed: int = 0, full: bool = False) -> tuple[str, str]:
    """A caption that is false in exactly one attribute of one object, and that attribute's name.

    Attributes: `colour`, `shape`, and with `full` also `size`. The changed object is in the scene under no name.
    """
    near, key = changed(scene, seed, full)
    return caption(near, full), key


def changed(scene: Scene, seed: int = 0, full: bool = False) -> tuple[Scene, str]:
    """The scene with one attribute of one object changed, and that attribute's name: what `hard_negative` describes.

    It can be drawn, but for a changed size, which would need a place of its own.
    """
    rng = random.Random(scene.seed * 1_000_003 + seed)
    options: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES}
    if full:
        options["size"] = tuple(SIZES)
    here = {t.name for t in scene.things}
    while True:
        i, key = rng.randrange(len(scene.things)), rng.choice(tuple(options))
        old = scene.things[i]
        new = replace(old, **{key: rng.choice([v for v in options[key] if v != getattr(old, key)])})
        if key == "size" or new.name not in here:
            break
    if key == "colour":  # as far from the colour's middle as the old one was
        shifts = zip(COLOURS[new.colour], old.rgb, COLOURS[old.colour], strict=True)
        new = replace(new, rgb=tuple(min(255, max(0, c + was - middle)) for c, was, middle in shifts))
    return replace(scene, things=(*scene.things[:i], new, *scene.things[i + 1 :])), key


def novel(scene: Scene) -> tuple[Scene, str]:
    """The scene with one object in a colour or shape that no other scene has (`NEW_COLOURS`, `NEW_SHAPES`), and its name."""
    rng = random.Random(scene.seed * 1_000_003 + 1)
    i, word = rng.randrange(len(scene.things)), rng.choice(NEW_WORDS)
    old = scene.things[i]
    if word in NEW_COLOURS:
        rgb = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in NEW_COLOURS[word])
        new = replace(old, colour=word, rgb=rgb)
    else:
        new = replace(old, shape=word)
    return replace(scene, things=(*scene.things[:i], new, *scene.things[i + 1 :])), word


# ---- Sort-of-CLEVR (Santoro et al. 2017, arXiv:1706.01427), questions in words

CLEVR_COLOURS = {k: COLOURS[k] for k in ("red", "green", "blue", "orange", "cyan", "yellow")}


def sort_of_clevr(seed: int) -> tuple[Image.Image, list[Question]]:
    """One 75 x 75 picture with six objects, one of each colour, and its 10 non-relational and 10 relational questions."""
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
