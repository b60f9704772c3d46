"""Knowledge distillation: a small model, the student, learns to do what a large one, its teacher, does.

A student cut from the teacher or made from nothing, what it may be asked to match (probabilities, hidden features, attention,
the vision tower's output), and the training. Built by hand in notebook 30; `mmrecipes.fit` runs it on one process or many.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes import importance, models, recovery, slicing, structured
from mmrecipes.errors import UserError
from mmrecipes.fit import Course, Loss, fit, over_processes, share
from mmrecipes.quantize import clone

FIRST = 40_000  # the first batch of lessons for a student: those of the teacher and of recoveries lie below
SLICE = {"vision": slicing.slice_vision, "language": slicing.slice_language}
HEADS = 2  # into so many the vectors are split for attention relations, whatever the heads of either model


# ---- the student


@dataclass(frozen=True)
class Size:
    """How large a part of the student is: which of the teacher's `layers` it takes, its width and its FFNs' columns."""

    layers: tuple[int, ...]
    width: int
    columns: int


def smaller(teacher: nn.Module, sizes: Mapping[str, Size], rows: Any, inherit: bool = True, seed: int = 0) -> nn.Module:
    """A student of the teacher's class, with `sizes` of "vision" and "language".

    With `inherit` it takes from the teacher what matters most: principal directions of the embeddings (`slicing`, fitted on
    calibration `rows`), and the columns with the largest weights. Without, it has the same shape and random weights.
    Raises UserError for sizes that do not fit the teacher.
    """
    student = teacher
    for part, size in sizes.items():
        own = structured.config_of(student, part)
        if not 0 < size.columns <= own.intermediate_size:
            raise UserError(f"smaller: {size.columns} columns in the {part} FFNs; expected 1 to {own.intermediate_size}")
        if size.width != own.hidden_size:
            student = SLICE[part](student, size.width, rows)
        scores = importance.magnitude(student)[part]["columns"]
        # the vision tower's FFNs are fitted anew, the language model's not, where that costs answers (notebook 21)
        fitted = rows if part == "vision" else None
        student = structured.keep_columns(student, {part: importance.strongest(scores, size.columns)}, fitted)
    for part, size in sizes.items():  # last: what flows by is measured with all of them
        student = structured.keep_layers(student, part, size.layers)
    if not inherit:
        torch.manual_seed(seed)
        fresh = type(student)(copy.deepcopy(student.config)).eval()
        fresh.generation_config, fresh.processor = student.generation_config, student.processor
        student = fresh.to(student.device, student.dtype)
    return student


# ---- what to match


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits (..., V), mean over rows, times temperature squared, in nats.

    Forward, KL(teacher || student): the student must cover all that the teacher finds likely (Hinton et al. 2015,
    arXiv:1503.02531). `reverse`, KL(student || teacher): it may leave some of it, and must invent nothing (MiniLLM, 2306.08543).
    """
    own, wanted = (x.float().div(temperature).log_softmax(-1) for x in (student, teacher))
    first, second = (wanted, own) if reverse else (own, wanted)
    far = F.kl_div(first, second, log_target=True, reduction="none").sum(-1)
    return far.mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (B, T, D), over the teacher's variance: 1 is what a constant would score (FitNets)."""
    return (student - teacher).square().mean() / teacher.var()


def relation_loss(student: Tensor, teacher: Tensor, heads: int = HEADS) -> Tensor:
    """How differently two sets of queries (or keys, or values), (B, T, D) each, relate tokens to one another.

    Attention of the vectors to themselves, KL divergence, mean over tokens: MiniLMv2 (arXiv:2012.15828). Widths may differ.
    """
    own, wanted = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher))
    own, wanted = ((x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).log_softmax(-1) for x in (own, wanted))
    return F.kl_div(own, wanted, log_target=True, reduction="none").sum(-1).mean()


@dataclass(frozen=True)
class Aims:
    """What the student is asked for, each with a weight; 0 leaves it out.

    The right `answers`; the teacher's `logits` at `temperature`; its `hidden` states, layer by layer, and its `vision` features,
    both through a linear map that is thrown away; its `attention`, by relations in the last layer of both towers.
    """

    answers: float = 1.0
    logits: float = 1.0
    hidden: float = 1.0
    vision: float = 1.0
    attention: float = 0.0
    temperature: float = 1.0
    reverse: bool = False


LABELS = Aims(logits=0, hidden=0, vision=0)


class Pupil(nn.Module):
    """A student with the maps from its features to its teacher's; only the student outlives the training."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        widths = {p: [structured.config_of(m, p).hidden_size for m in (student, teacher)] for p in structured.PARTS}
        self.vision_maps = nn.Linear(*widths["vision"])
        self.hidden_maps = nn.ModuleList(
            nn.Linear(*widths["language"]) for _ in structured.layers(student, ("language",))["language"]
        )

    @torch.no_grad()
    def fit_maps_(self, own: dict[str, Any], wanted: dict[str, Any]) -> None:
        """The best linear maps for one batch (`watched` of both), so that training need not begin with looking for them."""
        pairs = list(zip(self.hidden_maps, recovery.layer_pairs(own["hidden"], wanted["hidden"]), strict=True))
        for m, (x, y) in [*pairs, *([(self.vision_maps, (own["vision"], wanted["vision"]))] if "vision" in own else [])]:
            x, y = (t.flatten(0, -2).double() for t in (x, y))
            x, y, middles = x - x.mean(0), y - y.mean(0), (x.mean(0), y.mean(0))
            weight = ridge(x.T @ x, x.T @ y)
            m.weight.copy_(weight)
            m.bias.copy_(middles[1] - weight @ middles[0])


def ridge(moments: Tensor, products: Tensor) -> Tensor:
    """The linear map (D, C) of least squares, from moments x'x (C, C) and products x'y (C, D), in their dtype.

    A thousandth of the mean moment is added to each channel's own, since samples may not fill all directions.
    """
    small = 1e-3 * moments.diagonal().mean() + 1e-8
    return torch.linalg.solve(moments + small * torch.eye(len(moments), dtype=moments.dtype, device=moments.device), products).T


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Any]]:
    """`recovery.watched`, and the queries, keys and values of the last layer of each tower: "attention", (B, T, D) each."""
    with recovery.watched(model) as found:
        found["attention"], hooks = {}, []
        for part in structured.PARTS:
            try:
                last = structured.layers(model, (part,))[part][-1]
            except UserError:  # a convolutional tower, which has no attention
                continue
            for name, m in zip("qkv", structured.attention(last), strict=False):
                keep = found["attention"].__setitem__
                hooks.append(m.register_forward_hook(lambda _m, _a, out, key=f"{part} {name}", keep=keep: keep(key, out)))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def lesson(teacher: nn.Module | None, aims: Aims, answers: Callable[[nn.Module, Any], tuple]) -> Loss:
    """The loss of a `Pupil` on a batch. `answers(model, batch)`: loss of the right ones, their number of tokens, what to log."""

    def loss(pupil: Pupil, batch: Any) -> tuple[Tensor, dict[str, float]]:
        with watched(pupil.student) as own:
            right, tokens, logs = answers(pupil.student, batch)
        terms = {"answers": right}
        if teacher is not None and (aims.logits or aims.hidden or aims.vision or aims.attention):
            teacher.to(own["logits"].device)
            with watched(teacher) as wanted, torch.no_grad():
                answers(teacher, batch)
            if aims.logits:
                terms["logits"] = soft_loss(own["logits"], wanted["logits"], aims.temperature, aims.reverse)
            if aims.hidden:
                pairs = recovery.layer_pairs(own["hidden"], wanted["hidden"])
                far = [feature_loss(m(h), w) for m, (h, w) in zip(pupil.hidden_maps, pairs, strict=True)]
                terms["hidden"] = sum(far) / len(far)
            if aims.vision and "vision" in own:
                terms["vision"] = feature_loss(pupil.vision_maps(own["vision"]), wanted["vision"])
            if aims.attention:
                far = [relation_loss(own["attention"][k], w) for k, w in wanted["attention"].items() if k in own["attention"]]
                terms["attention"] = sum(far) / len(far)
        own_share = tokens / over_processes(tokens)  # a mean over all processes' tokens, not a mean of their means
        scaled = {k: v * own_share if k in ("answers", "logits") else v for k, v in terms.items()}
        return sum(getattr(aims, k) * v for k, v in scaled.items()), logs | {k: v.item() for k, v in terms.items()}

    return loss


# ---- training


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    course: Course,
    aims: Aims | None = None,
    rows: Any = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained copy of `student`; without a teacher it learns from the right answers alone.

    On the house model's lessons, never seen before, or on `rows` (image, question, answer) over and over, which takes any VLM;
    without a column `image` it is text-only distillation. With `work` it is resumable. Raises UserError as `fit` does.
    """
    aims = aims or (LABELS if teacher is None else Aims())
    if teacher is None and (aims.logits or aims.hidden or aims.vision or aims.attention):
        raise UserError(f"distill: {aims} needs a teacher; give one, or aims=LABELS")
    pupil = Pupil(clone(student).requires_grad_(True), teacher or student)
    batches, words = material(student, course, rows)
    at = student.device  # the training may move it to a GPU
    if teacher is not None:  # frozen, or its vision tower would compute gradients that nobody wants
        teacher = clone(teacher).requires_grad_(False).to(at)
    if aims.hidden or aims.vision:
        first = share(batches[0], 0, 1, at)
        with torch.no_grad(), watched(pupil.student) as own, watched(teacher) as wanted:
            for m in (pupil.student, teacher):
                right_answers(m, first, words)
        pupil.fit_maps_(own, wanted)
    fit(pupil, batches, lesson(teacher, aims, lambda m, batch: right_answers(m, batch, words)), course, work, about=repr(aims))
    return pupil.student.to(at).eval()


def material(model: nn.Module, course: Course, rows: Any = None) -> tuple[Sequence, Tensor | None]:
    """Batches for `right_answers`, and its `words`: the house model's lessons, never seen before, or `rows` over and over.

    `rows` may be lessons, too (`lessons.NovelBatches`)."""
    if hasattr(rows, "word_ids"):
        return rows, rows.word_ids
    if rows is not None:
        return RowBatches(model, rows, course), None
    from mmrecipes.lessons import ChatBatches

    first = FIRST * 16 // max(1, course.batch)
    batches = ChatBatches(first, first + course.steps, course.batch, model.processor.tokenizer)
    return batches, batches.word_ids


def right_answers(model: nn.Module, batch: Any, words: Tensor | None) -> tuple[Tensor, int, dict[str, float]]:
    """Cross-entropy of the right answers' tokens, how many they are, and for lessons (`words`: their word ids) what is right."""
    if words is not None:
        from mmrecipes.losses import answer_loss

        loss, logs = answer_loss(model, batch, words, 0.1)
        return loss, int((batch.answers[:, 1:] >= 0).sum()), logs
    inputs = {k: v for k, v in batch.items() if k != "answers"}
    wanted = batch["answers"]
    keep = int((wanted >= 0).sum(-1).max()) + 1  # the answers end their rows
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
    wanted = wanted[:, -keep + 1 :]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
    return loss, int((wanted >= 0).sum()), {}


class RowBatches(Sequence):
    """Rows (image, question, answer) as batches for a model's own processor, over and over: dicts with "answers" (B, T)."""

    def __init__(self, model: nn.Module, rows: Any, course: Course):
        from mmrecipes.evaluate import teacher_forced

        whole = len(rows) - len(rows) % max(1, course.batch)
        if not whole or course.batch < 1:
            raise UserError(f"distill: {len(rows)} rows for batches of {course.batch}; give more rows, or a smaller batch")
        self.steps, self.made = course.steps, []
        for inputs, lengths in teacher_forced(model, rows.select(range(whole)), course.batch):
            answers = torch.full_like(inputs["input_ids"], -100)
            for row, k in enumerate(lengths):
                answers[row, -k:] = inputs["input_ids"][row, -k:]
            self.made.append({**inputs, "answers": answers})

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.made[i % len(self.made)]


class Eye(nn.Module):
    """Vision tower and connector of a VLM: pictures to visual tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        found = models.parts(model)
        self.vision, self.connector = found["vision"], found["connector"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> visual tokens (B, N, D), as the language model gets them."""
        return self.connector(self.vision(pixel_values).last_hidden_state)


def match_eye(student: nn.Module, teacher: nn.Module, course: Course, work: Path | None = None) -> nn.Module:
    """A copy of `student` whose vision tower and connector give the visual tokens that the teacher's give: before any words.

    On the house model's pictures, without labels; every other batch has much printed in it, since reading is learned last.
    Raises UserError unless both language models read tokens of the same width: match one whose language model was sliced with
    the teacher sliced in the same way.
    """
    widths = [structured.config_of(m, "language").hidden_size for m in (student, teacher)]
    if widths[0] != widths[1]:
        raise UserError(f"match_eye: visual tokens of {widths[0]} and {widths[1]} channels; slice the teacher's words first")
    student = clone(student).requires_grad_(True)
    wanted = Eye(clone(teacher).requires_grad_(False))

    def loss(eye: Eye, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        wanted.to(batch[0].device)
        with torch.no_grad():
            tokens = wanted(batch[0])
        far = feature_loss(eye(batch[0]), tokens)
        return far, {"tokens": far.item()}

    at = student.device  # the training may move it to a GPU
    fit(Eye(student), pictures(course), loss, course, work)
    return student.to(at).eval()


def pictures(course: Course) -> Sequence:
    """The house model's pictures for `course`, never seen before; every other batch has much printed in it."""
    from mmrecipes.lessons import MANY, VisionBatches

    first = (FIRST - 10_000) * 16 // course.batch  # between those of recoveries and those of the lessons
    return VisionBatches(first, first + course.steps, course.batch, MANY, alternate=True)
