"""Knowledge distillation: a small model, the student, learns to do what a large one, its teacher, does.

A student cut from the teacher or made from nothing, what it may be asked to match (probabilities, hidden features, attention,
the vision tower's output), and the training. Built by hand in notebook 30; `mmrecipes.fit` runs it on one process or many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.losses import feature_loss, kl_loss, relation_loss, ridge
from mmrecipes.errors import UserError
from mmrecipes.mini.curriculum import chat_batches, image_batches
from mmrecipes.models import modules
from mmrecipes.models.modules import VisionWithConnector, clone
from mmrecipes.train import hooks
from mmrecipes.train.hooks import captured_with_attention
from mmrecipes.train.loop import Loss, TrainConfig, fit, mean_over_processes, shard
from mmrecipes.train.objectives import RowBatches


@dataclass(frozen=True)
class LossWeights:
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


LABELS_ONLY = LossWeights(logits=0, hidden=0, vision=0)


class StudentWithProjections(nn.Module):
    """A student with the maps from its features to its teacher's; only the student outlives the training."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student = student
        widths = {p: [modules.config_of(m, p).hidden_size for m in (student, teacher)] for p in modules.TOWERS}
        self.vision_maps = nn.Linear(*widths["vision"])
        self.hidden_maps = nn.ModuleList(
            nn.Linear(*widths["language"]) for _ in modules.layers(student, ("language",))["language"]
        )
        self.vision_maps.use_adamw = self.hidden_maps.use_adamw = True

    @torch.no_grad()
    def fit_maps_(self, own: dict[str, Any], wanted: dict[str, Any]) -> None:
        """The best linear maps for one batch (`watched` of both), so that training need not begin with looking for them."""
        pairs = list(zip(self.hidden_maps, hooks.layer_pairs(own["hidden"], wanted["hidden"]), strict=True))
        for m, (x, y) in [*pairs, *([(self.vision_maps, (own["vision"], wanted["vision"]))] if "vision" in own else [])]:
            x, y = (t.flatten(0, -2).double() for t in (x, y))
            x, y, middles = x - x.mean(0), y - y.mean(0), (x.mean(0), y.mean(0))
            weight = ridge(x.T @ x, x.T @ y)
            m.weight.copy_(weight)
            m.bias.copy_(middles[1] - weight @ middles[0])


def distillation_loss(teacher: nn.Module | None, aims: LossWeights, answers: Callable[[nn.Module, Any], tuple]) -> Loss:
    """The loss of a `Pupil` on a batch. `answers(model, batch)`: loss of the right ones, their number of tokens, what to log."""

    def loss(pupil: StudentWithProjections, batch: Any) -> tuple[Tensor, dict[str, float]]:
        with captured_with_attention(pupil.student) as own:
            right, tokens, logs = answers(pupil.student, batch)
        terms = {"answers": right}
        if teacher is not None and (aims.logits or aims.hidden or aims.vision or aims.attention):
            teacher.to(own["logits"].device)
            with captured_with_attention(teacher) as wanted, torch.no_grad():
                answers(teacher, batch)
            if aims.logits:
                terms["logits"] = kl_loss(own["logits"], wanted["logits"], aims.temperature, aims.reverse)
            if aims.hidden:
                pairs = hooks.layer_pairs(own["hidden"], wanted["hidden"])
                far = [feature_loss(m(h), w) for m, (h, w) in zip(pupil.hidden_maps, pairs, strict=True)]
                terms["hidden"] = sum(far) / len(far)
            if aims.vision and "vision" in own:
                terms["vision"] = feature_loss(pupil.vision_maps(own["vision"]), wanted["vision"])
            if aims.attention:
                far = [relation_loss(own["attention"][k], w) for k, w in wanted["attention"].items() if k in own["attention"]]
                terms["attention"] = sum(far) / len(far)
        own_share = tokens / mean_over_processes(tokens)  # a mean over all processes' tokens, not a mean of their means
        scaled = {k: v * own_share if k in ("answers", "logits") else v for k, v in terms.items()}
        return sum(getattr(aims, k) * v for k, v in scaled.items()), logs | {k: v.item() for k, v in terms.items()}

    return loss


# ---- training


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    course: TrainConfig,
    aims: LossWeights | None = None,
    rows: Any = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained copy of `student`; without a teacher it learns from the right answers alone.

    On the house model's lessons, never seen before, or on `rows` (image, question, answer) over and over, which takes any VLM;
    without a column `image` it is text-only distillation. With `work` it is resumable. Raises UserError as `fit` does.
    """
    aims = aims or (LABELS_ONLY if teacher is None else LossWeights())
    if teacher is None and (aims.logits or aims.hidden or aims.vision or aims.attention):
        raise UserError(f"distill: {aims} needs a teacher; give one, or aims=LABELS")
    pupil = StudentWithProjections(clone(student).requires_grad_(True), teacher or student)
    is_batches = rows is not None and hasattr(rows, "answer_loss")
    batches = rows if is_batches else None
    if batches is None:
        house = rows is None
        batches = chat_batches("student", course, student.processor.tokenizer) if house else RowBatches(student, rows, course)
    at = student.device  # the training may move it to a GPU
    if teacher is not None:  # frozen, or its vision tower would compute gradients that nobody wants
        teacher = clone(teacher).requires_grad_(False).to(at)
    if aims.hidden or aims.vision:
        first = shard(batches[0], 0, 1, at)
        with torch.no_grad(), captured_with_attention(pupil.student) as own, captured_with_attention(teacher) as wanted:
            for m in (pupil.student, teacher):
                batches.answer_loss(m, first)
        pupil.fit_maps_(own, wanted)
    fit(
        pupil,
        batches,
        distillation_loss(teacher, aims, batches.answer_loss),
        replace(course, about=repr(aims)),
        work,
    )
    return pupil.student.to(at).eval()


def match_vision_encoder(student: nn.Module, teacher: nn.Module, course: TrainConfig, work: Path | None = None) -> nn.Module:
    """A copy of `student` whose vision tower and connector give the visual tokens that the teacher's give: before any words.

    On the house model's pictures, without labels; every other batch has much printed in it, since reading is learned last.
    Raises UserError unless both language models read tokens of the same width: match one whose language model was sliced with
    the teacher sliced in the same way.
    """
    widths = [modules.config_of(m, "language").hidden_size for m in (student, teacher)]
    if widths[0] != widths[1]:
        raise UserError(f"match_eye: visual tokens of {widths[0]} and {widths[1]} channels; slice the teacher's words first")
    student = clone(student).requires_grad_(True)
    wanted = VisionWithConnector(clone(teacher).requires_grad_(False))

    def loss(eye: VisionWithConnector, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        wanted.to(batch[0].device)
        with torch.no_grad():
            tokens = wanted(batch[0])
        far = feature_loss(eye(batch[0]), tokens)
        return far, {"tokens": far.item()}

    at = student.device  # the training may move it to a GPU
    fit(VisionWithConnector(student), image_batches("student", course), loss, course, work)
    return student.to(at).eval()
