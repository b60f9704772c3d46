"""Scenes and their questions as `datasets.Dataset`: any split, calibration sets, and the committed test split."""

import io
from collections import Counter

from PIL import Image

from mmrecipes.data import scenes
from mmrecipes.data.families import FAMILIES, ask
from mmrecipes.data.splits import SPLITS
from mmrecipes.errors import UserError
from mmrecipes.models.loading import data_dir
from mmrecipes.models.prompts import Rows

TEST_FILE = "scenes-test.parquet"


def encode_png(image: Image.Image) -> dict:
    """An image as a column of type `datasets.Image` stores it.
    >>> encode_png(rows[0]["image"])["bytes"][1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def _dataset(rows: list[dict]) -> Rows:
    import datasets

    kinds = {"image": datasets.Image(), "seed": datasets.Value("int64")}
    features = datasets.Features({k: kinds.get(k, datasets.Value("string")) for k in rows[0]})
    return datasets.Dataset.from_list(rows, features=features)


def questions(split: str, n: int, families: tuple[str, ...] = FAMILIES, size: int = 128, novel: bool = False) -> Rows:
    """`n` questions of `split`, as many of each family (to within one): image, question, answer, family, seed.
    Each has an image of its own, `size` px wide, so rows are independent; the same arguments give the same rows everywhere.
    `novel`: about colours and shapes that the house models never saw. Raises UserError for an unknown split or too few scenes.
    >>> questions("validation", 2, ("colour", "shape"))["family"][:]
    ['colour', 'shape']
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    if not 0 < 20 * n <= len(SPLITS[split]):
        raise UserError(f"{n} questions asked of split {split!r}, which has {len(SPLITS[split])} scenes, one question in 20 each")
    quota = Counter(families[i % len(families)] for i in range(n))
    rows = []
    for seed in SPLITS[split][: 20 * n]:
        if not sum(quota.values()):
            break
        scene = scenes.make_scene(seed)
        scene, word = scenes.novel(scene) if novel else (scene, "")
        # the family that is most behind goes first; one that this scene does not support (reading needs a code) waits
        question = next((q for f, left in quota.most_common() if left and (q := ask(scene, f, about=word))), None)
        if question is None:
            continue
        quota[question.family] -= 1
        row = {"image": encode_png(scenes.render(scene, size)), "question": question.text, "answer": question.answer}
        rows.append(row | {"family": question.family, "seed": seed})
    if missing := {f: left for f, left in quota.items() if left}:
        raise UserError(f"{20 * n} scenes of {split!r} have too few questions: {missing} missing; take other families")
    return _dataset(rows)


def image_rows(named: list[tuple[str, object]], question: str) -> Rows:
    """A user's own images, (name, PIL image) pairs, each asked `question`: image, question, name. No answers.
    >>> image_rows([("a.png", rows[0]["image"])], "What is it?")["name"][:]
    ['a.png']
    """
    return _dataset([{"image": encode_png(image), "question": question, "name": name} for name, image in named])


def calibration(n: int = 64, size: int = 128) -> Rows:
    """`n` questions from the calibration split, to fit quantizers and pruning on: never trained on, never tested on.
    >>> len(calibration(7))
    7
    """
    return questions("calibration", n, size=size)


def test_split(n: int | None = None) -> Rows:
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


def majority_floor(rows: Rows) -> dict[str, float]:
    """Accuracy, per family, of always giving that family's most frequent answer; `overall` takes the best of each family.
    >>> majority_floor(questions("validation", 4, ("size",)))
    {'size': 0.5, 'overall': 0.5}
    """
    totals = Counter(rows["family"])
    best: dict[str, int] = {}
    for (family, _), count in Counter(zip(rows["family"], rows["answer"], strict=True)).items():
        best[family] = max(best.get(family, 0), count)
    return {f: n / totals[f] for f, n in best.items()} | {"overall": sum(best.values()) / totals.total()}
