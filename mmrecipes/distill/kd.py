"""Knowledge distillation of a VLM: a small model, the student, learns to do what a large one, its teacher, does.

The student may be asked to match right answers, the teacher's logits, hidden states, visual features and attention relations.
`recover` is the same after a cut, with features compared as they are, and zeros that stay. Built by hand in notebook 30.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.losses import feature_loss, kl_loss, relation_loss, ridge
from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import VisionWithConnector, clone
from mmrecipes.train.hooks import captured, layer_pairs
from mmrecipes.train.loop import Loss, TrainConfig, fit, mean_over_processes, shard


@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss; 0 leaves it out. All but `answers` need a teacher.

    `answers`: cross-entropy of the right ones. `logits`: KL divergence from the teacher's at `temperature`, or `reverse`.
    `hidden`: its hidden states, layer by layer, and `vision`: its visual features, both through a linear projection that is
    thrown away. `attention`: relations in the last layer of the vision encoder and of the language model.
    """

    answers: float = 1.0
    logits: float = 1.0
    hidden: float = 1.0
    vision: float = 1.0
    attention: float = 0.0
    temperature: float = 1.0
    reverse: bool = False

    @property
    def need_teacher(self) -> bool:
        """Is anything asked for but right answers?"""
        return bool(self.logits or self.hidden or self.vision or self.attention)


LABELS_ONLY = LossWeights(logits=0, hidden=0, vision=0)


class StudentWithProjections(nn.Module):
    """A student with linear projections of its features to its teacher's width; only the student outlives the training.

    Without `learned` projections features are compared as they are.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, learned: bool = True):
        super().__init__()
        self.student = student
        depth = len(modules.layers(student, ("language",))["language"])
        if learned:
            sizes = {p: [modules.config_of(m, p).hidden_size for m in (student, teacher)] for p in ("vision", "language")}
            self.vision_projection = nn.Linear(*sizes["vision"])
            self.hidden_projections = nn.ModuleList(nn.Linear(*sizes["language"]) for _ in range(depth))
            self.vision_projection.use_adamw = self.hidden_projections.use_adamw = True
        else:
            self.vision_projection, self.hidden_projections = nn.Identity(), nn.ModuleList(nn.Identity() for _ in range(depth))

    @torch.no_grad()
    def fit_projections_(self, own: dict[str, Any], wanted: dict[str, Any]) -> None:
        """The least-squares projections for one batch (`captured` of both models), so that training need not begin with them."""
        hidden = zip(self.hidden_projections, layer_pairs(own["hidden"], wanted["hidden"]), strict=True)
        vision = [(self.vision_projection, (own["vision"], wanted["vision"]))] if "vision" in own else []
        for projection, features in (*hidden, *vision):
            x, y = (f.flatten(0, -2).double() for f in features)
            x_mean, y_mean = x.mean(0), y.mean(0)
            weight = ridge((x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean))
            projection.weight.copy_(weight)
            projection.bias.copy_(y_mean - weight @ x_mean)


def distillation_loss(teacher: nn.Module | None, weights: LossWeights, answer_loss: Callable[[nn.Module, Any], tuple]) -> Loss:
    """The loss of a StudentWithProjections on a batch, for `train.fit`. `answer_loss(model, batch)` is that of the batches."""

    def loss(projected: StudentWithProjections, batch: Any) -> tuple[Tensor, dict[str, float]]:
        with captured(projected.student, bool(weights.attention)) as own:
            right, tokens, logs = answer_loss(projected.student, batch)
        terms = {"answers": right}
        if weights.need_teacher:
            with captured(teacher.to(own["logits"].device), bool(weights.attention)) as wanted, torch.no_grad():
                answer_loss(teacher, batch)
        if weights.logits:
            terms["logits"] = kl_loss(own["logits"], wanted["logits"], weights.temperature, weights.reverse)
        if weights.hidden:
            pairs = zip(projected.hidden_projections, layer_pairs(own["hidden"], wanted["hidden"]), strict=True)
            terms["hidden"] = torch.stack([feature_loss(projection(h), w) for projection, (h, w) in pairs]).mean()
        if weights.vision and "vision" in own:  # text alone never reaches the vision encoder
            terms["vision"] = feature_loss(projected.vision_projection(own["vision"]), wanted["vision"])
        if weights.attention:
            shared = [k for k in wanted["attention"] if k in own["attention"]]  # a convolutional encoder has none
            distances = [relation_loss(own["attention"][k], wanted["attention"][k]) for k in shared]
            terms["attention"] = torch.stack(distances).mean()
        share = tokens / mean_over_processes(tokens)  # a mean over all processes' tokens, not a mean of their means
        scaled = {k: v * share if k in ("answers", "logits") else v for k, v in terms.items()}
        return sum(getattr(weights, k) * v for k, v in scaled.items()), logs | {k: v.item() for k, v in terms.items()}

    return loss


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[Any],
    config: TrainConfig,
    weights: LossWeights | None = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained copy of `student`; without a teacher it learns from the right answers alone.

    `batches` bring their own `answer_loss`: `train.RowBatches` for any VLM (without a column `image` this is text-only
    distillation), the book's own from `mini.curriculum`. With a folder `work` it is resumable. Raises UserError for weights
    that need a teacher where none is given, and as `train.fit` does.
    """
    weights = weights or (LABELS_ONLY if teacher is None else LossWeights())
    if weights.need_teacher and teacher is None:
        raise UserError(f"distill: {weights} needs a teacher; give one, or weights=LABELS_ONLY")
    projected = StudentWithProjections(clone(student).requires_grad_(True), teacher or student, learned=weights.need_teacher)
    device = student.device  # the training may move it to a GPU
    if teacher is not None:  # frozen, or its vision encoder would compute gradients that nobody wants
        teacher = clone(teacher).requires_grad_(False).to(device)
    if weights.hidden or weights.vision:
        first = shard(batches[0], 0, 1, device)
        with torch.no_grad(), captured(projected.student) as own, captured(teacher) as wanted:
            for model in (projected.student, teacher):
                batches.answer_loss(model, first)
        projected.fit_projections_(own, wanted)
    loss = distillation_loss(teacher, weights, batches.answer_loss)
    fit(projected, batches, loss, replace(config, about=repr(weights)), work)
    return projected.student.to(device).eval()


def match_vision_encoder(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None = None
) -> nn.Module:
    """A copy of `student` whose vision encoder and connector give the visual tokens that the teacher's give: before any text.

    On images alone: `batches[i][0]` are pixels (B, 3, H, W). Raises UserError unless both language models read tokens of the
    same width (slice the teacher's as the student's was), and as `train.fit` does.
    """
    sizes = [modules.config_of(m, "language").hidden_size for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(f"match_vision_encoder: visual tokens of {sizes[0]} and {sizes[1]} channels; slice the teacher as well")
    device, student = student.device, clone(student).requires_grad_(True)
    fit_outputs(VisionWithConnector(student), VisionWithConnector(clone(teacher)), batches, config, work)
    return student.to(device).eval()


def fit_outputs(student: nn.Module, teacher: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None) -> None:
    """Train a part of a model, in place, to give the features (B, N, D) that `teacher`'s part gives of the images `batch[0]`."""
    teacher.requires_grad_(False)

    def loss(part: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        images = batch[0]
        with torch.no_grad():
            wanted = teacher.to(images.device)(images)
        distance = feature_loss(part(images), wanted)
        return distance, {"features": distance.item()}

    fit(student, batches, loss, config, work)
