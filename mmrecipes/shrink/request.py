"""What was asked of `shrink`, and the evaluator that says how much a candidate loses."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mmrecipes.errors import UserError, require
from mmrecipes.evaluate import generation
from mmrecipes.export import pipeline
from mmrecipes.inference.exported import Exported
from mmrecipes.models.prompts import Rows
from mmrecipes.models.saving import check_replaceable
from mmrecipes.shrink import fidelity
from mmrecipes.shrink.fidelity import Loss
from mmrecipes.shrink.source import budget_bytes

RUNTIMES = (*pipeline.BACKENDS, "torch")
MAX_LOSS = {"accuracy": 1.0, "agreement": 5.0}  # points; another token is often as good, so more of these may differ


@dataclass(frozen=True)
class Request:
    """What was asked for. `budget` is "0.25x" of the float32 weights, or "80MB"; `max_loss` is in points (None: MAX_LOSS).

    Each stage may take about `stage_seconds`: it works on fewer rows where a model is slow.
    """

    model: str
    out: Path
    runtime: str = "onnx"
    budget: str | None = None
    max_loss: float | None = None
    calib: Path | None = None
    images: Path | None = None
    n: int | None = None
    stage_seconds: float = 120.0


def check_request(request: Request) -> None:
    """UserError for what can be seen to be wrong before the model is read."""
    if request.runtime not in RUNTIMES:
        raise UserError(f"--runtime {request.runtime!r}: expected one of {', '.join(RUNTIMES)}")
    if request.budget is not None:
        budget_bytes(request.budget, 1)
    if request.max_loss is not None and not 0 <= request.max_loss <= 100:
        raise UserError(f"--max-loss {request.max_loss:g}: expected points between 0 and 100, such as 1.0")
    if request.runtime == "torch":
        require("accelerate", "bitsandbytes")
    check_replaceable(request.out)


@dataclass(frozen=True)
class Evaluator:
    """Rows, and how the original answers them. With labels that it knows accuracy counts, else agreement of tokens."""

    rows: Rows
    tokens: list[list[int]]
    answers: list[str]
    right: list[bool] | None  # None: without labels

    @property
    def measure(self) -> str:
        """Which of the two counts."""
        return "agreement" if self.right is None else "accuracy"

    def loss(self, model: nn.Module | Exported) -> tuple[Loss, list[str] | list[list[bool]]]:
        """What `model` loses, and its answers; without labels which tokens agree."""
        if self.right is None:
            same = fidelity.token_agreement(model, self.rows, self.tokens)
            return fidelity.agreement_loss(same, self.rows["name"]), same
        images, questions = self.rows["image"][:], self.rows["question"][:]
        answers = generation.answers(model, images, questions, batch_size=8, max_new_tokens=fidelity.MAX_ANSWER_TOKENS)
        return fidelity.accuracy_loss(self.right, fidelity.right(answers, self.rows["answer"])), answers


def make_evaluator(base: nn.Module, rows: Rows, labelled: bool | None = None) -> Evaluator:
    """How `base` answers `rows`. Labels count if it knows them (`fidelity.knows`), or as `labelled` says."""
    tokens = fidelity.greedy_tokens(base, rows)
    answers = [base.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    right = fidelity.right(answers, rows["answer"]) if "answer" in rows.column_names and labelled is not False else None
    if right is not None and labelled is None and not fidelity.knows(right, rows["answer"]):
        right = None
    return Evaluator(rows, tokens, answers, right)
