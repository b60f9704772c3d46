"""A user's own folder of images, maybe with questions: rows to calibrate, choose and verify on, which share no image."""

import functools
import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrecipes.data import datasets, scenes
from mmrecipes.errors import UserError, one_line
from mmrecipes.models import images as models_images
from mmrecipes.models.prompts import Rows

QUESTIONS_FILE = "questions.jsonl"
SEED = 0  # of the order of images and questions: file names say what is in an image, and neighbours are alike
GENERAL_QUESTIONS = ("What is in this picture?", "Describe this picture in one sentence.", "Which colours are there?")
NEEDED = "give 2 images or more: some to calibrate on and others to verify on"


@dataclass(frozen=True)
class RowSets:
    """Three sets of rows (image, question, name, maybe answer). `notes` say where they come from."""

    calibrate: Rows
    choose: Rows
    verify: Rows
    notes: list[str]
    tried: int = 0  # of those that calibrate, each unit's sensitivity is found on so many

    def counts(self) -> dict[str, int]:
        """How many questions each set has, and how many images verify."""
        found = {"calibrated on": len(self.calibrate), "sensitivity on": self.tried, "chosen on": len(self.choose)}
        return found | {"verified on": len(self.verify), "images": len(set(self.verify["name"]))}


def gather(side: int, calib: Path | None, images: Path | None, n: int) -> RowSets:
    """RowSets from the user's folders; from drawn scenes where there is none, `side` px wide or as near to it as they are drawn.
    At most `n` to verify on, spread over the images.

    `images` alone is halved, image by image, in an order drawn with SEED. Raises UserError where an image would be on both sides.
    """
    if images and calib and images.expanduser().resolve() == calib.expanduser().resolve():
        calib = None
    side = min(max(side, scenes.SMALLEST), scenes.LARGEST)
    own, other = (None if folder is None else _spread(read_folder(folder)) for folder in (calib, images))
    notes = []
    if own is None and other is not None:
        own, other = _cut(other, 0.5)
        notes.append(f"half of the images in {images.name}, drawn with seed {SEED}, calibrates, the other half verifies")
    if own is not None and other is not None:
        _apart(own, other)
    if own is None:
        calibrate, choose = datasets.calibration(64, side), _drawn("validation", 200, side)
        notes.append("calibrated and chosen on drawn scenes")
    elif len(set(own["name"])) >= 8:
        calibrate, choose = _cut(own, 0.75)
        notes.append("a quarter of the images that calibrate only chooses between plans")
    else:
        calibrate = choose = own
        notes.append("few images to calibrate on: plans are chosen on these, too, not on the ones that verify")
    if other is None:
        other = _drawn("test", n, side)
        notes.append("verified on drawn scenes: images of your own, with --images, say more about your use")
    if (seen := _span(calibrate) / max(_span(other), 1)) < 0.5:
        notes.append(f"the images that calibrate span {seen:.0%} of the range of those that verify: too little; give others")
        warnings.warn(notes[-1], stacklevel=2)
    return RowSets(calibrate, choose, other.select(range(min(n, len(other)))), notes)


def _span(rows: Rows) -> float:
    """How far the darkest and the brightest hundredth of the pixels of the first 64 rows lie apart, of 255."""
    pixels = [np.asarray(image.convert("L").resize((64, 64))) for image in rows["image"][:64]]
    return float(np.ptp(np.percentile(pixels, (1, 99))))


def _drawn(split: str, n: int, side: int) -> Rows:
    rows = datasets.questions(split, n, size=side)
    if split == "test" and side == 128 and n <= 4200:
        rows = datasets.test_split(n)  # the committed one
    return rows.add_column("name", [f"scene {seed}" for seed in rows["seed"]])


def read_folder(folder: Path) -> Rows:
    """RowSets of a folder of images: those of its questions.jsonl, or three general questions about each image.
    A line: {"image": "a.png", "question": "...", "answer": "..."}, the answer in all of them or in none. Raises UserError that
    names the line or the image.
    """
    folder = folder.expanduser()
    asked, found = folder / QUESTIONS_FILE, []
    if not asked.is_file():
        named = models_images.load_images(folder)
        found = [(name, image, question, None) for name, image in named for question in GENERAL_QUESTIONS]
    else:
        load = functools.cache(lambda name: models_images.load_image(folder / name))
        for where, line in _lines(asked):
            try:
                found.append((line["image"], load(line["image"]), line["question"], line.get("answer")))
            except UserError as e:
                raise UserError(f"{where}: {e}") from e
    if len({name for name, *_ in found}) < 2:
        raise UserError(f"{folder}: one image; {NEEDED}")
    rows = datasets.image_rows([(name, image) for name, image, *_ in found], "").remove_columns("question")
    rows = rows.add_column("question", [question for _, _, question, _ in found])
    answers = [answer for *_, answer in found]
    return rows.add_column("answer", answers) if answers[0] is not None else rows


def _lines(asked: Path) -> list[tuple[str, dict]]:
    found: list[tuple[str, dict]] = []
    try:
        text = asked.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"{asked}: cannot be read ({one_line(e, 80)}); write it as text in UTF-8") from e
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where, shape = f"{asked}, line {number}", '{"image": "a.png", "question": "...", "answer": "..."}'
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"{where}: not JSON ({one_line(e, 80)}); expected {shape}, the answer if you have it") from e
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) and row[k].strip() for k in ("image", "question")):
            raise UserError(f"{where}: {line.strip():.60}; expected {shape}, the answer if you have it")
        if not isinstance(row.get("answer"), str | None):
            raise UserError(f"{where}: the answer is {row['answer']!r:.40}; expected a text in quotation marks")
        if found and (row.get("answer") is None) != (found[0][1].get("answer") is None):
            raise UserError(f"{where}: some lines have an answer and others have none; give all of them or none")
        found.append((where, row))
    if not found:
        raise UserError(f"{asked}: empty; write a question a line, or remove it, and general questions are asked")
    return found


def _spread(rows: Rows) -> Rows:
    """The rows in an order drawn with SEED: one question about each image, then another about each, and so on."""
    draw = random.Random(SEED)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(rows["name"]):
        places.setdefault(name, []).append(i)
    asked = list(places.values())
    draw.shuffle(asked)
    for at in asked:
        draw.shuffle(at)
    return _take(rows, [at[k] for k in range(max(map(len, asked))) for at in asked if k < len(at)])


def _cut(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """The rows of the first `share` of the images, and the others; each has one image or more."""
    names = list(dict.fromkeys(rows["name"]))
    first = set(names[: max(1, min(len(names) - 1, round(share * len(names))))])
    at = [[i for i, name in enumerate(rows["name"]) if (name in first) is side] for side in (True, False)]
    return _take(rows, at[0]), _take(rows, at[1])


def _take(rows: Rows, at: list[int]) -> Rows:
    """The rows at these places, copied: `select` would copy them later, with a bar, when a column is added."""
    from datasets import Dataset

    return Dataset(rows.data.table.take(at), info=rows.info)


def _apart(own: Rows, other: Rows) -> None:
    """UserError where two sets of rows share an image, whatever its file is called."""
    seen = {image.tobytes(): name for image, name in zip(own["image"], own["name"], strict=True)}
    for image, name in zip(other["image"], other["name"], strict=True):
        if (twin := seen.get(image.tobytes())) is not None:
            raise UserError(
                f"{name} is to verify on, and the same image is to calibrate on ({twin}): what was fitted on it proves "
                "nothing; take it out of one of the folders"
            )
