"""What `shrink` works on: rows to calibrate, choose and verify on, which share no picture; and how answers compare."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmrecipes import checks, data, evaluate, models, pictures
from mmrecipes.errors import UserError, one_line
from mmrecipes.evaluate import Share

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.exported import Exported

ASKED = "questions.jsonl"
GENERAL = ("What is in this picture?", "Describe this picture in one sentence.", "Which colours are there?")
WORDS = 12  # tokens of an answer, at most
NEEDED = "give 2 pictures or more: some to calibrate on and others to verify on"


@dataclass(frozen=True)
class Rows:
    """Three sets of rows (image, question, name, maybe answer). `notes` say where they come from."""

    calibrate: Dataset
    choose: Dataset
    verify: Dataset
    notes: list[str]
    tried: int = 0  # of those that calibrate, each unit's sensitivity is found on so many


# ---- rows in


def gather(side: int, calib: Path | None, images: Path | None, n: int) -> Rows:
    """Rows from the user's folders; from drawn scenes, `side` px wide, where there is none. At most `n` to verify on.

    `images` alone is halved, picture by picture. Raises UserError where a picture would be on both sides.
    """
    if images and calib and images.expanduser().resolve() == calib.expanduser().resolve():
        calib = None
    own, other = (None if folder is None else read(folder) for folder in (calib, images))
    notes = []
    if own is None and other is not None:
        own, other = _cut(other, 0.5)
        notes.append(f"the first half of the pictures in {images.name} calibrates, the other half verifies")
    if own is not None and other is not None:
        _apart(own, other)
    if own is None:
        calibrate, choose = data.calibration(64, side), _drawn("validation", 200, side)
        notes.append("calibrated and chosen on drawn scenes")
    elif len(set(own["name"])) >= 8:
        calibrate, choose = _cut(own, 0.75)
        notes.append("of the pictures that calibrate, the last quarter only chooses between plans")
    else:
        calibrate = choose = own
        notes.append("few pictures to calibrate on: plans are chosen on these, too, not on the ones that verify")
    if other is None:
        other = _drawn("test", n, side)
        notes.append("verified on drawn scenes: pictures of your own, with --images, say more about your use")
    return Rows(calibrate, choose, other.select(range(min(n, len(other)))), notes)


def _drawn(split: str, n: int, side: int) -> Dataset:
    rows = data.questions(split, n, size=side)
    if split == "test" and side == 128 and n <= 4200:
        rows = data.test_split(n)  # the committed one
    return rows.add_column("name", [f"scene {seed}" for seed in rows["seed"]])


def read(folder: Path) -> Dataset:
    """Rows of a folder of pictures: those of its questions.jsonl, or three general questions about each picture.

    A line: {"image": "a.png", "question": "...", "answer": "..."}, the answer in all of them or in none. Raises UserError that
    names the line or the picture.
    """
    folder = folder.expanduser()
    asked, found = folder / ASKED, []
    if not asked.is_file():
        named = pictures.images(folder)
        found = [(name, picture, question, None) for name, picture in named for question in GENERAL]
    else:
        known: dict[str, object] = {}
        for where, line in _lines(asked):
            name = line["image"]
            if name not in known:
                try:
                    known[name] = pictures.image(folder / name)
                except UserError as e:
                    raise UserError(f"{where}: {e}") from e
            found.append((name, known[name], line["question"], line.get("answer")))
    if len({name for name, *_ in found}) < 2:
        raise UserError(f"{folder}: one picture; {NEEDED}")
    rows = data.pictures([(name, picture) for name, picture, *_ in found], "").remove_columns("question")
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


def _cut(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rows of the first `share` of the pictures, and the others; each has one picture or more."""
    names = list(dict.fromkeys(rows["name"]))
    first = set(names[: max(1, min(len(names) - 1, round(share * len(names))))])
    at = [[i for i, name in enumerate(rows["name"]) if (name in first) is side] for side in (True, False)]
    return rows.select(at[0]), rows.select(at[1])


def _apart(own: Dataset, other: Dataset) -> None:
    """UserError where two sets of rows share a picture, whatever its file is called."""
    seen = {picture.tobytes(): name for picture, name in zip(own["image"], own["name"], strict=True)}
    for picture, name in zip(other["image"], other["name"], strict=True):
        if (twin := seen.get(picture.tobytes())) is not None:
            raise UserError(
                f"{name} is to verify on, and the same picture is to calibrate on ({twin}): what was fitted on it proves "
                "nothing; take it out of one of the folders"
            )


def with_answers(model: nn.Module, rows: Dataset) -> Dataset:
    """`rows` with the model's own answers in the place of labels."""
    decode, found = model.processor.tokenizer.decode, words(model, rows)
    rows = rows.remove_columns([c for c in ("answer",) if c in rows.column_names])
    return rows.add_column("answer", [decode(ids, skip_special_tokens=True).strip() for ids in found])


# ---- answers compared


@dataclass(frozen=True)
class Loss:
    """What a candidate lost against the original, in points of accuracy or of agreement, with a 95% interval."""

    measure: str  # "accuracy" or "agreement"
    points: float
    low: float
    high: float
    n: int
    share: Share  # the candidate's accuracy or agreement
    paired: evaluate.Paired | None = None

    def __str__(self) -> str:
        return f"{self.points:.1f} points of {self.measure} [{self.low:.1f}, {self.high:.1f}], n={self.n}"


@torch.inference_mode()
def words(model: nn.Module, rows: Dataset, batch_size: int = 8) -> list[list[int]]:
    """Token ids of the model's own greedy answers, at most WORDS each; the stop token counts where it stopped."""
    from tqdm.auto import tqdm

    processor, found = model.processor, []
    processor.tokenizer.padding_side = "left"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{}"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    stop = stops(model)
    for i in tqdm(range(0, len(rows), batch_size), disable=checks.quiet(), desc="the original answers", leave=False):
        part = rows[i : i + batch_size]
        texts = [prompt.replace("{}", q) for q in part["question"]]
        given = processor(images=[[p.convert("RGB")] for p in part["image"]], text=texts, padding=True, return_tensors="pt")
        out = model.generate(**given.to(model.device), max_new_tokens=WORDS, do_sample=False)
        for ids in out[:, given["input_ids"].shape[1] :].tolist():
            end = next((k + 1 for k, token in enumerate(ids) if token in stop), len(ids))
            found.append(ids[:end])
    return found


def stops(model: nn.Module) -> set[int]:
    """The token ids at which the model stops."""
    stop = model.generation_config.eos_token_id
    stop = model.config.get_text_config().eos_token_id if stop is None else stop
    return {stop} if isinstance(stop, int) else set(stop or ())


def agreement(model: nn.Module | Exported, rows: Dataset, wanted: Sequence[list[int]]) -> list[list[bool]]:
    """For each token of `wanted`, the original's answers: is it the model's likeliest, given the same words before?"""
    from tqdm.auto import tqdm

    look = _choices if isinstance(model, nn.Module) else _exported_choices
    asked = zip(rows["image"], rows["question"], wanted, strict=True)
    bar = tqdm(asked, total=len(rows), disable=checks.quiet(), desc="comparing", leave=False)
    return [[a == b for a, b in zip(look(model, image, question, ids), ids, strict=True)] for image, question, ids in bar]


@torch.inference_mode()
def _choices(model: nn.Module, image, question: str, ids: list[int]) -> list[int]:
    inputs = dict(models.chat(model, image, question))
    shape, more = inputs["input_ids"].shape, torch.tensor([ids[:-1]], device=model.device)
    for name, value in inputs.items():  # the mask, and kinds of token where a model wants them, grow with the text
        if getattr(value, "shape", None) == shape:
            fill = torch.ones_like(more) if name == "attention_mask" else torch.zeros_like(more)
            inputs[name] = torch.cat([value, more if name == "input_ids" else fill.to(value.dtype)], 1)
    return model(**inputs).logits[0, shape[1] - 1 :].argmax(-1).tolist()


def _exported_choices(model: Exported, image, question: str, ids: list[int]) -> list[int]:
    import numpy as np

    found = [int(model.prefill(model.inputs(image, question)).argmax())]
    return found + [int(model.graphs.step(np.array([[token]])).argmax()) for token in ids[:-1]]


def right(predictions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Exact match; case and a full stop at the end do not count."""
    plain = [[text.strip().rstrip(".!").lower() for text in texts] for texts in (predictions, answers)]
    return [p == a for p, a in zip(*plain, strict=True)]


def knows(correct: Sequence[bool], answers: Sequence[str]) -> bool:
    """Whether a model's share of right answers can show a loss: half of them, and more than the commonest answer would get."""
    floor = Counter(a.lower() for a in answers).most_common(1)[0][1] / len(answers)
    share = evaluate.wilson(sum(correct), len(correct))
    return share.value >= 0.5 and share.low > floor


def accuracy_loss(before: Sequence[bool], after: Sequence[bool]) -> Loss:
    """Points of accuracy that were lost on the same questions."""
    pair = evaluate.paired(before, after)
    if not pair.lost + pair.won:  # drawing again from questions without a change shows none: what so few cannot rule out
        most = 100 * evaluate.wilson(0, pair.n).high
        pair = dataclasses.replace(pair, low=-most, high=most)
    return Loss("accuracy", 0 - pair.points, 0 - pair.high, 0 - pair.low, pair.n, evaluate.wilson(sum(after), len(after)), pair)


def agreement_loss(same: Sequence[Sequence[bool]], clusters: Sequence[str]) -> Loss:
    """100 less the percentage of tokens that agree. Tokens of one picture are alike, so the interval goes by pictures."""
    hits, totals = Counter(), Counter()
    for tokens, cluster in zip(same, clusters, strict=True):
        hits[cluster] += sum(tokens)
        totals[cluster] += len(tokens)
    share = clustered(list(hits.values()), list(totals.values()))
    return Loss("agreement", *(100 - 100 * v for v in (share.value, share.high, share.low)), share.n, share)


def clustered(hits: Sequence[int], totals: Sequence[int]) -> Share:
    """A proportion over all, with a Wilson interval for as many independent draws as the spread between clusters leaves.

    Korn and Graubard 1998 (effective sample size). Without any spread, each cluster counts as one draw.
    """
    n, groups = sum(totals), len(totals)
    p = sum(hits) / n
    spread = sum((h - p * t) ** 2 for h, t in zip(hits, totals, strict=True)) * groups / max(1, groups - 1) / n**2
    draws = min(n, p * (1 - p) / spread) if spread else groups
    found = evaluate.wilson(p * draws, draws)
    return Share(p, min(p, found.low), max(p, found.high), n)
