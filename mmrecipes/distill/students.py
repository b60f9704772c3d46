"""A student cut from its teacher, or made from nothing in the same shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import clone
from mmrecipes.prune import importance, slicing, structured

PROJECTION = {"vision": "visual_projection", "language": "text_projection"}  # CLIP's last matrices stand beside its towers


def make_dual_student(teacher: nn.Module, layers: Mapping[str, Sequence[int]], columns: Mapping[str, int]) -> nn.Module:
    """A student of the teacher's class with only its `layers` of "vision" and "language", and `columns` in their FFNs.

    Weights are inherited (TinyCLIP, arXiv:2309.12314): the layers as they are, of the columns those with the largest weights.
    The width stays, so both speak of the same space from the first step. Raises UserError for what the teacher does not have.
    """
    student = teacher
    for part, keep in layers.items():
        student = structured.keep_layers(student, part, keep)
    thin, config = clone(student), copy.deepcopy(student.config)
    for part, count in columns.items():
        own = modules.config_of(config, part)
        if not 0 < count <= own.intermediate_size:
            raise UserError(f"smaller: {count} columns in the {part} FFNs; expected 1 to {own.intermediate_size}")
        for mlp in [m for m in modules.parts(thin)[part].modules() if hasattr(m, "fc1") and hasattr(m, "fc2")]:
            size = mlp.fc1.weight.square().sum(1) + mlp.fc2.weight.square().sum(0)  # the pooling head has an FFN, too
            structured.keep_channels_([mlp.fc1], [mlp.fc2], size.topk(count).indices.sort().values.tolist())
        own.intermediate_size = count
    return modules.checkpoint_with_config(thin, config)


SLICE = {"vision": slicing.slice_vision, "language": slicing.slice_language}


# ---- the student


@dataclass(frozen=True)
class StudentSize:
    """How large a part of the student is: which of the teacher's `layers` it takes, its width and its FFNs' columns."""

    layers: tuple[int, ...]
    width: int
    columns: int


def make_student(
    teacher: nn.Module, sizes: Mapping[str, StudentSize], rows: Any, inherit: bool = True, seed: int = 0
) -> nn.Module:
    """A student of the teacher's class, with `sizes` of "vision" and "language".

    With `inherit` it takes from the teacher what matters most: principal directions of the embeddings (`slicing`, fitted on
    calibration `rows`), and the columns with the largest weights. Without, it has the same shape and random weights.
    Raises UserError for sizes that do not fit the teacher.
    """
    student = teacher
    for part, size in sizes.items():
        own = modules.config_of(student, part)
        if not 0 < size.columns <= own.intermediate_size:
            raise UserError(f"smaller: {size.columns} columns in the {part} FFNs; expected 1 to {own.intermediate_size}")
        if size.width != own.hidden_size:
            student = SLICE[part](student, size.width, rows)
        scores = importance.magnitude_importance(student)[part]["neurons"]
        # the vision tower's FFNs are fitted anew, the language model's not, where that costs answers (notebook 21)
        fitted = rows if part == "vision" else None
        student = structured.keep_ffn_neurons(student, {part: importance.strongest(scores, size.columns)}, fitted)
    for part, size in sizes.items():  # last: what flows by is measured with all of them
        student = structured.keep_layers(student, part, size.layers)
    if not inherit:
        torch.manual_seed(seed)
        fresh = type(student)(copy.deepcopy(student.config)).eval()
        fresh.generation_config, fresh.processor = student.generation_config, student.processor
        student = fresh.to(student.device, student.dtype)
    return student
