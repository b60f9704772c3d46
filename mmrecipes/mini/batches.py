"""What the house model trains on, made while it trains: batch `i` is a pure function of `i`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrecipes.data import families as data_families
from mmrecipes.data import scenes
from mmrecipes.data.families import FAMILIES, Question
from mmrecipes.data.scenes import ALPHABET, COLOURS, SHAPES, SIZES, Scene
from mmrecipes.distill.losses import CaptionBatch
from mmrecipes.mini.model import GRID, IMAGE_SIZE, VISUAL_TOKENS

# How many of an image's training questions come from each family: more for those that take several looks
MIX = {"colour": 1, "shape": 1, "size": 1, "count": 2, "exists": 2, "relation": 3, "reading": 3}


MANY = 5  # printed characters in a picture chosen for reading: one scene of six has so many


NEW = ("colour", "shape", "exists")  # families that can ask about one thing of a new colour or shape


RELATIONS = ("left", "right", "above", "below", "closest")


PATCH_TARGETS = {  # name -> number of classes of each patch's labels; codes have a "none" class
    "there": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    **{f"char{i}": len(ALPHABET) + 1 for i in range(3)},
    "near_colour": len(COLOURS),
    "near_shape": len(SHAPES),
}


_INDEX = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}


def pixels(scene: Scene) -> np.ndarray:
    """The picture as the processor would hand it over: float32 (3, 128, 128) in [-1, 1]."""
    image = np.asarray(scenes.render(scene, IMAGE_SIZE), dtype=np.float32)
    return image.transpose(2, 0, 1) / 127.5 - 1


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per patch, of the object that covers it most: class labels (64, 9), -100 where none, and its centre (64, 2)."""
    labels = np.full((GRID * GRID, len(PATCH_TARGETS)), -100)
    labels[:, 0] = 0
    centres = np.zeros((GRID * GRID, 2), dtype=np.float32)
    side = (np.arange(GRID) + 0.5) / GRID
    px, py = np.tile(side, GRID), np.repeat(side, GRID)
    best = np.zeros(GRID * GRID)  # how deep the patch reaches into the object, in fractions of the image
    for t in scene.things:
        dx = np.maximum(np.abs(px - t.x) - 0.5 / GRID, 0)
        dy = np.maximum(np.abs(py - t.y) - 0.5 / GRID, 0)
        depth = 0.8 * t.radius - np.hypot(dx, dy)
        here = depth > best
        best[here] = depth[here]
        near = scenes.closest(scene, t)
        chars = [ALPHABET.index(c) + 1 for c in t.code] + [0] * (3 - len(t.code))
        labels[here] = [
            1,
            *(_label(k, getattr(t, k)) for k in _INDEX),
            *chars,
            _label("colour", near.colour) if near else -100,
            _label("shape", near.shape) if near else -100,
        ]
        centres[here] = (t.x, t.y)
    return labels, centres


def _label(kind: str, word: str) -> int:
    return _INDEX[kind].index(word) if word in _INDEX[kind] else -100  # a new colour or shape has no class


class VisionBatches(torch.utils.data.Dataset):
    """Batch `i` of stage 1: pixels (B, 3, 128, 128), labels (B, 64, 9), centres (B, 64, 2).

    With `printed`, only pictures with at least so many printed characters; with `alternate`, in every other batch only.
    """

    def __init__(self, start: int, stop: int, batch: int, printed: int = 0, alternate: bool = False):
        self.steps, self.batch, self.printed, self.alternate = range(start, stop), batch, printed, alternate

    def __len__(self) -> int:
        return len(self.steps)

    def _draw(self, step: int) -> list[Scene]:
        printed = 0 if self.alternate and step % 2 == 0 else self.printed
        first = step * self.batch * (8 if printed else 1)  # room for the scenes that are passed over
        found = map(scenes.make_scene, itertools.count(first))
        return list(itertools.islice((s for s in found if sum(len(t.code) for t in s.things) >= printed), self.batch))

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if i >= len(self):
            raise IndexError(i)
        return self._pictures(self._draw(self.steps[i]))

    def _pictures(self, drawn: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
        labels, centres = zip(*(patch_labels(s) for s in drawn), strict=True)
        pictures = [pixels(s) for s in drawn]
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in (pictures, labels, centres))


class ChatBatch(NamedTuple):
    """A batch of pictures with questions: B pictures, T tokens a sequence, Q questions a picture."""

    images: Tensor  # (B, 3, 128, 128)
    ids: Tensor  # (B, T)
    answers: Tensor  # (B, T): the answers' tokens, -100 elsewhere
    segments: Tensor  # (B, T): 0 for the picture, 1 to Q for the questions, -1 for padding
    positions: Tensor  # (B, T): of each token when its question is asked alone
    kinds: Tensor  # (B, Q): the questions' families
    words: Tensor  # (B, 64, 28): the words for what each patch shows
    points: Tensor  # (B, T, 4) and
    marks: Tensor  # (B, T, 64): what the names in the questions refer to
    labels: Tensor  # (B, 64, 9) and
    centres: Tensor  # (B, 64, 2): as in stage 1


class ChatBatches(VisionBatches):
    """Batch `i` of stages 2 and 3: one sequence an image, its picture followed by many independent questions.

    Every question sees the picture and itself, never the other questions (a block mask), and has the positions it will
    have when asked alone. So thirteen questions cost one picture, and training looks like use. Every other batch holds
    pictures with MANY printed characters: reading is learned last, and a quarter of all pictures has nothing to read.
    """

    def __init__(self, start: int, stop: int, batch: int, tokenizer):
        super().__init__(start, stop, batch, MANY, alternate=True)
        self.tokenizer = tokenizer
        image = "<image>" * VISUAL_TOKENS
        self.prefix = self.ids(f"<|im_start|>User:<fake_token_around_image><global-img>{image}<fake_token_around_image>")
        words = (*COLOURS, *SHAPES, *SIZES)
        self.word_ids = torch.tensor([self.ids(f" {w}")[0] for w in words] + [self.ids(c)[0] for c in ALPHABET])
        self.word_index = {w: i for i, w in enumerate((*words, *ALPHABET))}
        self.names = {self.ids(f" {w}")[0]: (w, False) for w in (*words, "object")}
        self.names |= {self.ids(f" {w}")[0]: (w, False) for w in RELATIONS}
        self.names |= {self.ids(f" {w}{'es' if w == 'cross' else 's'}")[0]: (w, True) for w in (*SHAPES, "object")}

    @functools.lru_cache(maxsize=200_000)  # noqa: B019  one dataset lives as long as its stage
    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __getitem__(self, i: int) -> ChatBatch:
        if i >= len(self):
            raise IndexError(i)
        drawn = self._draw(self.steps[i])
        families = [f for f, n in MIX.items() for _ in range(n)]
        rows = [self._row(s, families) for s in drawn]
        longest = -(-max(len(r[0]) for r in rows) // 8) * 8
        ids, answers, segments, positions = (torch.zeros(self.batch, longest, dtype=torch.long) for _ in range(4))
        answers.fill_(-100)
        segments.fill_(-1)
        for k, row in enumerate(rows):
            for tensor, values in zip((ids, answers, segments, positions), row[:4], strict=True):
                tensor[k, : len(values)] = torch.tensor(values)
        kinds = torch.tensor([r[4] for r in rows])
        asks = (kinds == FAMILIES.index("exists")).gather(1, (segments - 1).clamp(0)) & (segments > 0)
        prompts = ids.where(answers < 0, 0)
        images, labels, centres = self._pictures(drawn)
        places = [self._places(s, *r) for s, *r in zip(drawn, prompts, asks, centres, strict=True)]
        points, marks = (torch.stack(t) for t in zip(*places, strict=True))
        return ChatBatch(images, ids, answers, segments, positions, kinds, self._words(labels), points, marks, labels, centres)

    def _row(self, scene: Scene, families: list[str]) -> tuple[list[int], ...]:
        ids, answers = list(self.prefix), [-100] * len(self.prefix)
        segments, positions, kinds = [0] * len(ids), list(range(len(ids))), []
        for n, family in enumerate(families):
            question = self._question(scene, family, n)
            kinds.append(FAMILIES.index(question.family))
            prompt = self.ids(f"{question.text}<end_of_utterance>\nAssistant:")
            answer = self.ids(f" {question.answer}<end_of_utterance>")
            ids += prompt + answer
            answers += [-100] * len(prompt) + answer
            segments += [n + 1] * (len(prompt) + len(answer))
            positions += range(len(self.prefix), len(self.prefix) + len(prompt) + len(answer))
        return ids, answers, segments, positions, kinds

    def _question(self, scene: Scene, family: str, n: int) -> Question:
        return data_families.ask(scene, family, n) or data_families.ask(scene, "count", 100 + n)  # no printed code: count

    def _places(self, scene: Scene, ids: Tensor, asks: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """What the words of the questions `ids` (T,) refer to: points (T, 4) and marks (T, 64).

        Points, at the last token of "red circle" or "large object": is it there (1 or 0, where `asks`, (T,), says that this is
        the question, else -1); the centre's x and y, -1 where no single object is meant; how many words of the name come
        before. At that of "red objects" or "stars" -2, -1, -1 and the words before; at a word of RELATIONS -3, -1, -1, -1.
        Marks, at names: the patches of the one object, or the middle patch of each of the several.
        """
        points, marks = torch.full((len(ids), 4), -1.0), torch.zeros(len(ids), GRID * GRID, dtype=torch.bool)
        phrase: dict[str, str] = {}
        for at, token in enumerate(ids.tolist()):
            word, several = self.names.get(token, ("", False))
            kind = next((k for k, names in _INDEX.items() if word in names), None)
            phrase = phrase | {kind: word} if kind else phrase if word == "object" else {}
            if word in RELATIONS:
                points[at, 0] = -3
            if several or (phrase and (kind == "shape" or word == "object")):
                found = [t for t in scene.things if all(getattr(t, k) == v for k, v in phrase.items())]
                points[at, 0] = -2 if several else len(found) if asks[at] else -1
                points[at, 3] = len(phrase) - (kind == "shape")
                if several:
                    marks[at, [int(t.y * GRID) * GRID + int(t.x * GRID) for t in found]] = True
                elif len(found) == 1:
                    points[at, 1:3] = torch.tensor((found[0].x, found[0].y))
                    marks[at] = (centres == points[at, 1:3]).all(-1)
                phrase = {}
        return points, marks

    def _words(self, labels: Tensor) -> Tensor:
        """labels (B, 64, 9) -> (B, 64, 28): 1 for each word that names what the patch shows."""
        found, begin = torch.zeros(*labels.shape[:2], len(self.word_index)), {"colour": 0, "shape": 8, "size": 14}
        for k, name in enumerate(PATCH_TARGETS):
            offset = 15 if name.startswith("char") else begin.get(name)  # a character's class 0 is "none"
            known = labels[..., k] >= (1 if name.startswith("char") else 0)
            if offset is not None:
                found[known, labels[..., k][known] + offset] = 1
        return found


class NovelBatches(ChatBatches):
    """`ChatBatches` with one thing in each picture in a colour or shape that no other batch shows, and every question about it.

    Questions are of the families `NEW`, as in `data.questions(..., novel=True)`. With `replay`, every other batch is an ordinary
    one, so that the old is not forgotten.
    """

    def __init__(self, start: int, stop: int, batch: int, tokenizer, replay: bool = False):
        super().__init__(start, stop, batch, tokenizer)
        self.replay = replay

    def _draw(self, step: int) -> list[Scene]:
        drawn = super()._draw(step)  # of even and odd steps alike, since pictures with much to read are in the odd ones
        return drawn if self.replay and step % 4 in (1, 2) else [scenes.novel(s)[0] for s in drawn]

    def _question(self, scene: Scene, family: str, n: int) -> Question:
        word = next((w for t in scene.things for w in (t.colour, t.shape) if w in scenes.NEW_WORDS), "")
        if not word:
            return super()._question(scene, family, n)
        family = NEW[n % len(NEW)]
        return data_families.ask(scene, family, n, word) or data_families.ask(scene, "exists", 100 + n, word)


CAPTION_LENGTH = 56  # tokens of a caption with its padding: 53 is the longest of 30,000, six objects with size and printed code


class CaptionBatches(Sequence):
    """Batch `i`: pictures, captions, hard negatives. Every other caption is a full one, with sizes and printed codes."""

    def __init__(self, start: int, stop: int, batch: int, tokenizer):
        self.steps, self.batch, self.tokenizer = range(start, stop), batch, tokenizer
        self.names = {f"{c} {s}": i for i, (c, s) in enumerate(itertools.product(COLOURS, SHAPES))}

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> CaptionBatch:
        first = self.steps[i] * self.batch
        drawn = [scenes.make_scene(seed) for seed in range(first, first + self.batch)]
        full = [s.seed % 2 == 1 for s in drawn]
        true = [data_families.caption(s, f) for s, f in zip(drawn, full, strict=True)]
        wrong = [data_families.hard_negative(s, full=f)[0] for s, f in zip(drawn, full, strict=True)]
        images = torch.from_numpy(np.stack([pixels(s) for s in drawn]))
        return CaptionBatch(
            images, self.ids(true), self.ids(wrong), torch.stack([self._there(s) for s in drawn]), torch.tensor(full)
        )

    def ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def _there(self, scene: Scene) -> Tensor:
        found = torch.zeros(2, len(self.names))
        for t in scene.things:
            found[:, self.names[t.name]] = torch.tensor((1.0, float(t.size == "large")))
        return found
