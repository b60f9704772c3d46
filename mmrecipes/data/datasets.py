"""Scenes and their questions as `datasets.Dataset`: any split, calibration sets, and the committed test split."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

from mmrecipes.data import scenes
from mmrecipes.data.families import FAMILIES, ask
from mmrecipes.data.splits import SPLITS
from mmrecipes.errors import UserError
from mmrecipes.models.loading import data_dir

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset

TEST_FILE = "scenes-test.parquet"


def encode_png(image: PIL.Image.Image) -> dict:
    """An image as a column of type `datasets.Image` stores it.
    >>> encode_png(rows[0]["image"])["bytes"][1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def _dataset(rows: dict[str, list]) -> Dataset:
    from datasets import Dataset, Features, Image, Value

    kinds = {"image": Image(), "seed": Value("int64")}
    return Dataset.from_dict(rows, features=Features({k: kinds.get(k, Value("string")) for k in rows}))


def questions(split: str, n: int, families: tuple[str, ...] = FAMILIES, size: int = 128, novel: bool = False) -> Dataset:
    """`n` questions of `split`, as many of each family (to within one): image, question, answer, family, seed.

    Each question has an image of its own, `size` px wide, so rows are independent. The same arguments give the same rows
    everywhere. With `novel` each is about a colour or shape that the house models never saw. Raises UserError for a split that
    there is not, or that has too few scenes.
    >>> questions("validation", 2, ("colour", "shape"))["family"][:]
    ['colour', 'shape']
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    if not 0 < 20 * n <= len(SPLITS[split]):
        raise UserError(f"{n} questions asked of split {split!r}, which has {len(SPLITS[split])} scenes, one question in 20 each")
    quota = Counter(families[i % len(families)] for i in range(n))
    rows: dict[str, list] = {k: [] for k in ("image", "question", "answer", "family", "seed")}
    for seed in SPLITS[split][: 20 * n]:
        if not sum(quota.values()):
            break
        scene, word = scenes.make_scene(seed), ""
        if novel:
            scene, word = scenes.novel(scene)
        # the family that is most behind goes first; one that this scene does not support (reading needs a code) waits
        question = next((q for f, left in quota.most_common() if left and (q := ask(scene, f, about=word))), None)
        if question is None:
            continue
        quota[question.family] -= 1
        values = (encode_png(scenes.render(scene, size)), question.text, question.answer, question.family, seed)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    if missing := {f: left for f, left in quota.items() if left}:
        raise UserError(f"{20 * n} scenes of {split!r} have too few questions: {missing} missing; take other families")
    return _dataset(rows)


def image_rows(named: list[tuple[str, object]], question: str) -> Dataset:
    """A user's own images, (name, PIL image) pairs, each asked `question`: image, question, name. No answers.
    >>> image_rows([("a.png", rows[0]["image"])], "What is it?")["name"][:]
    ['a.png']
    """
    names, images = [name for name, _ in named], [encode_png(image) for _, image in named]
    return _dataset({"image": images, "question": [question] * len(named), "name": names})


def calibration(n: int = 64, size: int = 128) -> Dataset:
    """`n` questions from the calibration split, to fit quantizers and pruning on: never trained on, never tested on.
    >>> len(calibration(7))
    7
    """
    return questions("calibration", n, size=size)


def test_split(n: int | None = None) -> Dataset:
    """The committed test split (4,200 questions, 600 of each family), or its first `n`, families mixed. UserError if missing.
    >>> test_split(2).column_names
    ['image', 'question', 'answer', 'family', 'seed']
    """
    import pyarrow.parquet as pq
    from datasets import Dataset

    path = data_dir() / TEST_FILE
    if not path.is_file():
        raise UserError(f"{TEST_FILE} is missing from {path.parent}; make it with `python tools/write_test_split.py`")
    table = Dataset(pq.read_table(path))  # rows are stored ready shuffled: any head of the file is a fair sample
    if n is not None and not 0 < n <= len(table):
        raise UserError(f"{n} test questions asked for; the test split has {len(table)}")
    return table if n is None else table.select(range(n))


def majority_floor(rows: Dataset) -> dict[str, float]:
    """Accuracy, per family, of always giving that family's most frequent answer; `overall` takes the best of each family.
    >>> majority_floor(questions("validation", 4, ("size",)))
    {'size': 0.5, 'overall': 0.5}
    """
    by_family: dict[str, Counter] = {}
    for family, answer in zip(rows["family"], rows["answer"], strict=True):
        by_family.setdefault(family, Counter())[answer] += 1
    floors = {f: c.most_common(1)[0][1] / c.total() for f, c in by_family.items()}
    best = sum(c.most_common(1)[0][1] for c in by_family.values())
    return floors | {"overall": best / sum(c.total() for c in by_family.values())}
