"""Questions and captions about a scene: each family lists what can be asked, and one is drawn so that answers balance."""

import itertools
import random
from collections import Counter
from dataclasses import dataclass

from mmrecipes.data.scenes import COLOURS, SHAPES, SIZES, Scene, changed, closest

FAMILIES = ("colour", "shape", "size", "count", "exists", "relation", "reading")


@dataclass(frozen=True)
class Question:
    """A question in plain English with a one-word answer, and the family it belongs to."""

    text: str
    answer: str
    family: str


PHRASES = {  # one is drawn for each question
    "colour": ("What colour is the {}?", "Which colour does the {} have?"),
    "shape": ("What shape is the {}?", "Which shape does the {} have?"),
    "size": ("What size is the {}?", "Is the {} small or large?"),
    "count": ("How many {} are there?", "How many {} do you see?"),
    "exists": ("Is there a {}?", "Do you see a {}?"),
    "reading": ("What is printed on the {}?", "What does the {} say?"),
}


def _colour_or_shape(scene: Scene, family: str) -> list[tuple[str, str]]:
    """(answer, name) of each object that its other attribute, or that and its size, tell apart."""
    names = [t.shape if family == "colour" else f"{t.colour} object" for t in scene.things]
    sized = [f"{t.size} {name}" for t, name in zip(scene.things, names, strict=True)]
    kinds = ((t, name, kind) for kind in (names, sized) for t, name in zip(scene.things, kind, strict=True))
    return [(getattr(t, family), name) for t, name, kind in kinds if kind.count(name) == 1]


def _count(scene: Scene) -> list[tuple[str, str]]:
    found = [(str(len(scene.things)), "objects")]
    for key, names in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
        counts = Counter(getattr(t, key) for t in scene.things)
        for name in dict.fromkeys((*names, *counts)):
            plural = {"shape": f"{name}es" if name == "cross" else f"{name}s"}.get(key, f"{name} objects")
            found.append((str(counts[name]), plural))
    return found


def _exists(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    here = {t.name for t in scene.things}
    # an absent pair is made of a colour and a shape that are both in the picture where one can be
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    near = sorted({f"{c} {s}" for c in colours for s in shapes} - here)
    far = sorted({f"{c} {s}" for c in colours.union(COLOURS) for s in shapes.union(SHAPES)} - here)
    absent = near if near and rng.random() < 0.7 else far
    return [("yes", name) for name in sorted(here)] + [("no", name) for name in absent]


def _relation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    if rng.random() < 0.4:
        attribute = rng.choice(("colour", "shape"))
        pairs, ask = [(t, closest(scene, t)) for t in scene.things], f"What {attribute} is the object closest to the {{}}?"
        found = [(getattr(near, attribute), ask.format(t.name)) for t, near in pairs if near]
        if found:
            return found
    found = []
    for a, b in itertools.permutations(scene.things, 2):
        for axis, *names in (("x", "left of", "right of"), ("y", "above", "below")):
            gap = getattr(b, axis) - getattr(a, axis)
            if abs(gap) >= 0.1:  # never ask about a hair's breadth
                for name, true in zip(names, (gap > 0, gap < 0), strict=True):
                    found.append(("yes" if true else "no", f"Is the {a.name} {name} the {b.name}?"))
    return found


def _candidates(scene: Scene, family: str, rng: random.Random) -> list[tuple[str, str]]:
    """(answer, question) of all that can be asked about `scene`."""
    if family == "relation":
        return _relation(scene, rng)
    phrase = rng.choice(PHRASES[family])
    if family in ("colour", "shape"):
        found = _colour_or_shape(scene, family)
    elif family in ("size", "reading"):
        found = [(t.size if family == "size" else t.code, t.name) for t in scene.things if family == "size" or t.code]
    else:
        found = _count(scene) if family == "count" else _exists(scene, rng)
    return [(answer, phrase.format(name)) for answer, name in found]


def ask(scene: Scene, family: str, seed: int = 0, about: str = "") -> Question | None:
    """One question of `family` about `scene`, or None when the scene supports none (no printed code, say).
    An answer is drawn first, evenly among those possible, then a question that has it: this is the balancing. Only questions
    with the word `about` in them or in their answers, if it is given.
    >>> ask(scenes.make_scene(1), "size").text
    'Is the red cross small or large?'
    """
    if family not in FAMILIES:
        raise ValueError(f"ask: no question family {family!r}; the families are {', '.join(FAMILIES)}")
    rng = random.Random(scene.seed * 1_000_003 + seed * 7 + FAMILIES.index(family))
    by_answer: dict[str, list[str]] = {}
    for answer, text in _candidates(scene, family, rng):
        if about in f"{text} {answer}":
            by_answer.setdefault(answer, []).append(text)
    if not by_answer:
        return None
    answer = rng.choice(sorted(by_answer))
    return Question(rng.choice(by_answer[answer]), answer, family)


def caption(scene: Scene, full: bool = False) -> str:
    """The objects from left to right; with `full`, sizes and printed codes too.
    >>> caption(scenes.make_scene(1))
    'a yellow cross, a purple circle, a red cross'
    """
    things = sorted(scene.things, key=lambda t: t.x)
    if not full:
        return ", ".join(f"a {t.name}" for t in things)
    return ", ".join(f"a {t.size} {t.name}" + (f" labelled {t.code}" if t.code else "") for t in things)


def hard_negative(scene: Scene, seed: int = 0, full: bool = False) -> tuple[str, str]:
    """A caption that is false in exactly one attribute of one object, and that attribute's name.
    Attributes: `colour`, `shape`, and with `full` also `size`. The changed object is in the scene under no name.
    >>> hard_negative(scenes.make_scene(1))
    ('a yellow diamond, a purple circle, a red cross', 'shape')
    """
    near, key = changed(scene, seed, full)
    return caption(near, full), key
