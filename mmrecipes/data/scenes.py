"""Procedural scenes with exact ground truth, and their images: pure functions of an integer seed."""

import functools
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

COLOURS = {"red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (240, 215, 30), "green": (40, 150, 50)}
COLOURS |= {"cyan": (60, 200, 215), "blue": (35, 80, 200), "purple": (140, 60, 170), "black": (35, 35, 40)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
NEW_COLOURS = {"pink": (245, 130, 190), "brown": (120, 75, 35)}  # never in a scene of any split: a domain to adapt to
NEW_SHAPES = ("heart", "arrow")
NEW_WORDS = (*NEW_COLOURS, *NEW_SHAPES)
SIZES = {"small": 0.075, "large": 0.13}  # mean radius, as a fraction of the image side
ALPHABET = "ACEHKLPTX247"  # characters of printed codes, chosen to stay distinct at 8 pixels
SMALLEST, LARGEST = 64, 1024  # px: the sides of a drawn image
_font = functools.lru_cache(maxsize=64)(ImageFont.load_default)


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


def make_scene(seed: int) -> Scene:
    """The scene of `seed` (an integer >= 0). The same seed gives the same scene on every machine.
    >>> [thing.name for thing in make_scene(1).things]
    ['purple circle', 'red cross', 'yellow cross']
    """
    rng = random.Random(seed)
    while not (things := _place(rng, rng.randint(2, 6))):  # a crowded draw that does not fit is thrown away whole
        pass
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
        printed = size == "large" and rng.random() < 0.6
        code = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 3))) if printed else ""
        rgb = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour])
        things.append(Thing(colour, shape, size, x, y, radius, code, rgb))
    return tuple(things)


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    a = 0.36  # half the width of a cross's arms
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    arrow = [(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)]
    if shape in ("cross", "arrow"):
        return [(x + r * dx, y + r * dy) for dx, dy in (cross if shape == "cross" else arrow)]
    if shape == "heart":  # x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, over 16
        turns = [2 * math.pi * i / 60 for i in range(60)]
        highs = [sum(f * math.cos(k * t) for k, f in ((1, 13), (2, -5), (3, -2), (4, -1))) for t in turns]
        return [(x + r * math.sin(t) ** 3, y - r * high / 16) for t, high in zip(turns, highs, strict=True)]
    corners, inner = {"square": (4, 1), "diamond": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}[shape]
    turn = math.pi / 4 if shape == "square" else 0
    radii = [r if i % 2 == 0 else r * inner for i in range(corners)]
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + q * math.sin(a), y - q * math.cos(a)) for q, a in zip(radii, angles, strict=True)]


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Draw `scene` as a square RGB image of `size` x `size` pixels, 64 <= size <= 1024, anti-aliased.
    >>> render(make_scene(1), 96).size
    (96, 96)
    """
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"render: size is {size} px; it must be between {SMALLEST} and {LARGEST}")
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


def closest(scene: Scene, thing: Thing) -> Thing | None:
    """The object whose centre is nearest to `thing`'s, or None when the second nearest is within 15% of it.
    >>> closest(make_scene(1), make_scene(1).things[0]).name
    'yellow cross'
    """
    others = sorted((math.dist((t.x, t.y), (thing.x, thing.y)), i) for i, t in enumerate(scene.things) if t != thing)
    tie = len(others) > 1 and others[1][0] < 1.15 * others[0][0]
    return None if tie else scene.things[others[0][1]]


def changed(scene: Scene, seed: int = 0, full: bool = False) -> tuple[Scene, str]:
    """The scene with one attribute of one object changed, and that attribute's name: what `hard_negative` describes.
    It can be drawn, but for a changed size, which would need a place of its own.
    >>> changed(make_scene(1))[1]
    'shape'
    """
    rng = random.Random(scene.seed * 1_000_003 + seed)
    options = {"colour": tuple(COLOURS), "shape": SHAPES} | ({"size": tuple(SIZES)} if full else {})
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
    """The scene with one object in a colour or shape that no other scene has (`NEW_COLOURS`, `NEW_SHAPES`), and its name.
    >>> novel(make_scene(1))[1] in NEW_WORDS
    True
    """
    rng = random.Random(scene.seed * 1_000_003 + 1)
    i, word = rng.randrange(len(scene.things)), rng.choice(NEW_WORDS)
    new = replace(scene.things[i], **{"colour" if word in NEW_COLOURS else "shape": word})
    if word in NEW_COLOURS:
        new = replace(new, rgb=tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in NEW_COLOURS[word]))
    return replace(scene, things=(*scene.things[:i], new, *scene.things[i + 1 :])), word
