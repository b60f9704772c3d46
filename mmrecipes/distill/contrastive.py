"""A smaller dual encoder, SigLIP or CLIP, that keeps images and texts aligned, by a teacher or by pairs alone (notebook 32)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.distill.losses import affinity_loss, embed, embedding_loss, interactive_loss, pair_loss
from mmrecipes.distill.students import PROJECTION
from mmrecipes.errors import UserError
from mmrecipes.models.modules import clone, parts
from mmrecipes.train.loop import Loss, TrainConfig, fit


@dataclass(frozen=True)
class ContrastiveWeights:
    """The weight of each loss; 0 leaves it out. All but `contrast` need a teacher."""

    contrast: float = 1.0  # true pairs together, all others apart
    affinity: float = 1.0  # every image resembles every text as much as it does for the teacher (TinyCLIP, arXiv:2309.12314)
    feature: float = 10.0  # the teacher's embeddings (CLIP-KD, arXiv:2307.12732)
    interactive: float = 1.0  # the student's images find the teacher's texts, and the other way round (CLIP-KD)

    @property
    def need_teacher(self) -> bool:
        return bool(self.affinity or self.feature or self.interactive)


CONTRAST_ONLY = ContrastiveWeights(affinity=0, feature=0, interactive=0)


def set_trainable(model: nn.Module, trainable: Mapping[str, str]) -> nn.Module:
    """A copy of a dual encoder in which of "vision" and "language", with their projections, only what `trainable` says learns.
    "all", "small" (norms and biases, so that rounded or zeroed matrices stay) or "nothing". UserError for other parts or shares.
    """
    model = clone(model).requires_grad_(True)
    for part, share in trainable.items():
        if share not in ("all", "small", "nothing") or part not in PROJECTION:
            raise UserError(f"set_trainable: {share!r} of {part!r}; expected all, small, nothing of vision or language")
        for module in (parts(model)[part], getattr(model, PROJECTION[part], None)):
            for p in module.parameters() if module is not None else ():
                p.requires_grad_(share == "all" or (share == "small" and p.ndim < 2))
    return model


def distill_dual(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Sequence[Any],
    config: TrainConfig,
    weights: ContrastiveWeights | None = None,
    work: Path | None = None,
) -> nn.Module:
    """A trained copy of `student`, of which those parameters learn that require gradients; without a teacher from pairs alone.
    `batches[i]` has `images` (B, 3, H, W), token ids `captions` (B, T) and `negatives` (B, T), false captions. On several
    processes SigLIP's loss compares with all texts, the others with this process's own. With a folder `work` it is resumable.
    Raises UserError for weights that need a teacher where there is none, for embeddings of another width, and as `train.fit`.
    """
    weights = weights or (CONTRAST_ONLY if teacher is None else ContrastiveWeights())
    if weights.need_teacher and teacher is None:
        raise UserError(f"distill_dual: {weights} needs a teacher; give one, or weights=CONTRAST_ONLY")
    model, device = clone(student), student.device  # the training may move it to a GPU
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("distill_dual: nothing in the student requires a gradient; say what learns with set_trainable")
    teacher = None if teacher is None else clone(teacher).requires_grad_(False)
    config = replace(config, about=f"{weights}, {sum(trained)} parameters in {len(trained)} tensors")
    return fit(model, batches, contrastive_loss(teacher, weights), config, work).to(device)


def contrastive_loss(teacher: nn.Module | None, weights: ContrastiveWeights) -> Loss:
    """The loss of a dual encoder on a batch of images, captions and negatives, for `train.fit`."""

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        ids = torch.cat([batch.captions, batch.negatives])
        own = (embed(model, batch.images), embed(model, ids=ids))
        terms = {"contrast": pair_loss(model, *own)}
        if weights.need_teacher:
            teacher.to(ids.device)
            with torch.no_grad():
                wanted = (embed(teacher, batch.images), embed(teacher, ids=ids))
            if wanted[0].shape != own[0].shape and (weights.feature or weights.interactive):
                sizes = f"{own[0].shape[-1]} and {wanted[0].shape[-1]} numbers"
                raise UserError(f"distill_dual: embeddings of {sizes}; feature and interactive need the same, affinity does not")
        if weights.affinity:
            terms["affinity"] = affinity_loss(own, wanted, teacher.logit_scale.exp())
        if weights.feature:
            terms["feature"] = embedding_loss(own, wanted)
        if weights.interactive:
            terms["interactive"] = interactive_loss(teacher, own, wanted)
        return sum(getattr(weights, k) * v for k, v in terms.items()), {k: v.item() for k, v in terms.items()}

    return loss
