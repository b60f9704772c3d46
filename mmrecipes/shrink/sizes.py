"""Budgets and predicted bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import block_of
from mmrecipes.quantize import mixed_precision, nf4
from mmrecipes.quantize.groups import GROUP

if TYPE_CHECKING:
    pass

UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


# ---- the budget and the bytes


def budget_bytes(text: str, whole: int) -> int:
    """Bytes of "0.25x" (of `whole`), "80MB", "1.5 GiB". UserError for anything else, and for shares of 1 and more."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(x|[kmg]?i?b)\s*", text, re.IGNORECASE)
    unit = found[2].lower() if found else ""
    if not found or unit not in {"x", *UNITS} or not float(found[1]):
        raise UserError(f"--budget {text!r}: expected a share of the float32 weights, such as 0.25x, or a size, such as 80MB")
    if unit == "x" and float(found[1]) >= 1:
        raise UserError(f"--budget {text!r}: the original is 1x; give a smaller share, such as 0.25x")
    return int(float(found[1]) * (whole if unit == "x" else UNITS[unit]))


def float_bytes(model: nn.Module) -> int:
    """Bytes of all weights in float32, tied ones once."""
    return 4 * sum(p.numel() for p in model.parameters())


def predicted_bytes(model: nn.Module, bits: Mapping[str, int], runtime: str) -> int:
    """Bytes of the files in which each unit has its `bits` (4, or 8; 16 for torch), before they are written."""
    words = model.get_input_embeddings()
    tied = getattr(model.get_output_embeddings(), "weight", None) is words.weight
    total = float_bytes(model) // (2 if runtime == "torch" else 1)
    for name, width in mixed_precision.bits_by_module(model, bits).items():
        module = model.get_submodule(name)
        plain = module.weight.numel() * (2 if runtime == "torch" else 4)
        total += _packed(name, module, width, runtime, 1 + (tied and module is words)) - plain
    if runtime == "openvino":  # whose 8 bits reach convolutions, too
        total -= sum(m.weight.numel() * 3 - 4 * len(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d))
    blocks = len({block_of(n) for n, _ in modules.linears(model)})
    # what describes the graph itself, a numbered block, as the exporters write it
    return total + blocks * {"openvino": 62_000, "onnx": 12_000}.get(runtime, 0)


def _packed(name: str, module: nn.Module, width: int, runtime: str, copies: int) -> int:
    weights, rows = module.weight.numel(), len(module.weight)
    if runtime == "torch":
        return nf4.nf4_bytes(module.weight) if width == 4 else 2 * weights
    grouped = weights * width // 8 + weights // GROUP * 4  # a float32 scale a group
    channels = weights + 5 * rows  # a scale and a zero a row
    if runtime == "executorch" and isinstance(module, nn.Embedding):  # only the head's copy is rounded
        return 4 * weights + (copies - 1) * (grouped if width == 4 else channels)
    if runtime != "onnx":
        return grouped if width == 4 else channels
    if width == 4:
        return grouped * copies
    if isinstance(module, nn.Embedding):  # to look up, and once more to multiply with
        return grouped + (copies - 1) * channels
    return grouped if any(last in name for last in ("down_proj", "fc2", "w2")) and "vision" not in name else channels
