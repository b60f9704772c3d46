"""What a model is trained on for right answers: batches of rows, and the cross-entropy of their answer tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.prompts import teacher_forced

if TYPE_CHECKING:
    from mmrecipes.train.loop import TrainConfig


class RowBatches(Sequence):
    """Rows (image, question, answer) as batches for a model's own processor, over and over: dicts with "answers" (B, T).

    Without a column `image` they are text alone. Raises UserError for fewer rows than a batch.
    """

    def __init__(self, model: nn.Module, rows: Any, config: TrainConfig):
        whole = len(rows) - len(rows) % max(1, config.batch)
        if not whole or config.batch < 1:
            raise UserError(f"train: {len(rows)} rows for batches of {config.batch}; give more rows, or a smaller batch")
        self.steps, self.made = config.steps, []
        for inputs, lengths in teacher_forced(model, rows.select(range(whole)), config.batch):
            answers = torch.full_like(inputs["input_ids"], -100)
            for row, k in enumerate(lengths):
                answers[row, -k:] = inputs["input_ids"][row, -k:]
            self.made.append({**inputs, "answers": answers})

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.made[i % len(self.made)]

    @staticmethod
    def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, float]]:
        """Mean cross-entropy of the right answers' tokens, in nats; how many they are; nothing else to log."""
        inputs = {k: v for k, v in batch.items() if k != "answers"}
        keep = int((batch["answers"] >= 0).sum(-1).max()) + 1  # the answers end their rows
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
        answers = batch["answers"][:, -keep + 1 :]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), answers.flatten(), ignore_index=-100)
        return loss, int((answers >= 0).sum()), {}
