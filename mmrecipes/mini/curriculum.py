"""Which batches of scenes each training of the book's models sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmrecipes.data.splits import STUDENT_FIRST
from mmrecipes.train.loop import TrainConfig
from mmrecipes.train.objectives import RowBatches

if TYPE_CHECKING:
    pass


def training_batches(model: nn.Module, course: TrainConfig, rows: Any = None) -> tuple[Sequence, Tensor | None]:
    """Batches for `right_answers`, and its `words`: the house model's lessons, never seen before, or `rows` over and over.

    `rows` may be lessons, too (`mini.batches.NovelBatches`)."""
    if hasattr(rows, "word_ids"):
        return rows, rows.word_ids
    if rows is not None:
        return RowBatches(model, rows, course), None
    from mmrecipes.mini.batches import ChatBatches

    first = STUDENT_FIRST * 16 // max(1, course.batch)
    batches = ChatBatches(first, first + course.steps, course.batch, model.processor.tokenizer)
    return batches, batches.word_ids


def image_batches(course: TrainConfig) -> Sequence:
    """The house model's pictures for `course`, never seen before; every other batch has much printed in it."""
    from mmrecipes.mini.batches import MANY, VisionBatches

    first = (STUDENT_FIRST - 10_000) * 16 // course.batch  # between those of recoveries and those of the lessons
    return VisionBatches(first, first + course.steps, course.batch, MANY, alternate=True)
