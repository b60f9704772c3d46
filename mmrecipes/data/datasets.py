"""The world as `datasets.Dataset`: questions, captions, Sort-of-CLEVR, calibration sets, and the committed test split."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mmrecipes.data import families as data_families
from mmrecipes.data import scenes
from mmrecipes.data.families import FAMILIES
from mmrecipes.data.splits import SPLITS
from mmrecipes.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TEST_FILE = "scenes-test.parquet"


def _seeds(split: str, n: int, start: int = 0) -> range:
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    if not 0 < n <= len(SPLITS[split]) - start:
        raise UserError(f"{n} scenes asked of split {split!r} from {start}; it has {len(SPLITS[split])}")
    return SPLITS[split][start : start + n]


def encode_png(image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def _dataset(rows: dict[str, list]) -> Dataset:
    from datasets import Dataset, Features, Image, Value

    kinds = {"image": Image(), "seed": Value("int64")}
    return Dataset.from_dict(rows, features=Features({k: kinds.get(k, Value("string")) for k in rows}))


def questions(split: str, n: int, families: tuple[str, ...] = FAMILIES, size: int = 128, novel: bool = False) -> Dataset:
    """`n` questions of `split`, as many of each family (to within one): image, question, answer, family, seed.

    Each question has a picture of its own, so rows are independent. The same arguments give the same rows everywhere. With
    `novel` each is about a colour or shape that the house models never saw.
    """
    quota = Counter(families[i % len(families)] for i in range(n))
    rows: dict[str, list] = {k: [] for k in ("image", "question", "answer", "family", "seed")}
    for seed in _seeds(split, 20 * n):
        if not sum(quota.values()):
            break
        scene, word = scenes.make_scene(seed), ""
        if novel:
            scene, word = scenes.novel(scene)
        # the family that is most behind goes first; one that this scene does not support (reading needs a code) waits
        question = next((q for f, left in quota.most_common() if left and (q := data_families.ask(scene, f, about=word))), None)
        if question is None:
            continue
        quota[question.family] -= 1
        values = (encode_png(scenes.render(scene, size)), question.text, question.answer, question.family, seed)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    if missing := {f: left for f, left in quota.items() if left}:
        raise UserError(
            f"{20 * n} scenes of {split!r} had too few questions: {missing} missing; ask for fewer, or other families"
        )
    return _dataset(rows)


def captions(split: str, n: int, full: bool = False, size: int = 128) -> Dataset:
    """`n` pictures with a true caption, and one that is false in exactly one attribute: image, caption, negative, attribute."""
    drawn = [scenes.make_scene(s) for s in _seeds(split, n)]
    wrong = [data_families.hard_negative(s, full=full) for s in drawn]
    return _dataset(
        {
            "image": [encode_png(scenes.render(s, size)) for s in drawn],
            "caption": [data_families.caption(s, full) for s in drawn],
            "negative": [text for text, _ in wrong],
            "attribute": [attribute for _, attribute in wrong],
            "seed": [s.seed for s in drawn],
        }
    )


def sort_of_clevr(split: str, n_images: int) -> Dataset:
    """Sort-of-CLEVR (Santoro et al. 2017) in words: 20 questions a picture, families `non-relational` and `relational`."""
    rows: dict[str, list] = {k: [] for k in ("image", "question", "answer", "family", "seed")}
    for seed in _seeds(split, n_images):
        image, asked = data_families.sort_of_clevr(seed)
        png = encode_png(image)
        for q in asked:
            for column, value in zip(rows.values(), (png, q.text, q.answer, q.family, seed), strict=True):
                column.append(value)
    return _dataset(rows)


def image_rows(named: list[tuple[str, object]], question: str) -> Dataset:
    """A user's own pictures, (name, PIL image) pairs, each asked `question`: image, question, name. No answers."""
    return _dataset(
        {"image": [encode_png(i) for _, i in named], "question": [question] * len(named), "name": [name for name, _ in named]}
    )


def calibration(n: int = 64, size: int = 128) -> Dataset:
    """`n` questions from the calibration split, to fit quantizers and pruning on: never trained on, never tested on."""
    return questions("calibration", n, size=size)


def test_split(n: int | None = None) -> Dataset:
    """The committed test split (4,200 questions, 600 of each family), or the first `n` of it, families mixed evenly."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    from mmrecipes.models import loading

    path = loading.data_dir() / TEST_FILE
    if not path.is_file():
        raise UserError(
            f"the test split {TEST_FILE} is missing from {path.parent}; make it with mmrecipes.data.write_test_split()"
        )
    table = Dataset(pq.read_table(path))  # rows are stored ready shuffled: any head of the file is a fair sample
    if n is not None and not 0 < n <= len(table):
        raise UserError(f"{n} test questions asked for; the test split has {len(table)}")
    return table if n is None else table.select(range(n))


def write_test_split(folder: Path, n: int = 4200) -> Path:
    """Write the test split as one Parquet file into `folder` (the recipe of the committed file)."""
    import pyarrow.parquet as pq

    order = list(range(n))
    random.Random(0).shuffle(order)
    path = folder / TEST_FILE
    aside = path.with_suffix(".part")
    pq.write_table(questions("test", n).with_format("arrow")[order], aside, compression="zstd")
    os.replace(aside, path)
    return path


def majority_floor(rows: Dataset) -> dict[str, float]:
    """Accuracy, per family, of always giving that family's most frequent answer; `overall` takes the best of each family."""
    by_family: dict[str, Counter] = {}
    for family, answer in zip(rows["family"], rows["answer"], strict=True):
        by_family.setdefault(family, Counter())[answer] += 1
    floors = {f: c.most_common(1)[0][1] / c.total() for f, c in by_family.items()}
    best = sum(c.most_common(1)[0][1] for c in by_family.values())
    return floors | {"overall": best / sum(c.total() for c in by_family.values())}
