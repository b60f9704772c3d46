"""How a compressed model's answers compare with the original's: accuracy on labels, or agreement token by token without."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mmrecipes import quiet
from mmrecipes.errors import ParityError
from mmrecipes.evaluate import generation
from mmrecipes.evaluate.statistics import Paired, Share, clustered, paired, wilson
from mmrecipes.inference.exported import Exported
from mmrecipes.models.prompts import Rows, chat

MAX_ANSWER_TOKENS = 12
FEW = 5  # images
# what changes the likeliest token besides the model itself, and what leaves it alone: compared without, on both sides
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0, "min_new_tokens": None}
NEUTRAL |= dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "sequence_bias"))


@dataclass(frozen=True)
class Loss:
    """What a candidate lost against the original, in points of accuracy or of agreement, with a 95% interval."""

    measure: str  # "accuracy" or "agreement"
    points: float
    low: float
    high: float
    n: int
    share: Share  # the candidate's accuracy or agreement
    paired: Paired | None = None

    def __str__(self) -> str:
        return f"{self.points:.1f} points of {self.measure} [{self.low:.1f}, {self.high:.1f}], n={self.n}"


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
            same = token_agreement(model, self.rows, self.tokens)
            return agreement_loss(same, self.rows["name"]), same
        given = answers(model, self.rows)
        return accuracy_loss(self.right, right(given, self.rows["answer"])), given


def make_evaluator(base: nn.Module, rows: Rows, labelled: bool | None = None) -> Evaluator:
    """How `base` answers `rows`. Labels count if it `knows` them, or as `labelled` says."""
    tokens = greedy_tokens(base, rows)
    answers = [base.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    correct = right(answers, rows["answer"]) if "answer" in rows.column_names and labelled is not False else None
    if correct is not None and labelled is None and not knows(correct, rows["answer"]):
        correct = None
    return Evaluator(rows, tokens, answers, correct)


def with_answers(model: nn.Module, rows: Rows) -> Rows:
    """`rows` with the model's own answers in the place of labels."""
    kept = rows.remove_columns("answer") if "answer" in rows.column_names else rows
    return kept.add_column("answer", answers(model, rows))


def answers(model: nn.Module | Exported, rows: Rows) -> list[str]:
    """The text of `greedy_tokens`, without special tokens."""
    tokenizer = model.processor.tokenizer
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in greedy_tokens(model, rows)]


def greedy_tokens(model: nn.Module | Exported, rows: Rows) -> list[list[int]]:
    """Token ids of the model's own greedy answers, at most MAX_ANSWER_TOKENS each, the end of sequence included; without a
    penalty on repetition and other settings of generation (NEUTRAL)."""
    if isinstance(model, nn.Module):
        with plain_generation(model):
            return generation.answer_tokens(model, rows["image"][:], rows["question"][:], 8, MAX_ANSWER_TOKENS)
    asked = zip(rows["image"], rows["question"], strict=True)
    bar = tqdm(asked, total=len(rows), disable=quiet.progress_hidden(), desc="answering", leave=False)
    return [_exported_tokens(model, image, question) for image, question in bar]


def settings(model: nn.Module) -> dict[str, object]:
    """What of the model's generation settings is not neutral, but for sampling, which greedy answers have not."""
    config = model.generation_config
    found = {name: getattr(config, name, None) for name in NEUTRAL}
    return {name: value for name, value in found.items() if value not in (None, NEUTRAL[name])}


@contextlib.contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Meanwhile `model` generates by its likeliest tokens alone."""
    found = settings(model)
    for name in found:
        setattr(model.generation_config, name, NEUTRAL[name])
    try:
        yield
    finally:
        for name, value in found.items():
            setattr(model.generation_config, name, value)


def token_agreement(model: nn.Module | Exported, rows: Rows, wanted: Sequence[list[int]]) -> list[list[bool]]:
    """For each token of `wanted`, the original's answers: is it the model's likeliest, given the same tokens before?"""
    choose = _choices if isinstance(model, nn.Module) else _exported_choices
    asked = zip(rows["image"], rows["question"], wanted, strict=True)
    bar = tqdm(asked, total=len(rows), disable=quiet.progress_hidden(), desc="comparing", leave=False)
    return [[a == b for a, b in zip(choose(model, image, question, ids), ids, strict=True)] for image, question, ids in bar]


@torch.inference_mode()
def _choices(model: nn.Module, image, question: str, ids: list[int]) -> list[int]:
    inputs = dict(chat(model, image, question))
    shape, more = inputs["input_ids"].shape, torch.tensor([ids[:-1]], dtype=torch.int64, device=model.device)
    for name, value in inputs.items():  # the mask, and kinds of token where a model wants them, grow with the text
        if getattr(value, "shape", None) == shape:
            fill = torch.ones_like(more) if name == "attention_mask" else torch.zeros_like(more)
            inputs[name] = torch.cat([value, more if name == "input_ids" else fill.to(value.dtype)], 1)
    return model(**inputs).logits[0, shape[1] - 1 :].argmax(-1).tolist()


def _exported_tokens(model: Exported, image, question: str) -> list[int]:
    logits, found = model.prefill(model.inputs(image, question)), []
    while len(found) < MAX_ANSWER_TOKENS:
        found.append(finite_choice(logits))
        if found[-1] in model.manifest["eos_token_ids"]:
            break
        logits = model.graphs.step(np.array([found[-1:]]))
    return found


def finite_choice(logits: np.ndarray) -> int:
    """The likeliest token of `logits` (V). ParityError where they are not finite."""
    if not np.isfinite(logits).all():
        raise ParityError("the exported model's logits are not finite: it is broken, not lossy")
    return int(logits.argmax())


def _exported_choices(model: Exported, image, question: str, ids: list[int]) -> list[int]:
    first = model.prefill(model.inputs(image, question))
    return [finite_choice(logits) for logits in (first, *(model.graphs.step(np.array([[token]])) for token in ids[:-1]))]


def right(predictions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Exact match; case and a full stop at the end do not count."""
    plain = [[text.strip().rstrip(".!").lower() for text in texts] for texts in (predictions, answers)]
    return [p == a for p, a in zip(*plain, strict=True)]


def knows(correct: Sequence[bool], answers: Sequence[str]) -> bool:
    """Whether a model's share of right answers can show a loss: half of them, and more than the commonest answer would get."""
    floor = Counter(a.lower() for a in answers).most_common(1)[0][1] / len(answers)
    share = wilson(sum(correct), len(correct))
    return share.value >= 0.5 and share.low > floor


def accuracy_loss(before: Sequence[bool], after: Sequence[bool]) -> Loss:
    """Points of accuracy that were lost on the same questions."""
    pair = paired(before, after)
    if not pair.lost + pair.won:  # drawing again from questions without a change shows none: what so few cannot rule out
        most = 100 * wilson(0, pair.n).high
        pair = dataclasses.replace(pair, low=-most, high=most)
    return Loss("accuracy", 0 - pair.points, 0 - pair.high, 0 - pair.low, pair.n, wilson(sum(after), len(after)), pair)


def agreement_loss(same: Sequence[Sequence[bool]], clusters: Sequence[str]) -> Loss:
    """100 less the percentage of tokens that agree. Tokens of one image are alike: the interval goes by images."""
    hits, totals = Counter(), Counter()
    for tokens, cluster in zip(same, clusters, strict=True):
        hits[cluster] += sum(tokens)
        totals[cluster] += len(tokens)
    share = clustered(list(hits.values()), list(totals.values()))
    if len(hits) < FEW:  # how far so few images differ says little about others: each counts as one draw at most
        alone = wilson(share.value * len(hits), len(hits))
        share = dataclasses.replace(share, low=min(share.low, alone.low), high=max(share.high, alone.high))
    return Loss("agreement", *(100 - 100 * v for v in (share.value, share.high, share.low)), share.n, share)
