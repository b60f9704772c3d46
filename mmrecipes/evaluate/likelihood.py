"""Logits of the right answers, teacher-forced, and their divergence from a reference model's: finer than accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmrecipes.models.prompts import teacher_forced

if TYPE_CHECKING:
    from datasets import Dataset


@torch.inference_mode()
def answer_logits(model: torch.nn.Module, rows: Dataset, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    """Logits (T, V), float32, before each token of the right answers, teacher-forced; and those tokens (T,).
    >>> logits, tokens = answer_logits(model, rows)
    >>> bool((logits.argmax(-1) == tokens).float().mean() > 0.5)
    True
    """
    logits, tokens = [], []
    for inputs, lengths in teacher_forced(model, rows, batch_size):
        found = model(**inputs, logits_to_keep=max(lengths) + 1).logits.float()
        for row, k in enumerate(lengths):
            logits.append(found[row, -k - 1 : -1])
            tokens.append(inputs["input_ids"][row, -k:])
    return torch.cat(logits), torch.cat(tokens)


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence (nats a token) of `logits` (T, V) from those of a reference model: needs no labels.
    >>> divergence(torch.zeros(2, 5), torch.ones(2, 5))
    0.0
    """
    logits, reference = logits.log_softmax(-1), reference.log_softmax(-1)
    return torch.nn.functional.kl_div(logits, reference, log_target=True, reduction="batchmean").item()
