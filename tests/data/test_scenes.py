"""The world: determinism, disjoint splits, true answers, true captions, false negatives, quick rendering."""

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from mmrecipes.data import families, scenes
from mmrecipes.data.families import FAMILIES
from mmrecipes.data.scenes import ALPHABET, COLOURS, SHAPES, SIZES
from mmrecipes.data.splits import SPLITS
from mmrecipes.mini.clevr import CLEVR_COLOURS, sort_of_clevr

SEEDS = range(400)


def digest(seeds) -> str:
    """A fingerprint of scenes, pictures, questions and captions."""
    h = hashlib.sha256()
    for seed in seeds:
        scene = scenes.make_scene(seed)
        h.update(scenes.render(scene, 96).tobytes())
        h.update(json.dumps([families.caption(scene, True), families.hard_negative(scene, full=True)]).encode())
        h.update(repr([families.ask(scene, f) for f in FAMILIES]).encode())
        h.update(repr(sort_of_clevr(seed)[1]).encode())
    return h.hexdigest()


def test_the_same_seed_gives_the_same_world_in_another_process():
    code = f"import sys; sys.path[:0] = ['tests', 'tests/data']; import test_scenes as t; print(t.digest({list(range(20))}))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s})
        for s in "12"
    ]
    assert {r.stdout.strip() for r in runs} == {digest(range(20))}


def test_splits_are_disjoint_in_seeds_and_in_scenes():
    for (a, one), (b, two) in itertools.combinations(SPLITS.items(), 2):
        assert one[-1] < two[0] or two[-1] < one[0], f"{a} and {b} overlap"
    seen = {}
    for split, seeds in SPLITS.items():
        for seed in seeds[:300]:
            scene = scenes.make_scene(seed)
            key = tuple((t.name, round(t.x, 4), round(t.y, 4)) for t in scene.things)
            assert seen.setdefault(key, split) == split


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_scenes_keep_their_promises(seed):
    things = scenes.make_scene(seed).things
    assert 2 <= len(things) <= 6
    assert len({t.name for t in things}) == len(things)
    for t in things:
        assert t.colour in COLOURS and t.shape in SHAPES and t.size in SIZES
        assert t.radius <= t.x <= 1 - t.radius and t.radius <= t.y <= 1 - t.radius
        assert len(t.code) <= 3 and set(t.code) <= set(ALPHABET) and (t.size == "large" or not t.code)
    for a, b in itertools.combinations(things, 2):
        assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("size", [64, 96, 128, 333, 1024])
def test_rendering_shows_each_object_where_the_scene_says(size):
    scene = next(s for s in map(scenes.make_scene, SEEDS) if any(not t.code for t in s.things))
    pixels = np.asarray(scenes.render(scene, size))
    assert pixels.shape == (size, size, 3)
    for t in scene.things:
        if not t.code:  # a sticker covers the centre
            assert np.abs(pixels[int(t.y * size), int(t.x * size)].astype(int) - t.rgb).max() <= 2
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # edges are blended: anti-aliased


@pytest.mark.parametrize("size", [0, 63, 1025])
def test_rendering_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"size is {size} px.*between 64 and 1024"):
        scenes.render(scenes.make_scene(0), size)


# ---- an independent check of every answer: questions are read back from their English, and worked out another way


def words_match(t, text: str) -> bool:
    """Does object `t` fit a noun phrase such as `large red circle`, `small objects`, `stars`?"""
    for word in text.split():
        word = {"crosses": "cross"}.get(word, word)
        if word not in (t.colour, t.shape, t.size) and word.rstrip("s") not in (t.shape, "object"):
            return False
    return True


def one(scene, phrase: str):
    found = [t for t in scene.things if words_match(t, phrase)]
    assert len(found) == 1, f"{phrase!r} is not one object of {families.caption(scene, True)}"
    return found[0]


def oracle(scene, question: str) -> str:
    """The answer to a question, from its words alone."""
    if m := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question):
        a, b = one(scene, m[1]), one(scene, m[3])
        return "yes" if {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[m[2]] else "no"
    if m := re.fullmatch(r"What (colour|shape) is the object closest to the (.+)\?", question):
        me = one(scene, m[2])
        rest = [t for t in scene.things if t is not me]
        return getattr(min(rest, key=lambda t: (t.x - me.x) ** 2 + (t.y - me.y) ** 2), m[1])
    if m := re.fullmatch(r"How many (.+) (?:are there|do you see)\?", question):
        return str(sum(words_match(t, m[1]) for t in scene.things))
    if m := re.fullmatch(r"(?:Is there|Do you see) a (.+)\?", question):
        return "yes" if any(words_match(t, m[1]) for t in scene.things) else "no"
    if m := re.fullmatch(r"Is the (.+) small or large\?|What size is the (.+)\?", question):
        return one(scene, m[1] or m[2]).size
    if m := re.fullmatch(r"(?:What|Which) (colour|shape) (?:is|does) the (.+?)(?: have)?\?", question):
        return getattr(one(scene, m[2]), m[1])
    if m := re.fullmatch(r"What is printed on the (.+)\?|What does the (.+) say\?", question):
        return one(scene, m[1] or m[2]).code
    raise AssertionError(f"the oracle cannot read {question!r}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_agrees_with_an_independent_check(family):
    asked = 0
    for seed in SEEDS:
        scene = scenes.make_scene(seed)
        for k in range(3):
            if question := families.ask(scene, family, k):
                assert oracle(scene, question.text) == question.answer, (question, families.caption(scene, True))
                assert " " not in question.answer and question.family == family
                asked += 1
    assert asked > 500


def test_the_oracle_tells_right_from_wrong():
    scene = scenes.make_scene(3)
    t = scene.things[0]
    other = next(c for c in COLOURS if c != t.colour)
    assert oracle(scene, f"Is there a {t.name}?") == "yes"
    assert oracle(scene, f"How many {other} {t.shape}s are there?") != oracle(scene, "How many objects are there?")


def test_unknown_family_is_an_error_that_lists_the_families():
    with pytest.raises(ValueError, match=r"'color'.*colour, shape"):
        families.ask(scenes.make_scene(0), "color")


# ---- captions


def parse(caption: str) -> list[dict[str, str]]:
    things = []
    for part in caption.split(", "):
        words = part.removeprefix("a ").split(" labelled ")
        *size, colour, shape = words[0].split()
        things.append({"colour": colour, "shape": shape, "size": "".join(size), "code": "".join(words[1:])})
    return things


@pytest.mark.parametrize("full", [False, True])
def test_a_hard_negative_differs_in_exactly_one_attribute_and_is_false(full):
    kinds = set()
    for seed in SEEDS:
        scene = scenes.make_scene(seed)
        true, (false, attribute) = parse(families.caption(scene, full)), families.hard_negative(scene, full=full)
        changed = [(a, b) for a, b in zip(true, parse(false), strict=True) if a != b]
        assert len(changed) == 1
        keys = [k for k in changed[0][0] if changed[0][0][k] != changed[0][1][k]]
        assert keys == [attribute]
        here = [{k: getattr(t, k) for k in (("colour", "shape", "size") if full else ("colour", "shape"))} for t in scene.things]
        claim = {k: v for k, v in changed[0][1].items() if k in here[0]}
        assert claim not in here, "the negative is true"
        kinds.add(attribute)
    assert kinds == ({"colour", "shape", "size"} if full else {"colour", "shape"})


def test_captions_name_every_object_once():
    for seed in SEEDS[:50]:
        scene = scenes.make_scene(seed)
        assert sorted((p["colour"], p["shape"]) for p in parse(families.caption(scene))) == sorted(
            (t.colour, t.shape) for t in scene.things
        )
        assert [p["code"] for p in parse(families.caption(scene, True))] == [
            t.code for t in sorted(scene.things, key=lambda t: t.x)
        ]


# ---- Sort-of-CLEVR


def test_sort_of_clevr_is_the_published_shape_and_true():
    image, questions = sort_of_clevr(7)
    assert image.size == (75, 75)
    pixels = np.asarray(image).astype(int)
    spots = {}
    for colour, rgb in CLEVR_COLOURS.items():  # find each object in the picture itself
        ys, xs = np.nonzero(np.abs(pixels - rgb).max(-1) < 12)
        assert len(xs) > 50
        shape = "square" if len(xs) > 0.9 * (np.ptp(xs) + 1) * (np.ptp(ys) + 1) else "circle"
        spots[colour] = (xs.mean(), ys.mean(), shape)
    assert [q.family for q in questions].count("relational") == 10 and len(questions) == 20
    for q in questions:
        colour = next(c for c in spots if f"the {c} object" in q.text)
        x, y, shape = spots[colour]
        rest = sorted((math.hypot(a - x, b - y), s) for c, (a, b, s) in spots.items() if c != colour)
        truth = {
            "What shape is the o": rest[0][1] if "closest" in q.text else rest[-1][1],
            "How many objects ha": str(sum(s == shape for _, _, s in spots.values())),
        }.get(q.text[:19], shape)
        if "on the left" in q.text:
            truth = "yes" if x < 37.5 else "no"
        if "at the top" in q.text:
            truth = "yes" if y < 37.5 else "no"
        assert q.answer == truth, q
