"""What a model is trained on for right answers: batches of rows, and the cross-entropy of their answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.train.loop import TrainConfig

if TYPE_CHECKING:
    pass


def answer_loss(model: nn.Module, batch: Any, words: Tensor | None) -> tuple[Tensor, int, dict[str, float]]:
    """Cross-entropy of the right answers' tokens, how many they are, and for lessons (`words`: their word ids) what is right."""
    if words is not None:
        from mmrecipes.mini import losses

        loss, logs = losses.answer_loss(model, batch, words, 0.1)
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

    def __init__(self, model: nn.Module, rows: Any, course: TrainConfig):
        from mmrecipes.models.prompts import teacher_forced

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
