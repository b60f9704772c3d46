"""LoRA: large matrices stay as they are, and two thin ones beside each learn (Hu et al. 2021, arXiv:2106.09685), by peft.

On plain, pruned and 4-bit models alike.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrecipes import models
from mmrecipes.distill import material, right_answers
from mmrecipes.errors import ParityError, UserError
from mmrecipes.fit import Course, fit
from mmrecipes.quantize import clone, linears

if TYPE_CHECKING:
    from peft import PeftModel

PARTS = ("vision", "connector", "language")


def adapted(model: nn.Module, rank: int = 8, alpha: float | None = None, parts: Sequence[str] = PARTS) -> PeftModel:
    """A copy of `model` with an adapter of `rank` beside every linear layer of `parts`; nothing else requires a gradient.

    It computes what `model` does until it is trained, since half of each adapter begins as zeros. `alpha` / rank scales what the
    adapters add; alpha is twice the rank by default. `.get_base_model()` is the model with its adapters inside, and
    `.save_pretrained` writes these alone. Raises UserError for a rank below 1 and for parts that the model does not have.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("peft is not installed; get it with: pip install 'mmrecipes[train]'")
    from peft import LoraConfig, get_peft_model

    base = clone(model)
    found = models.parts(base)
    if rank < 1 or not parts or set(parts) - set(found):
        raise UserError(f"adapted: rank {rank} in {', '.join(parts) or 'nothing'}; expected 1 or more, in {', '.join(found)}")
    inside = {id(m) for part in parts for m in found[part].modules()}
    names = [name for name, layer in linears(base) if id(layer) in inside]
    with warnings.catch_warnings():  # peft asks transformers for an attribute by the name it had before 5.0
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=names))


def learn(model: PeftModel, course: Course, rows: Any = None, work: Path | None = None) -> PeftModel:
    """`model` with its adapters trained on right answers, in place: those of the house model's lessons, or of `rows`.

    `rows` (image, question, answer) are gone through over and over; that takes any VLM. `course.adam_lr` is the rate. Resumable
    with `work`. Raises UserError as `fit.fit` does.
    """
    base = model.get_base_model()
    batches, words = material(base, course, rows)

    def loss(m: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        right, _, logs = right_answers(m.get_base_model(), batch, words)
        return right, logs | {"answers": right.item()}

    at = base.device  # the training may move it to a GPU
    return fit(model, batches, loss, course, work, about="lora").to(at).eval()


@torch.no_grad()
def merged(model: PeftModel) -> nn.Module:
    """A plain copy of the model with its adapters added to its matrices: no slower than it was, and zeros are zeros no more.

    A 4-bit matrix is taken back to floats first, and rounded again after. Raises ParityError when the sum is not finite.
    """
    plain = clone(model).merge_and_unload()
    for name, p in plain.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ParityError(f"merged: {name} is not finite; train with a lower rate")
    return plain.eval()
