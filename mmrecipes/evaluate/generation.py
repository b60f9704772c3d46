"""Does it still answer right? Accuracy with intervals, paired comparisons, agreement with a reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mmrecipes import quiet
from mmrecipes.errors import ParityError
from mmrecipes.evaluate.statistics import Share, wilson

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.inference.exported import Exported


@dataclass(frozen=True)
class Result:
    """What `vqa` found: accuracy overall and per family, majority floors, the answers, and which were right."""

    overall: Share
    families: dict[str, Share]
    floors: dict[str, float]
    predictions: list[str] = field(repr=False)
    right: list[bool] = field(repr=False)


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
        progress = not quiet.progress_hidden()
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
    from mmrecipes.data.datasets import majority_floor

    predictions = answers(model, rows["image"][:], rows["question"][:], batch_size, progress=progress)
    return score(predictions, rows["answer"][:], rows["family"][:], majority_floor(rows))


def score(predictions: Sequence[str], wanted: Sequence[str], families: Sequence[str], floors: dict[str, float]) -> Result:
    """`vqa` without the model: score given predictions. All three sequences have one entry a question."""
    right = [p.lower() == w.lower() for p, w in zip(predictions, wanted, strict=True)]
    per = {f: [r for r, g in zip(right, families, strict=True) if g == f] for f in sorted(set(families))}
    shares = {f: wilson(sum(rs), len(rs)) for f, rs in per.items()}
    return Result(wilson(sum(right), len(right)), shares, floors, list(predictions), right)
