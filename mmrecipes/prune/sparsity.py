"""Zeros instead of weights: magnitude, Wanda and SparseGPT for any model's linear layers. Notebook 20 builds them by hand.

`sparsity`: the share of each layer that goes (0.5), or a pattern ("2:4": of each 4 inputs 2 remain), or {module's name: that}.
"""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import linears
from mmrecipes.models.prompts import Rows
from mmrecipes.quantize.calibration import calibrate
from mmrecipes.quantize.gptq import check_hessian, column_sweep, round_columns
from mmrecipes.quantize.groups import GROUP, fake_quantize, group_scales
from mmrecipes.quantize.rounding import changed, packed_weight_bytes

Sparsity = float | str
Sparsities = Sparsity | Mapping[str, Sparsity]
BLOCK = 128  # SparseGPT decides on so many inputs at once, as its authors do


def smallest(scores: Tensor, sparsity: Sparsity, each_row: bool = False) -> Tensor:
    """True where `scores` (out, in) are smallest: a share of all of them, or of each row; or by pattern, of each few inputs."""
    n = scores.shape[1]
    if isinstance(sparsity, str):
        keep, of = pattern(sparsity, n)
        rows, k = scores.reshape(-1, of), of - keep
    elif not 0 <= sparsity <= 1:
        raise UserError(f"prune: sparsity is {sparsity}; expected 0 to 1, or a pattern such as '2:4'")
    else:
        rows = scores if each_row else scores.reshape(1, -1)
        k = round(sparsity * rows.shape[1])
    if not torch.isfinite(rows).all():
        raise UserError("prune: the weight has entries that are not finite; mend the model first")
    gone = torch.zeros_like(rows, dtype=torch.bool)
    return gone.scatter_(1, rows.argsort(1)[:, :k], True).view(scores.shape)


def pattern(text: str, inputs: int) -> tuple[int, int]:
    """ "2:4" as (2, 4): of each 4 inputs 2 remain. UserError unless it is such a pair, and 4 divides `inputs`."""
    keep, _, of = text.partition(":")
    if not (keep.isdigit() and of.isdigit() and 0 < int(keep) < int(of)):
        raise UserError(f"prune: the pattern is {text!r}; expected 'n:m' with 0 < n < m, such as '2:4'")
    if inputs % int(of):
        raise UserError(f"prune: {inputs} inputs do not divide into groups of {of}; leave this layer out, or take a share")
    return int(keep), int(of)


def magnitude_prune(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """`weight` (out, in) with its smallest entries zero (LeCun et al. 1989, Han et al. 2015, arXiv:1506.02626)."""
    return weight.masked_fill(smallest(weight.abs(), sparsity), 0)


def wanda_prune(weight: Tensor, hessian: Tensor, sparsity: Sparsity) -> Tensor:
    """Wanda (arXiv:2306.11695): each row of `weight` (out, in) without the least |weight| x root mean square of its input."""
    check_hessian(weight, hessian)
    return weight.masked_fill(smallest(weight.abs() * hessian.diagonal().sqrt(), sparsity, each_row=True), 0)


def sparsegpt_prune(weight: Tensor, hessian: Tensor, sparsity: Sparsity, bits: int | None = None) -> Tensor:
    """`weight` (out, in) pruned by SparseGPT (arXiv:2301.00774). `hessian` is H (in, in).
    With `bits` (4 or 8), the weight was rounded in groups of 32 before: what remains stays on its quantization levels.
    """
    block = pattern(sparsity, weight.shape[1])[1] if isinstance(sparsity, str) else BLOCK
    gone = torch.zeros_like(weight, dtype=torch.bool)
    scale = group_scales(weight, bits) if bits else None

    def change(w: Tensor, i: int, factor: Tensor) -> Tensor:
        if i % block == 0:  # decided late, when the errors of the inputs before have arrived
            inputs = slice(i, i + block)
            gone[:, inputs] = smallest(w[:, inputs] ** 2 / factor.diagonal()[inputs] ** 2, sparsity)
        new = fake_quantize(w[:, i], scale[:, i // GROUP], bits) if bits else w[:, i]
        return new.masked_fill(gone[:, i], 0)

    return column_sweep(weight, hessian, change)


def round_rest(weight: Tensor, hessian: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """`quantize.gptq_round` for a pruned weight: its zeros stay zeros, and the rest compensates the error of rounding."""
    return column_sweep(weight, hessian, round_columns(weight, hessian.diagonal(), bits, group_size, weight == 0))


def magnitude(model: nn.Module, sparsity: Sparsities) -> nn.Module:
    """A copy with the smallest weights of each linear layer zero. Looks at no data."""
    return changed(model, named(model, sparsity), magnitude_prune)


def wanda(model: nn.Module, rows: Rows, sparsity: Sparsities, balance: bool = False) -> nn.Module:
    """A copy pruned by Wanda, block after block, each calibrated on `rows` behind the pruned ones (`quantize.calibrate`)."""
    return calibrate(model, rows, named(model, sparsity), lambda w, h, share, _: wanda_prune(w, h, share), balance=balance)


def sparsegpt(model: nn.Module, rows: Rows, sparsity: Sparsities, balance: bool = False) -> nn.Module:
    """A copy pruned by SparseGPT, block after block, each calibrated on `rows` behind the pruned ones."""
    return calibrate(model, rows, named(model, sparsity), lambda w, h, share, _: sparsegpt_prune(w, h, share), balance=balance)


def named(model: nn.Module, sparsity: Sparsities) -> dict[str, Sparsity]:
    """{module's name: sparsity}: for every linear layer, or as given. UserError when it names a module that is none."""
    every = [n for n, _ in linears(model)]
    if not isinstance(sparsity, Mapping):
        if sparsity == 1:  # one layer may lose all its weights, by one ranking for the model; not every layer
            raise UserError("prune: sparsity is 1, which leaves nothing; expected 0 <= sparsity < 1, or a pattern such as '2:4'")
        return dict.fromkeys(every, sparsity)
    if wrong := set(sparsity) - set(every):
        raise UserError(f"prune: {sorted(wrong)[0]!r} is no linear layer of this model; expected names such as {every[0]!r}")
    return dict(sparsity)


def global_shares(model: nn.Module, sparsity: float, hessians: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """{module's name: share of it that goes} when all linear weights are ranked together, by magnitude or Wanda (`hessians`)."""
    scores = {n: layer.weight.detach().abs() for n, layer in linears(model)}
    if hessians:  # {module's name: H}
        scores = {n: s * hessians[n].diagonal().sqrt() for n, s in scores.items() if n in hessians}
    gone = smallest(torch.cat([s.flatten() for s in scores.values()])[None], sparsity)[0]
    pieces = zip(scores, gone.split([s.numel() for s in scores.values()]), strict=True)
    return {n: piece.float().mean().item() for n, piece in pieces}


def sparsity_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each linear layer: {module's name: share}."""
    return {n: (layer.weight == 0).float().mean().item() for n, layer in linears(model)}


def only(rows: Rows, what: str) -> Rows:
    """Calibration rows of "text" alone, of the "picture" alone (no question, no answer), or "both"."""
    if what not in ("text", "picture", "both"):
        raise UserError(f"prune.only: {what!r}; expected 'text', 'picture' or 'both'")
    if what != "picture":
        return rows.remove_columns("image") if what == "text" else rows
    nothing = [""] * len(rows)
    return rows.remove_columns(["question", "answer"]).add_column("question", nothing).add_column("answer", nothing)


def sparse_bytes(model: nn.Module, bits: int = 16, group_size: int = 32) -> int:
    """Bytes with one bit a linear weight (is it there?) and those there in `bits` bits, if that is less; all else in 16 bits."""
    pruned, total = {id(layer.weight) for _, layer in linears(model)}, 0
    for p in model.parameters():
        dense = packed_weight_bytes(p, bits if id(p) in pruned else 16, "group", group_size)
        saved = int((p == 0).sum()) * bits // 8 - -(-p.numel() // 8) if id(p) in pruned else 0
        total += dense - max(saved, 0)
    return total


def zipped_bytes(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of all weights in `dtype` after zip's compression (deflate), which finds zeros by itself."""
    tensors = (p.detach().to(dtype).flatten().view(torch.uint8).numpy() for p in model.parameters())
    return sum(len(zlib.compress(t.tobytes())) for t in tensors)
