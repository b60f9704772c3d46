"""What was asked of `shrink`, and the evaluator that says how much a candidate loses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from mmrecipes.evaluate import fidelity, generation
from mmrecipes.evaluate.fidelity import Loss
from mmrecipes.export import pipeline

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.inference.exported import Exported

RUNTIMES = (*pipeline.PRECISIONS, "torch")


MAX_LOSS = {"accuracy": 1.0, "agreement": 5.0}  # points that may be lost; words that differ are often as good, so more of these


STAGE_SECONDS = 120.0  # seconds that each stage may take: it works on fewer rows where a model is slow


@dataclass(frozen=True)
class Request:
    """What was asked for. `budget` is "0.25x" of the float32 weights, or "80MB"; `max_loss` is in points (None: MOST)."""

    model: str
    out: Path
    runtime: str = "onnx"
    budget: str | None = None
    max_loss: float | None = None
    calib: Path | None = None
    images: Path | None = None
    n: int | None = None


# ---- how it compares


@dataclass(frozen=True)
class Evaluator:
    """Rows, and what the original says to them: labels where it knows them, else its own words."""

    rows: Dataset
    words: list[list[int]]
    said: list[str]
    right: list[bool] | None  # None: without labels

    def loss(self, model: nn.Module | Exported) -> tuple[Loss, list[str] | list[list[bool]]]:
        """What `model` loses, and its answers; without labels which tokens agree."""
        if self.right is None:
            same = fidelity.token_agreement(model, self.rows, self.words)
            return fidelity.agreement_loss(same, self.rows["name"]), same
        asked = self.rows["image"][:], self.rows["question"][:]
        answers = generation.answers(model, *asked, batch_size=8, max_new_tokens=fidelity.MAX_ANSWER_TOKENS)
        return fidelity.accuracy_loss(self.right, fidelity.right(answers, self.rows["answer"])), answers


def make_evaluator(base: nn.Module, rows: Dataset, labelled: bool | None = None) -> Evaluator:
    """How `base` answers `rows`. Labels count if it knows them (`evaluate.knows`), or as `labelled` says."""
    words = fidelity.greedy_tokens(base, rows)
    said = [base.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in words]
    right = fidelity.right(said, rows["answer"]) if "answer" in rows.column_names else None
    if right is not None and not (fidelity.knows(right, rows["answer"]) if labelled is None else labelled):
        right = None
    return Evaluator(rows, words, said, right if labelled is not False else None)
