"""Narrower models: the embeddings' principal directions kept, the others sliced off (SliceGPT, arXiv:2401.15024).

A norm that only rescales does not care how its space is turned. So turn it until the first directions hold most of what flows
there, and cut the rest off: every matrix gets smaller, and no head is lost. Notebook 30 builds it by hand.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import attention, checkpoint_with_config, clone, config_of, ffn, layers
from mmrecipes.prune.structured import keep_channels_

if TYPE_CHECKING:
    from datasets import Dataset

NORMS = {"language": ("input_layernorm", "post_attention_layernorm"), "vision": ("layer_norm1", "layer_norm2")}


LAST = {"language": "norm", "vision": "post_layernorm"}


@torch.no_grad()
def directions(model: nn.Module, part: str, rows: Dataset, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Principal directions (D, D) of what flows by in `part`, strongest first, a column each; and their shares of it, (D,).

    Of all that its norms get to see on `rows` (image, question, answer), each vector scaled to the same length, as they do.
    """
    from mmrecipes.models.prompts import teacher_forced

    width = config_of(model, part).hidden_size
    total = torch.zeros(width, width, dtype=torch.float64)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        x = x - x.mean(-1, keepdim=True) if part == "vision" else x  # LayerNorm takes the mean away, RMSNorm does not
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        total.add_((x.T @ x).cpu())

    hooks = [norm.register_forward_pre_hook(see) for norm in _norms(model, part)]
    try:
        for inputs, _ in teacher_forced(model, rows, batch_size):
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    shares, found = torch.linalg.eigh(total)  # rising
    return found.flip(1).float(), (shares.flip(0) / shares.sum()).float()


def _norms(model: nn.Module, part: str) -> list[nn.Module]:
    core, stack = modules.parts(model)[part], layers(model)[part]
    names, last = NORMS[part], getattr(core, LAST[part], None)
    if last is None or any(not hasattr(stack[0], n) for n in names):
        raise UserError(f"{type(core).__name__}: no {', '.join(names)} and {LAST[part]} in it; its width cannot be sliced")
    return [*(getattr(layer, n) for layer in stack for n in names), last]


@torch.no_grad()
def slice_language(model: nn.Module, width: int, rows: Dataset) -> nn.Module:
    """A copy whose language model has `width` channels, of all heads and columns as many as before.

    The head gets words of its own: the last norm's weights go into them. Raises UserError for a width that is none, and for a
    language model without RMSNorms of the usual names.
    """
    whole = config_of(model, "language").hidden_size
    _check(model, width, whole, 2)
    if "Gemma" in type(_norms(model, "language")[0]).__name__:
        raise UserError("slice_language: Gemma's norms scale by one more than their weights; expected Llama's")
    turn = directions(model, "language", rows)[0][:, :width]
    thin, config = clone(model), copy.deepcopy(model.config)
    core, found = modules.parts(thin)["language"], modules.parts(thin)
    grow = (whole / width) ** 0.5  # the norm now divides by the root mean square of fewer channels
    for layer in layers(thin)["language"]:
        *into, out = attention(layer)
        up, down = ffn(layer)
        for norm, readers in ((layer.input_layernorm, into), (layer.post_attention_layernorm, up)):
            for m in readers:
                m.weight = nn.Parameter((m.weight * norm.weight) @ turn * grow)
            norm.weight = nn.Parameter(torch.ones(width))
        for m in (out, down):
            m.weight = nn.Parameter(turn.T @ m.weight)
    words = thin.get_input_embeddings()
    found["head"].weight = nn.Parameter((found["head"].weight * core.norm.weight) @ turn * grow)
    core.norm.weight = nn.Parameter(torch.ones(width))
    words.weight = nn.Parameter(words.weight @ turn)
    joined = [m for m in found["connector"].modules() if isinstance(m, nn.Linear)]
    for before, after in itertools.pairwise(joined):  # LLaVA's has a hidden width, and it is the language model's
        size = before.weight.square().sum(1) + after.weight.square().sum(0)
        keep_channels_([before], [after], size.topk(width).indices.sort().values.tolist())
    last = joined[-1]
    last.weight = nn.Parameter(turn.T @ last.weight)
    if last.bias is not None:
        last.bias = nn.Parameter(turn.T @ last.bias)
    own = config_of(config, "language")
    own.head_dim, own.hidden_size = getattr(own, "head_dim", None) or whole // own.num_attention_heads, width
    config.tie_word_embeddings = own.tie_word_embeddings = False
    return checkpoint_with_config(thin, config)


@torch.no_grad()
def slice_vision(model: nn.Module, width: int, rows: Dataset) -> nn.Module:
    """A copy whose vision tower has `width` channels, in as many heads as before, each of fewer channels.

    LayerNorm takes the mean away, so one of the new directions has to stay empty: that in which all channels are equal. Heads
    are narrowed by the best approximation of low rank to what they compute: queries with keys, and values with outputs.
    Raises UserError for a width that heads do not divide, and for a tower that is not SigLIP's.
    """
    own, found = config_of(model, "vision"), modules.parts(model)
    whole, heads = own.hidden_size, own.num_attention_heads
    _check(model, width, whole, heads)
    first, seen = next(m for m in found["connector"].modules() if isinstance(m, nn.Linear)), found["vision"]
    places = getattr(getattr(seen, "embeddings", seen), "position_embedding", None)
    if (
        places is None or hasattr(seen.embeddings, "class_embedding") or first.bias is not None
    ):  # CLIP has more norms, and no bias
        raise UserError(
            f"slice_vision: {type(seen).__name__} with {type(first).__name__}; expected SigLIP's tower, as in Idefics3"
        )
    if first.in_features != whole:
        raise UserError(
            f"slice_vision: the connector reads {first.in_features} channels at once; expected {whole}, no pixel shuffle"
        )
    ones = torch.ones(width, 1)
    even = torch.linalg.qr(torch.cat([ones, torch.eye(width)[:, 1:]], 1)).Q[:, 1:]  # (width, width - 1), at right angles to ones
    turn = directions(model, "vision", rows)[0][:, : width - 1] @ even.T  # (whole, width)
    thin, config = clone(model), copy.deepcopy(model.config)
    core = modules.parts(thin)["vision"]
    grow = (whole / width) ** 0.5
    for layer in layers(thin)["vision"]:
        query, key, value, out = attention(layer)
        (up,), down = ffn(layer)
        for norm, readers in ((layer.layer_norm1, (query, key, value)), (layer.layer_norm2, (up,))):
            for m in readers:
                m.bias = nn.Parameter(m.bias + m.weight @ norm.bias)
                m.weight = nn.Parameter((m.weight * norm.weight) @ turn * grow)
            _plain_norm_(norm, width)
        for m in (out, down):
            m.weight, m.bias = nn.Parameter(turn.T @ m.weight), nn.Parameter(turn.T @ m.bias)
        _narrow_heads_(query, key, value, out, heads, width // heads)
    seen = core.embeddings
    seen.patch_embedding.weight = nn.Parameter(torch.einsum("dw,d...->w...", turn, seen.patch_embedding.weight))
    seen.patch_embedding.bias = nn.Parameter(turn.T @ seen.patch_embedding.bias)
    seen.position_embedding.weight = nn.Parameter(seen.position_embedding.weight @ turn)
    first = next(m for m in modules.parts(thin)["connector"].modules() if isinstance(m, nn.Linear))
    shift = first.weight @ core.post_layernorm.bias
    first.weight = nn.Parameter((first.weight * core.post_layernorm.weight) @ turn * grow)
    _plain_norm_(core.post_layernorm, width)
    core.post_layernorm.bias = nn.Parameter(torch.linalg.lstsq(first.weight, shift, driver="gelsd").solution)  # no bias there
    config_of(config, "vision").hidden_size = width
    return checkpoint_with_config(thin, config)


def _plain_norm_(norm: nn.LayerNorm, width: int) -> None:
    norm.weight, norm.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))


def _narrow_heads_(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, heads: int, size: int) -> None:
    """Every head's channels down to `size`. A key's bias is the same for all tokens, so softmax does not see it; a value's
    bias reaches the output whole, because attention adds up to one."""
    old = query.out_features // heads
    new: dict[nn.Linear, list[Tensor]] = {m: [] for m in (query, key, value, out)}
    biases = []
    out.bias = nn.Parameter(out.bias + out.weight @ value.bias)
    for h in range(heads):
        at = slice(h * old, (h + 1) * old)
        asked = torch.cat([query.weight[at], query.bias[at, None]], 1)  # (old, width + 1)
        left, right = _factor(asked.T @ key.weight[at], size)  # (width + 1, size), (size, width)
        left = left * (size / old) ** 0.5  # attention divides by the root of a head's channels
        new[query].append(left[:-1].T)
        biases.append(left[-1])
        new[key].append(right)
        left, right = _factor(out.weight[:, at] @ value.weight[at], size)
        new[out].append(left)
        new[value].append(right)
    for m, parts in new.items():
        m.weight = nn.Parameter(torch.cat(parts, int(m is out)).contiguous())
    query.bias = nn.Parameter(torch.cat(biases))
    key.bias, value.bias = (nn.Parameter(torch.zeros(heads * size)) for _ in range(2))


def _factor(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices of `rank` whose product is closest to `product` (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]


def _check(model: nn.Module, width: int, whole: int, of: int) -> None:
    weight = next(model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UserError(f"slicing: the model is {weight.dtype} on {weight.device}; slice it in float32 on the CPU, then move it")
    if not 0 < width <= whole or width % of:
        raise UserError(f"slicing: width {width}; expected a multiple of {of} up to {whole}")


def kept(shares: Tensor, widths: Sequence[int]) -> dict[int, float]:
    """How much of what flows by the first so many directions hold: {width: share}."""
    return {w: shares[:w].sum().item() for w in widths}
