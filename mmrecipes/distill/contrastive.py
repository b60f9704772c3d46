"""A smaller dual encoder, its towers kept aligned: what it may take from a larger one, and contrastive training after a cut.

For SigLIP and CLIP alike. Built by hand in notebook 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.losses import CaptionBatch, affinity_loss, embed, embedding_loss, interactive_loss, pair_loss
from mmrecipes.distill.students import PROJECTION
from mmrecipes.errors import UserError
from mmrecipes.mini.curriculum import caption_batches
from mmrecipes.mini.model import IMAGE_SIZE
from mmrecipes.models import modules
from mmrecipes.models.modules import clone
from mmrecipes.train.loop import TrainConfig, fit

TRAINED = ("all", "small", "nothing")


@dataclass(frozen=True)
class ContrastiveWeights:
    """What the student is asked for, each with a weight; 0 leaves it out. All but the first need a teacher.

    `contrast`: true pairs together, all others apart. `affinity`: every picture resembles every text as much as it does for
    the teacher (TinyCLIP). `feature`: the same vectors as the teacher's. `interactive`: its pictures find the teacher's texts,
    and the other way round (both CLIP-KD, arXiv:2307.12732).
    """

    contrast: float = 1.0
    affinity: float = 1.0
    feature: float = 10.0
    interactive: float = 1.0


CONTRAST_ONLY = ContrastiveWeights(affinity=0, feature=0, interactive=0)


def distill_dual(
    student: nn.Module,
    teacher: nn.Module | None,
    course: TrainConfig,
    aims: ContrastiveWeights | None = None,
    rows: Any = None,
    work: Path | None = None,
    trained: Mapping[str, str] | None = None,
) -> nn.Module:
    """A trained copy of `student`; without a teacher it learns from pairs alone.

    On the house model's captions, never seen before, or on `rows` (image, caption, negative) over and over. `trained` says what
    of "vision" and "language" learns: "all", "small" (norms and biases only, so that rounded or zeroed matrices stay as they
    are) or "nothing". On several processes SigLIP's loss compares with all texts, the other losses with this process's own. With
    `work` it is resumable. Raises UserError as `fit` does.
    """
    aims, model = aims or (CONTRAST_ONLY if teacher is None else ContrastiveWeights()), clone(student).requires_grad_(True)
    taught = bool(aims.affinity or aims.feature or aims.interactive)
    if taught and teacher is None:
        raise UserError(f"distill: {aims} needs a teacher; give one, or aims=ALONE")
    for part, how in (trained or {}).items():
        if how not in TRAINED or part not in PROJECTION:
            expected = f"{', '.join(TRAINED)} of {' or '.join(PROJECTION)}"
            raise UserError(f"distill: {how!r} of {part!r} is to be trained; expected {expected}")
        for m in (modules.parts(model)[part], getattr(model, PROJECTION[part], None)):
            for p in m.parameters() if m is not None else ():
                p.requires_grad_(how == "all" or (how == "small" and p.ndim < 2))

    def loss(m: nn.Module, batch: CaptionBatch) -> tuple[Tensor, dict[str, float]]:
        ids = torch.cat([batch.captions, batch.negatives])
        own = (embed(m, batch.images), embed(m, ids=ids))
        terms = {"contrast": pair_loss(m, *own)}
        if taught:
            teacher.to(ids.device)
            with torch.no_grad():
                wanted = (embed(teacher, batch.images), embed(teacher, ids=ids))
            if wanted[0].shape != own[0].shape and (aims.feature or aims.interactive):
                widths = f"{own[0].shape[-1]} and {wanted[0].shape[-1]} numbers"
                raise UserError(
                    f"distill: vectors of {widths}; features and interactive contrast need the same, affinity does not"
                )
            if aims.affinity:
                terms["affinity"] = affinity_loss(own, wanted, teacher.logit_scale.exp())
            if aims.feature:
                terms["feature"] = embedding_loss(own, wanted)
            if aims.interactive:
                terms["interactive"] = interactive_loss(teacher, own, wanted)
        return sum(getattr(aims, k) * v for k, v in terms.items()), {k: v.item() for k, v in terms.items()}

    if rows is None:
        if student.config.vision_config.image_size != IMAGE_SIZE:
            size = student.config.vision_config.image_size
            raise UserError(
                f"distill: the house captions come with pictures of {IMAGE_SIZE} px, this model takes {size}: give rows"
            )
        batches = caption_batches("student", course, student.processor.tokenizer)
    else:
        batches = RowPairs(student, rows, course)
    at = student.device  # the training may move it to a GPU
    teacher = None if teacher is None else clone(teacher).requires_grad_(False)
    return fit(model, batches, loss, replace(course, about=f"{aims} {trained}"), work).to(at)


class RowPairs(Sequence):
    """Rows (image, caption, negative) as batches for a model's own processor, over and over."""

    def __init__(self, model: nn.Module, rows: Any, course: TrainConfig):
        self.steps, self.made = course.steps, []
        if missing := {"image", "caption", "negative"} - set(rows.column_names):
            raise UserError(f"distill: the rows have no column {', '.join(sorted(missing))}; expected image, caption, negative")
        if not 1 <= course.batch <= len(rows):
            raise UserError(f"distill: {len(rows)} rows for batches of {course.batch}; give more rows, or a smaller batch")
        for i in range(0, len(rows) - course.batch + 1, course.batch):
            part = rows[i : i + course.batch]
            pictures = model.processor(images=[image.convert("RGB") for image in part["image"]], return_tensors="pt")
            true, wrong = (self._ids(model, part[k]) for k in ("caption", "negative"))
            nothing = torch.zeros(course.batch, 2, 0)
            self.made.append(CaptionBatch(pictures["pixel_values"], true, wrong, nothing, nothing[:, 0].any(-1)))

    def _ids(self, model: nn.Module, texts: list[str]) -> Tensor:
        longest = model.config.text_config.max_position_embeddings
        made = model.processor(text=texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        return made["input_ids"]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> CaptionBatch:
        return self.made[i % len(self.made)]
