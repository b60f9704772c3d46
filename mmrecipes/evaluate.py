"""Does it still answer right? Accuracy with intervals, paired comparisons, agreement with a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrecipes import checks
from mmrecipes.errors import ParityError, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BatchFeature

    from mmrecipes.exported import Exported


@dataclass(frozen=True)
class Share:
    """A proportion with its 95% Wilson interval. `value`, `low`, `high` in [0, 1]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}] n={self.n}"


@dataclass(frozen=True)
class Result:
    """What `vqa` found: accuracy overall and per family, majority floors, the answers, and which were right."""

    overall: Share
    families: dict[str, Share]
    floors: dict[str, float]
    predictions: list[str] = field(repr=False)
    right: list[bool] = field(repr=False)


@dataclass(frozen=True)
class Paired:
    """Two variants on the same questions. `points` = 100 x (accuracy of b - accuracy of a), with a 95% bootstrap interval."""

    points: float
    low: float
    high: float
    lost: int  # a right, b wrong
    won: int  # a wrong, b right
    p_value: float  # McNemar, exact
    n: int

    def __str__(self) -> str:
        interval = f"{self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{interval}, {self.lost} lost, {self.won} won, p={self.p_value:.2g}"


def wilson(right: int, n: int, z: float = 1.96) -> Share:
    """The proportion `right / n` with its 95% interval (Wilson 1927), which stays inside [0, 1] near the ends."""
    if n < 1 or not 0 <= right <= n:
        raise UserError(f"wilson: {right} right of {n}; expected 0 <= right <= n and n >= 1")
    p, zz = right / n, z * z
    centre, half = (p + zz / (2 * n)) / (1 + zz / n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return Share(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)  # p = 0 or 1: no rounding past it


def questions_needed(points: float, accuracy: float = 0.95, flips: float | None = None) -> int:
    """How many questions tell a loss of `points` (out of 100) from nothing, at 95% confidence and 80% power.

    Unpaired, two samples of `n` questions each; with `flips` (share of questions on which the two variants differ), paired.
    """
    d = points / 100
    variance = 2 * accuracy * (1 - accuracy) if flips is None else flips - d * d
    return math.ceil((1.96 + 0.84) ** 2 * variance / (d * d))


def answers(
    model: torch.nn.Module | Exported,
    images: Sequence,
    questions: Sequence[str],
    batch_size: int = 50,
    max_new_tokens: int = 8,
    progress: bool | None = None,
) -> list[str]:
    """Answers from `generate()`, greedy, in batches. `model.processor` is used; `progress=None` shows a bar to people only.

    An exported model (`load_exported`) answers one question after the other.
    Raises ParityError when the model's output on the first batch is not finite: such a model is broken, not lossy.
    """
    from tqdm.auto import tqdm

    processor, found = model.processor, []
    processor.tokenizer.padding_side = "left"  # generation continues at the right end
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{}"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    if progress is None:
        progress = not checks.quiet()
    if not isinstance(model, torch.nn.Module):
        asked = tqdm(list(zip(images, questions, strict=True)), disable=not progress, desc="answering", leave=False)
        return [model.generate(image, question, max_new_tokens) for image, question in asked]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for i in tqdm(range(0, len(questions), batch_size), disable=not progress, desc="answering", leave=False):
        batch = [[image.convert("RGB")] for image in images[i : i + batch_size]]
        texts = [prompt.replace("{}", q) for q in questions[i : i + batch_size]]
        inputs = processor(images=batch, text=texts, padding=True, return_tensors="pt").to(model.device, dtype)
        with torch.inference_mode():
            if i == 0 and not torch.isfinite(model(**inputs).logits).all():
                raise ParityError("the model's logits are not finite: it is broken, not lossy; check the step that made it")
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return found


def vqa(model: torch.nn.Module | Exported, rows: Dataset, batch_size: int = 50, progress: bool | None = None) -> Result:
    """Accuracy on `rows` (image, question, answer, family), exact match of the generated answer, case ignored."""
    from mmrecipes.data import majority_floor

    predictions = answers(model, rows["image"][:], rows["question"][:], batch_size, progress=progress)
    return score(predictions, rows["answer"][:], rows["family"][:], majority_floor(rows))


def score(predictions: Sequence[str], wanted: Sequence[str], families: Sequence[str], floors: dict[str, float]) -> Result:
    """`vqa` without the model: score given predictions. All three sequences have one entry a question."""
    right = [p.lower() == w.lower() for p, w in zip(predictions, wanted, strict=True)]
    per = {f: [r for r, g in zip(right, families, strict=True) if g == f] for f in sorted(set(families))}
    shares = {f: wilson(sum(rs), len(rs)) for f, rs in per.items()}
    return Result(wilson(sum(right), len(right)), shares, floors, list(predictions), right)


def paired(a: Sequence[bool], b: Sequence[bool], seed: int = 0) -> Paired:
    """Compare two variants question by question: McNemar's exact test and a bootstrap over questions (10,000 draws)."""
    if len(a) != len(b) or not len(a):
        raise UserError(f"paired: {len(a)} and {len(b)} results; both variants must answer the same questions, at least one")
    gap = np.asarray(b, dtype=int) - np.asarray(a, dtype=int)
    lost, won, n = int((gap < 0).sum()), int((gap > 0).sum()), len(gap)
    # drawing n questions with replacement is drawing how many fall in each of the three outcomes
    draws = np.random.default_rng(seed).multinomial(n, [lost / n, won / n, 1 - (lost + won) / n], size=10_000)
    low, high = np.percentile(100 * (draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5])
    flips = lost + won
    tail = sum(math.comb(flips, k) for k in range(min(lost, won) + 1)) / 2**flips if flips else 1.0
    return Paired(100 * float(gap.mean()), float(low), float(high), lost, won, min(1.0, 2 * tail), n)


def agreement(predictions: Sequence[str], reference: Sequence[str]) -> Share:
    """Share of questions on which two models give the same answer: the measure when there are no labels."""
    return wilson(sum(p == r for p, r in zip(predictions, reference, strict=True)), len(reference))


def teacher_forced(model: torch.nn.Module, rows: Dataset, batch_size: int = 50) -> Iterator[tuple[BatchFeature, list[int]]]:
    """Batches of `rows` (image, question, answer) as the model's inputs, each prompt followed by its answer.

    With each batch, how many tokens each answer has: with their end, they are the last ones of their row. Rows without a
    column `image` become prompts of text alone.
    """
    processor = model.processor
    processor.tokenizer.padding_side = "left"
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    seen = "image" in rows.column_names
    content = [*([{"type": "image"}] if seen else []), {"type": "text", "text": "{}"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    eos = processor.tokenizer.eos_token
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        tails = [f" {a}{eos}" for a in part["answer"]]
        texts = [prompt.replace("{}", q) + t for q, t in zip(part["question"], tails, strict=True)]
        pictures = {"images": [[image.convert("RGB")] for image in part["image"]]} if seen else {}
        inputs = processor(**pictures, text=texts, padding=True, return_tensors="pt").to(model.device, dtype)
        yield inputs, [len(processor.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in tails]


@torch.inference_mode()
def answer_logits(model: torch.nn.Module, rows: Dataset, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    """Logits (T, V), float32, before each token of the right answers, teacher-forced; and those tokens (T,)."""
    logits, tokens = [], []
    for inputs, lengths in teacher_forced(model, rows, batch_size):
        found = model(**inputs, logits_to_keep=max(lengths) + 1).logits.float()
        for row, k in enumerate(lengths):
            logits.append(found[row, -k - 1 : -1])
            tokens.append(inputs["input_ids"][row, -k:])
    return torch.cat(logits), torch.cat(tokens)


def answer_loss(model: torch.nn.Module, rows: Dataset, batch_size: int = 50) -> float:
    """Mean cross-entropy (nats) of the right answers' tokens, teacher-forced. Quicker and finer than accuracy: for sweeps."""
    return torch.nn.functional.cross_entropy(*answer_logits(model, rows, batch_size)).item()


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence (nats a token) of `logits` (T, V) from those of a reference model: needs no labels."""
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
