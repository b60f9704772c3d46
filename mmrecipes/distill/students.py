"""A student cut from its teacher, or made from nothing in the same shape."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import checkpoint_with_config, clone, config_of, ffn, layers, parts
from mmrecipes.prune import importance, slicing, structured

PROJECTION = {"vision": "visual_projection", "language": "text_projection"}  # CLIP's last matrices stand beside its encoders
SLICE = {"vision": slicing.slice_vision, "language": slicing.slice_language}


@dataclass(frozen=True)
class StudentSize:
    """How large a part of the student is: which of the teacher's `layers` it takes, its width, and the neurons of its FFNs."""

    layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int


def make_student(teacher: nn.Module, sizes: dict[str, StudentSize], rows: Any, inherit: bool = True, seed: int = 0) -> nn.Module:
    """A student of the teacher's class, with `sizes` of "vision" and "language"; UserError where they do not fit the teacher.
    With `inherit` it gets the principal directions of the hidden states (SliceGPT, fitted on calibration `rows`) and the FFN
    neurons with the largest weights; without, random weights of the same shapes.
    """
    student = teacher
    for part, size in sizes.items():
        own = config_of(student, part)
        _check_neurons(part, size.intermediate_size, ffn(layers(student)[part][0])[1].in_features)
        if size.hidden_size != own.hidden_size:
            student = SLICE[part](student, size.hidden_size, rows)
        scores = importance.magnitude_importance(student)[part]["neurons"]
        # the vision encoder's FFNs are fitted anew, the language model's not, where that costs answers (notebook 21)
        fitted = rows if part == "vision" else None
        student = structured.keep_ffn_neurons(student, {part: importance.strongest(scores, size.intermediate_size)}, fitted)
    for part, size in sizes.items():  # last: the hidden states are measured with all layers
        student = structured.keep_layers(student, part, size.layers)
    if inherit:
        return student
    torch.manual_seed(seed)
    blank = type(student)(copy.deepcopy(student.config)).eval()
    blank.generation_config, blank.processor = student.generation_config, student.processor
    return blank.to(student.device, student.dtype)


def make_dual_student(teacher: nn.Module, layers: dict[str, Sequence[int]], intermediate_sizes: dict[str, int]) -> nn.Module:
    """A student with only the teacher's `layers` of "vision" and "language", and so many neurons in their FFNs.
    Weights are inherited (TinyCLIP, arXiv:2309.12314), of the neurons those with the largest; the width stays. UserError for
    what the teacher lacks.
    """
    student = teacher
    for part, keep in layers.items():
        student = structured.keep_layers(student, part, keep)
    student, config = clone(student), copy.deepcopy(student.config)
    for part, count in intermediate_sizes.items():
        own = config_of(config, part)
        _check_neurons(part, count, own.intermediate_size)
        for mlp in [m for m in parts(student)[part].modules() if hasattr(m, "fc1") and hasattr(m, "fc2")]:
            structured.keep_largest_([mlp.fc1, mlp.fc2], count)  # the pooling head has an FFN, too
        own.intermediate_size = count
    return checkpoint_with_config(student, config)


def _check_neurons(part: str, count: int, most: int) -> None:
    if not 0 < count <= most:
        raise UserError(f"student: intermediate size {count} of {part}; expected 1 to {most}")
