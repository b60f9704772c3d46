"""What a drawn image teaches: its pixels, what each patch shows, and the form of a batch of questions."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmrecipes.data import scenes
from mmrecipes.data.scenes import ALPHABET, COLOURS, SHAPES, SIZES, Scene
from mmrecipes.mini.model import GRID, IMAGE_SIZE

CLASS_NAMES = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}
PATCH_TARGETS = {"there": 2} | {kind: len(names) for kind, names in CLASS_NAMES.items()}  # name: classes of each patch's labels
PATCH_TARGETS |= {f"char{i}": len(ALPHABET) + 1 for i in range(3)}  # one of them says: no character
PATCH_TARGETS |= {"near_colour": len(COLOURS), "near_shape": len(SHAPES)}


class ChatBatch(NamedTuple):
    """A batch of images with questions: B images, T tokens a sequence, Q questions an image."""

    images: Tensor  # (B, 3, 128, 128)
    ids: Tensor  # (B, T)
    answers: Tensor  # (B, T): the answers' tokens, -100 elsewhere
    segments: Tensor  # (B, T): 0 for the image, 1 to Q for the questions, -1 for padding
    positions: Tensor  # (B, T): of each token when its question is asked alone
    kinds: Tensor  # (B, Q): the questions' families
    words: Tensor  # (B, 64, 28): the words for what each patch shows
    points: Tensor  # (B, T, 4) and
    marks: Tensor  # (B, T, 64): what the names in the questions refer to
    labels: Tensor  # (B, 64, 9) and
    centres: Tensor  # (B, 64, 2): of `patch_labels`


class CaptionBatch(NamedTuple):
    """A batch of B images with captions."""

    images: Tensor  # (B, 3, 128, 128)
    captions: Tensor  # (B, 56): the true captions' tokens
    negatives: Tensor  # (B, 56): captions with one attribute of one object changed
    there: Tensor  # (B, 2, 48): 1 for each (colour, shape) in the image; 1 for each that is large
    sizes: Tensor  # (B,): does the caption tell sizes?


def pixels(scene: Scene) -> np.ndarray:
    """The image as the processor would hand it over: float32 (3, 128, 128) in [-1, 1]."""
    return np.asarray(scenes.render(scene, IMAGE_SIZE), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per patch, of the object that covers it most: class labels (64, 9), -100 where none, and its centre (64, 2)."""
    labels = np.full((GRID * GRID, len(PATCH_TARGETS)), -100)
    labels[:, 0] = 0
    centres = np.zeros((GRID * GRID, 2), dtype=np.float32)
    side = (np.arange(GRID) + 0.5) / GRID
    px, py = np.tile(side, GRID), np.repeat(side, GRID)
    deepest = np.zeros(GRID * GRID)  # how deep the patch reaches into the object, in fractions of the image
    for t in scene.things:
        dx, dy = (np.maximum(np.abs(at - middle) - 0.5 / GRID, 0) for at, middle in ((px, t.x), (py, t.y)))
        depth = 0.8 * t.radius - np.hypot(dx, dy)
        covered = depth > deepest
        deepest[covered] = depth[covered]
        own = [_class_of(kind, getattr(t, kind)) for kind in CLASS_NAMES]
        chars = [ALPHABET.index(c) + 1 for c in t.code] + [0] * (3 - len(t.code))
        near = scenes.closest(scene, t)
        neighbour = [_class_of(kind, getattr(near, kind)) if near else -100 for kind in ("colour", "shape")]
        labels[covered] = [1, *own, *chars, *neighbour]
        centres[covered] = (t.x, t.y)
    return labels, centres


def _class_of(kind: str, word: str) -> int:
    return CLASS_NAMES[kind].index(word) if word in CLASS_NAMES[kind] else -100  # a new colour or shape has no class
