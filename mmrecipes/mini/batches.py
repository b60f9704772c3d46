"""What the book's models train on, made while they train: batch `i` is a pure function of `i`, from its own slot of seeds."""

import functools
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.data import families, scenes
from mmrecipes.data.scenes import ALPHABET, COLOURS, SHAPES, SIZES, Scene
from mmrecipes.data.splits import slot
from mmrecipes.mini import losses
from mmrecipes.mini.labels import CLASS_NAMES, PATCH_TARGETS, CaptionBatch, ChatBatch, patch_labels, pixels
from mmrecipes.mini.model import GRID, VISUAL_TOKENS

# how many of an image's training questions come from each family: more for those that take several looks
MIX = {"colour": 1, "shape": 1, "size": 1, "count": 2, "exists": 2, "relation": 3, "reading": 3}
MANY = 5  # printed characters in an image chosen for reading: one scene of six has so many
ROOM = 8  # so many times the seeds that a batch needs are in its slot where some scenes are passed over
NEW = ("colour", "shape", "exists")  # families that can ask about one thing of a new colour or shape
RELATIONS = ("left", "right", "above", "below", "closest")


class SceneBatches(torch.utils.data.Dataset):
    """`steps` batches of `batch` scenes, drawn from `seeds` (one of `data.BLOCKS`); UserError when these are too few.
    With `printed`, only scenes with at least so many printed characters, as far as a batch's slot of seeds has them; with
    `alternate`, in every other batch only. Those with text need the model's `tokenizer`.
    """

    def __init__(self, seeds: range, steps: int, batch: int, tokenizer=None, printed: int = 0, alternate: bool = False):
        self.block, self.steps, self.batch, self.tokenizer = seeds, steps, batch, tokenizer
        self.printed, self.alternate = printed, alternate
        if steps > 0 and batch > 0:
            self.seeds(steps - 1)

    def __len__(self) -> int:
        return self.steps

    def seeds(self, i: int) -> range:
        """The seeds that batch `i` may draw."""
        return slot(self.block, i, self.batch * (ROOM if self.printed else 1))

    def draw(self, i: int) -> list[Scene]:
        """The scenes of batch `i`."""
        if not 0 <= i < self.steps:
            raise IndexError(i)
        printed = 0 if self.alternate and i % 2 == 0 else self.printed
        chosen, passed_over = [], []
        for scene in map(scenes.make_scene, self.seeds(i)):
            enough = sum(len(t.code) for t in scene.things) >= printed
            (chosen if enough else passed_over).append(scene)
            if len(chosen) == self.batch:
                break
        return (chosen + passed_over)[: self.batch]


class VisionBatches(SceneBatches):
    """Batch `i`: pixels (B, 3, 128, 128), labels (B, 64, 9), centres (B, 64, 2)."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return _images(self.draw(i))


def _images(drawn: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    labels, centres = zip(*(patch_labels(s) for s in drawn), strict=True)
    images = [pixels(s) for s in drawn]
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in (images, labels, centres))


class ChatBatches(SceneBatches):
    """Batch `i`: one sequence an image, the image followed by thirteen independent questions, with its objective `answer_loss`.
    Every question sees the image and itself (a block mask), at the positions it has when asked alone. Every other batch holds
    images with MANY printed characters, since reading is learned last.
    """

    def __init__(self, seeds: range, steps: int, batch: int, tokenizer):
        super().__init__(seeds, steps, batch, tokenizer, MANY, alternate=True)
        image = "<image>" * VISUAL_TOKENS
        self.prefix = self.ids(f"<|im_start|>User:<fake_token_around_image><global-img>{image}<fake_token_around_image>")
        words = (*COLOURS, *SHAPES, *SIZES)
        self.word_ids = torch.tensor([self.ids(f" {w}")[0] for w in words] + [self.ids(c)[0] for c in ALPHABET])
        self.names = {self.ids(f" {w}")[0]: (w, False) for w in (*words, "object", *RELATIONS)}  # token -> word, is it a plural?
        self.names |= {self.ids(f" {w}{'es' if w == 'cross' else 's'}")[0]: (w, True) for w in (*SHAPES, "object")}

    def answer_loss(self, model: nn.Module, batch: ChatBatch) -> tuple[Tensor, int, dict[str, float]]:
        """Loss of the right answers and of visual tokens aligned with words; how many answer tokens; what is right."""
        loss, logs = losses.answer_loss(model, batch, self.word_ids, 0.1)
        return loss, int((batch.answers[:, 1:] >= 0).sum()), logs

    @functools.lru_cache(maxsize=200_000)  # noqa: B019  one dataset lives as long as its stage
    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __getitem__(self, i: int) -> ChatBatch:
        drawn = self.draw(i)
        *columns, kinds = zip(*(self._row(s) for s in drawn), strict=True)
        longest = -(-max(map(len, columns[0])) // 8) * 8
        ids, answers, segments, positions = (
            torch.tensor([row + [fill] * (longest - len(row)) for row in column])
            for column, fill in zip(columns, (0, -100, -1, 0), strict=True)
        )
        kinds = torch.tensor(kinds)
        asks = (kinds == families.FAMILIES.index("exists")).gather(1, (segments - 1).clamp(0)) & (segments > 0)
        prompts = ids.where(answers < 0, 0)
        images, labels, centres = _images(drawn)
        places = [self._places(s, *r) for s, *r in zip(drawn, prompts, asks, centres, strict=True)]
        points, marks = (torch.stack(t) for t in zip(*places, strict=True))
        return ChatBatch(images, ids, answers, segments, positions, kinds, _words(labels), points, marks, labels, centres)

    def _row(self, scene: Scene) -> tuple[list[int], ...]:
        ids, answers = list(self.prefix), [-100] * len(self.prefix)
        segments, positions, kinds = [0] * len(ids), list(range(len(ids))), []
        for n, family in enumerate(Counter(MIX).elements()):
            question = self._question(scene, family, n)
            kinds.append(families.FAMILIES.index(question.family))
            prompt = self.ids(f"{question.text}<end_of_utterance>\nAssistant:")
            answer = self.ids(f" {question.answer}<end_of_utterance>")
            ids += prompt + answer
            answers += [-100] * len(prompt) + answer
            segments += [n + 1] * len(prompt + answer)
            positions += range(len(self.prefix), len(self.prefix + prompt + answer))
        return ids, answers, segments, positions, kinds

    def _question(self, scene: Scene, family: str, n: int) -> families.Question:
        return families.ask(scene, family, n) or families.ask(scene, "count", 100 + n)  # no printed code: count

    def _places(self, scene: Scene, ids: Tensor, asks: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """What the words of the questions `ids` (T,) refer to: points (T, 4) and marks (T, 64).
        Points, at the last token of "red circle": is it there (1 or 0, where `asks` (T,), else -1); its centre's x and y, -1
        where no single object is meant; how many words of the name come before. At that of "red objects" -2, -1, -1 and the
        words before; at a word of RELATIONS -3, -1, -1, -1. Marks, at names: the patches of one object, the middles of several.
        """
        points, marks = torch.full((len(ids), 4), -1.0), torch.zeros(len(ids), GRID * GRID, dtype=torch.bool)
        phrase: dict[str, str] = {}
        for at, token in enumerate(ids.tolist()):
            word, several = self.names.get(token, ("", False))
            kind = next((k for k, names in CLASS_NAMES.items() if word in names), None)
            phrase = phrase | {kind: word} if kind else phrase if word == "object" else {}
            if word in RELATIONS:
                points[at, 0] = -3
            if several or (phrase and (kind == "shape" or word == "object")):
                meant = [t for t in scene.things if all(getattr(t, k) == v for k, v in phrase.items())]
                points[at, 0] = -2 if several else len(meant) if asks[at] else -1
                points[at, 3] = len(phrase) - (kind == "shape")
                if several:
                    marks[at, [int(t.y * GRID) * GRID + int(t.x * GRID) for t in meant]] = True
                elif len(meant) == 1:
                    points[at, 1:3] = torch.tensor((meant[0].x, meant[0].y))
                    marks[at] = (centres == points[at, 1:3]).all(-1)
                phrase = {}
        return points, marks


def _words(labels: Tensor) -> Tensor:
    """labels (B, 64, 9) -> (B, 64, 28): 1 for each word (colour, shape, size, character) that names what the patch shows."""
    found = torch.zeros(*labels.shape[:2], 28)
    for name, begin in {"colour": 0, "shape": 8, "size": 14, "char0": 15, "char1": 15, "char2": 15}.items():
        label = labels[..., list(PATCH_TARGETS).index(name)]
        known = label >= name.startswith("char")  # a character's class 0 is "none"
        found[known, label[known] + begin] = 1
    return found


class NovelBatches(ChatBatches):
    """`ChatBatches` with one thing in each image in a colour or shape that no other batch shows, and every question about it.
    Questions are of the families `NEW`, as in `data.questions(..., novel=True)`. With `replay` every other batch is ordinary.
    """

    def __init__(self, seeds: range, steps: int, batch: int, tokenizer, replay: bool = False):
        super().__init__(seeds, steps, batch, tokenizer)
        self.replay = replay

    def draw(self, i: int) -> list[Scene]:
        drawn = super().draw(i)  # of even and odd steps alike, since images with much to read are in the odd ones
        return drawn if self.replay and i % 4 in (1, 2) else [scenes.novel(s)[0] for s in drawn]

    def _question(self, scene: Scene, family: str, n: int) -> families.Question:
        word = next((w for t in scene.things for w in (t.colour, t.shape) if w in scenes.NEW_WORDS), "")
        if not word:
            return super()._question(scene, family, n)
        return families.ask(scene, NEW[n % len(NEW)], n, word) or families.ask(scene, "exists", 100 + n, word)


CAPTION_LENGTH = 56  # tokens of a caption with its padding: 53 is the longest of 30,000, six objects with size and printed code
NAMES = {name: i for i, name in enumerate(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)}


class CaptionBatches(SceneBatches):
    """Batch `i`: images, captions, hard negatives. Every other caption is a full one, with sizes and printed codes."""

    def __getitem__(self, i: int) -> CaptionBatch:
        drawn = self.draw(i)
        full = [s.seed % 2 == 1 for s in drawn]
        true = [families.caption(s, f) for s, f in zip(drawn, full, strict=True)]
        wrong = [families.hard_negative(s, full=f)[0] for s, f in zip(drawn, full, strict=True)]
        images = torch.from_numpy(np.stack([pixels(s) for s in drawn]))
        there = torch.zeros(len(drawn), 2, len(NAMES))  # is it there, and is it large?
        for row, scene in zip(there, drawn, strict=True):
            for t in scene.things:
                row[:, NAMES[t.name]] = torch.tensor((1.0, float(t.size == "large")))
        ids = self.tokenizer(true + wrong, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return CaptionBatch(images, *ids.chunk(2), there, torch.tensor(full))
