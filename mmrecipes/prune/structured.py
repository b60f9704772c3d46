"""Less model: FFN columns, attention heads, whole layers and embedding width cut out, and saved as a plain smaller checkpoint.

Each cut takes a model and returns a smaller copy of the same class, whose config says its new sizes. Built by hand in notebook
21; `mmrecipes.importance` says what counts least, `mmrecipes.recovery` trains what is left.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models import modules
from mmrecipes.models.modules import attention, checkpoint_with_config, clone, config_of, ffn, head_dim, layers

if TYPE_CHECKING:
    from datasets import Dataset


def keep_layers(model: nn.Module, part: str, keep: Sequence[int]) -> nn.Module:
    """A copy with only the layers `keep` (in rising order) of "vision" or "language". Raises UserError for other indices."""
    count = len(layers(model)[part])
    if not len(keep) or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise UserError(f"keep_layers: {list(keep)} of {count} {part} layers; give rising indices below {count}, at least one")
    thin = clone(model)
    stack, config = layers(thin)[part], copy.deepcopy(model.config)
    for i, layer in enumerate([stack[k] for k in keep]):
        stack[i] = layer
    del stack[len(keep) :]
    own = config_of(config, part)
    own.num_hidden_layers = len(keep)
    if getattr(own, "layer_types", None):
        own.layer_types = [own.layer_types[k] for k in keep]
    return checkpoint_with_config(thin, config)


@torch.no_grad()
def keep_ffn_neurons(model: nn.Module, keep: Mapping[str, Sequence[Sequence[int]]], rows: Dataset | None = None) -> nn.Module:
    """A copy whose FFNs keep only the columns `keep` {part: a list of indices for each layer, all of one length}.

    With calibration `rows` the matrix out of each FFN is fitted anew, by least squares, so that what is left makes up for what
    is gone.
    """
    thin, config = clone(model), copy.deepcopy(model.config)
    for part, lists in keep.items():
        if len({len(columns) for columns in lists}) != 1:
            raise UserError(f"keep_columns: {[len(c) for c in lists]} columns in the {part} layers; config.json has one number")
    _refit_(thin, {ffn(lr)[1]: c for part, lists in keep.items() for lr, c in zip(layers(thin)[part], lists, strict=True)}, rows)
    for part, lists in keep.items():
        for layer, columns in zip(layers(thin)[part], lists, strict=True):
            into, out = ffn(layer)
            keep_channels_(into, [out], columns)
        config_of(config, part).intermediate_size = len(lists[0])
    return checkpoint_with_config(thin, config)


@torch.no_grad()
def keep_heads(model: nn.Module, keep: Sequence[Sequence[int]], rows: Dataset | None = None) -> nn.Module:
    """A copy whose language layers keep only the query heads `keep`, a list for each layer; with `rows` as in `keep_columns`.

    Where several query heads share a key and value head (grouped-query attention), each group keeps as many, or goes whole.
    Raises UserError for other choices. A ViT's config ties heads to width: see `keep_width`.
    """
    thin, config, size = clone(model), copy.deepcopy(model.config), head_dim(model, "language")
    own, shapes, chosen = config_of(config, "language"), set(), []
    shared = own.num_attention_heads // own.num_key_value_heads
    for heads in keep:
        groups = [h // shared for h in heads]
        left = sorted(set(groups))
        shapes.add((len(left), *{groups.count(g) for g in left}))
        chosen.append((_channels(heads, size), _channels(left, size)))
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise UserError(
            f"keep_heads: {list(keep)} of {own.num_attention_heads} heads, {shared} to a key head; keep as many of "
            "each key head that stays, the same number in every layer"
        )
    stack = layers(thin)["language"]
    _refit_(thin, {attention(layer)[3]: c[0] for layer, c in zip(stack, chosen, strict=True)}, rows)
    for layer, (queries, keys) in zip(stack, chosen, strict=True):
        q, k, v, out = attention(layer)
        keep_channels_([q], [out], queries)
        keep_channels_([k, v], [], keys)
    groups, each = next(iter(shapes))
    own.head_dim, own.num_attention_heads, own.num_key_value_heads = size, groups * each, groups
    return checkpoint_with_config(thin, config)


@torch.no_grad()
def keep_hidden_channels(model: nn.Module, part: str, channels: Sequence[int], heads: Sequence[Sequence[int]] = ()) -> nn.Module:
    """A copy whose embeddings in `part` keep only `channels`: words, positions, norms, every layer, and what joins them.

    In a vision tower the config ties heads to width, so each layer keeps `heads` (as many, of as many channels), too. The
    connector of Idefics3 reads s x s neighbouring patches at once (pixel shuffle): it loses a channel s x s times.
    """
    thin, config, size = clone(model), copy.deepcopy(model.config), head_dim(model, part)
    own, found, keep = config_of(config, part), modules.parts(thin), list(channels)
    whole, joined = own.hidden_size, [m for m in found["connector"].modules() if isinstance(m, nn.Linear)]
    if part == "vision" and {len(h) * size for h in heads} != {len(keep)}:
        raise UserError(f"keep_width: {len(keep)} channels with {[len(h) for h in heads]} heads of {size}; they must agree")
    inner = {m for layer in layers(thin)[part] for m in (*ffn(layer)[0], ffn(layer)[1], *attention(layer))}
    for layer, left in zip(layers(thin)[part], heads or [None] * len(layers(thin)[part]), strict=True):
        *into, out = attention(layer)
        if left is not None:
            keep_channels_(into, [out], _channels(left, size))
        keep_channels_([out, ffn(layer)[1]], [*into, *ffn(layer)[0]], keep)
    for module in found[part].modules():
        if module in inner or any(module is m for m in found["connector"].modules()):
            continue
        for name, p in list(module.named_parameters(recurse=False)):
            at = p.ndim - 1 if isinstance(module, nn.Embedding) else 0
            if p.shape[at] == whole:
                setattr(module, name, nn.Parameter(p.index_select(at, torch.tensor(keep))))
    if part == "vision":
        spread = joined[0].in_features // whole
        keep_channels_([], joined[:1], [block * whole + c for block in range(spread) for c in keep])
        own.num_attention_heads = len(heads[0])
    else:
        for before, after in itertools.pairwise(joined):  # LLaVA's has a hidden width, and it is the language model's
            size_of = before.weight.square().sum(1) + after.weight.square().sum(0)
            keep_channels_([before], [after], size_of.topk(len(keep)).indices.tolist())
        keep_channels_(joined[-1:], [], keep)
        words = thin.get_input_embeddings().weight  # cut above; a head that was tied to it still has its old width
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        found["head"].weight = words if tied else nn.Parameter(found["head"].weight[:, keep])
        own.head_dim = size
    own.hidden_size = len(keep)
    return checkpoint_with_config(thin, config)


def _channels(heads: Sequence[int], size: int) -> list[int]:
    return [h * size + i for h in heads for i in range(size)]


def keep_channels_(rows_of: Sequence[nn.Linear], columns_of: Sequence[nn.Linear], keep: Sequence[int]) -> None:
    """Cut outputs of some matrices, and the inputs of others that read them, down to `keep`, in place, by torch-pruning."""
    import torch_pruning as tp

    for m in rows_of:
        tp.prune_linear_out_channels(m, sorted(set(range(m.out_features)) - set(keep)))
    for m in columns_of:
        tp.prune_linear_in_channels(m, sorted(set(range(m.in_features)) - set(keep)))


def _refit_(model: nn.Module, keep: Mapping[nn.Linear, Sequence[int]], rows: Dataset | None) -> None:
    from mmrecipes.quantize.calibration import input_hessians

    if rows is None:
        return
    names = {m: n for n, m in model.named_modules() if m in keep}
    h = input_hessians(model, rows, list(names.values()))
    for m, columns in keep.items():
        m.weight.copy_(refit(m.weight, h[names[m]], columns))


def refit(weight: Tensor, moments: Tensor, columns: Sequence[int]) -> Tensor:
    """The matrix (out, in), zero but for `columns`, whose output is closest to that of `weight`; `moments` is H (in, in)."""
    kept = moments[columns][:, columns].clone()
    kept.diagonal().add_(0.01 * kept.diagonal().mean() + 1e-8)  # H may be nearly singular
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = torch.linalg.solve(kept, moments[columns] @ weight.T).T
    return fitted
