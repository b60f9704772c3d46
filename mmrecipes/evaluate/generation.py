"""Generated answers and how many of them are right; logits of the right answers, finer than accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmrecipes import quiet
from mmrecipes.data.datasets import majority_floor
from mmrecipes.evaluate.statistics import Share, wilson
from mmrecipes.inference.exported import Exported
from mmrecipes.models.prompts import Rows, batch_inputs, chat_prompts, greedy, rows_at_once, teacher_forced


@dataclass(frozen=True)
class Result:
    """What `vqa` found: accuracy overall and per family, majority floors, the answers, and which were right."""

    overall: Share
    families: dict[str, Share]
    floors: dict[str, float]
    predictions: list[str] = field(repr=False)
    right: list[bool] = field(repr=False)


@torch.inference_mode()
def answer_tokens(
    model: nn.Module, images: Sequence, questions: Sequence, batch_size: int = 50, max_new_tokens: int = 8, progress: bool = True
) -> list[list[int]]:
    """Token ids of greedy answers, at most `max_new_tokens` each, the end of sequence included where the model stopped.
    `progress` shows a bar, unless bars are switched off. Raises as `models.prompts.greedy`."""
    texts, stop, found = chat_prompts(model.processor, questions), eos_token_ids(model), []
    hidden, batch_size = quiet.progress_hidden() or not progress, rows_at_once(model, {"image": images}, batch_size)
    for i in tqdm(range(0, len(texts), batch_size), disable=hidden, desc="answering", leave=False):
        inputs = batch_inputs(model, images[i : i + batch_size], texts[i : i + batch_size])
        for answer in greedy(model, inputs, max_new_tokens).tolist():
            end = next((k + 1 for k, token in enumerate(answer) if token in stop), len(answer))
            found.append(answer[:end])
    return found


def eos_token_ids(model: nn.Module) -> set[int]:
    """The token ids at which the model stops.
    >>> eos_token_ids(model) == {model.processor.tokenizer.eos_token_id}
    True
    """
    stop = model.generation_config.eos_token_id
    stop = model.config.get_text_config().eos_token_id if stop is None else stop
    return {stop} if isinstance(stop, int) else set(stop or ())


def answers(
    model: nn.Module | Exported, images: Sequence, questions: Sequence, batch_size=50, max_new_tokens=8, progress=True
) -> list[str]:
    """Answers, greedy, in batches, without special tokens; an exported model answers one question after the other.
    Raises ParityError when the model's logits are not finite: such a model is broken, not lossy.
    >>> answers(model, rows["image"][:2], rows["question"][:2]) == rows["answer"][:2]
    True
    """
    if isinstance(model, nn.Module):
        found = answer_tokens(model, images, questions, batch_size, max_new_tokens, progress)
        return [model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
    hidden = quiet.progress_hidden() or not progress
    asked = tqdm(list(zip(images, questions, strict=True)), disable=hidden, desc="answering", leave=False)
    return [model.generate(image, question, max_new_tokens) for image, question in asked]


def vqa(model: nn.Module | Exported, rows: Rows, batch_size: int = 50, progress: bool = True) -> Result:
    """Accuracy on `rows` (image, question, answer, family), exact match of the generated answer, case ignored.
    >>> vqa(model, rows).overall.n
    4
    """
    predictions = answers(model, rows["image"][:], rows["question"][:], batch_size, progress=progress)
    return score(predictions, rows["answer"][:], rows["family"][:], majority_floor(rows))


def score(predictions: Sequence[str], wanted: Sequence[str], families: Sequence[str], floors: dict[str, float]) -> Result:
    """`vqa` without the model: score given predictions. All three sequences have one entry a question.
    >>> score(["Red", "2"], ["red", "3"], ["colour", "count"], {}).overall.value
    0.5
    """
    right = [p.lower() == w.lower() for p, w in zip(predictions, wanted, strict=True)]
    per = {f: [r for r, g in zip(right, families, strict=True) if g == f] for f in sorted(set(families))}
    shares = {f: wilson(sum(rs), len(rs)) for f, rs in per.items()}
    return Result(wilson(sum(right), len(right)), shares, floors, list(predictions), right)


@torch.inference_mode()
def answer_logits(model: nn.Module, rows: Rows, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    """Logits (T, V), float32, before each token of the right answers, teacher-forced; and those tokens (T,).
    >>> answer_logits(model, rows)[0].dtype
    torch.float32
    """
    logits, tokens = [], []
    for inputs, lengths in teacher_forced(model, rows, rows_at_once(model, rows, batch_size)):
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
    return nn.functional.kl_div(logits, reference, log_target=True, reduction="batchmean").item()
