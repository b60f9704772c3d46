"""A short training after pruning: the loss of the right answers, alone or beside a teacher that shows what it would have said.

Notebooks 20 and 21 use it. With a teacher this is knowledge distillation (Hinton et al. 2015, arXiv:1503.02531), its features
included (FitNets, arXiv:1412.6550; for cut language models: Minitron, arXiv:2407.14679).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmrecipes.distill.kd import LABELS_ONLY, LossWeights, StudentWithProjections, distillation_loss
from mmrecipes.models.modules import clone, config_of, linears
from mmrecipes.train.loop import TrainConfig, fit


def recover(
    model: nn.Module, batches: Sequence[Any], config: TrainConfig, teacher: nn.Module | None = None, work: Path | None = None
) -> nn.Module:
    """A trained copy of `model`, which was cut from `teacher`; without one it learns from the right answers alone.

    Zeros of linear layers stay zeros, so that a pruned model stays pruned. Features are compared where no width was cut.
    `batches` bring their own `answer_loss`: `train.RowBatches` for any VLM, the book's own from `mini.curriculum`. With a
    folder `work` it is resumable. Raises UserError as `train.fit` does.
    """
    student, weights = clone(model).requires_grad_(True), LABELS_ONLY
    if teacher is not None:  # frozen: it only shows, and computes no gradients
        teacher = clone(teacher).requires_grad_(False)
        same = {p: config_of(student, p).hidden_size == config_of(teacher, p).hidden_size for p in ("vision", "language")}
        weights = LossWeights(hidden=float(same["language"]), vision=float(same["vision"]))
    masks = {layer.weight: layer.weight != 0 for _, layer in linears(student) if (layer.weight == 0).any()}
    hooks = [weight.register_hook(lambda grad, weight=weight: grad * masks[weight].to(grad.device)) for weight in masks]

    @torch.no_grad()
    def keep_zeros() -> None:  # masked gradients are not enough: Muon's orthogonal updates would bring the weights back
        for weight, mask in masks.items():
            weight.mul_(mask.to(weight.device))

    projected = StudentWithProjections(student, teacher or student, learned=False)
    loss = distillation_loss(teacher, weights, batches.answer_loss)
    fit(projected, batches, loss, replace(config, about=repr(weights)), work, after_step=keep_zeros)
    for hook in hooks:
        hook.remove()
    return student.to(model.device).eval()
