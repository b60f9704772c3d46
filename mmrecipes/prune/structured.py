"""FFN neurons, heads, layers and hidden channels cut out: copies of the same class with a smaller config (notebook 21)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import attention, checkpoint_with_config, clone, config_of, ffn, head_dim, layers, parts
from mmrecipes.models.prompts import Rows
from mmrecipes.quantize.calibration import input_hessians

# FFNs besides the layers whose width the config ties to theirs: Idefics2, MiniCPM-V 4.6
TIED = {"language": ("connector", "modality_projection"), "vision": ("vision", "vit_merger")}


def keep_layers(model: nn.Module, part: str, keep: Sequence[int]) -> nn.Module:
    """A copy with only the layers `keep` (in rising order) of "vision" or "language". Raises UserError for other indices."""
    count = len(layers(model)[part])
    if not len(keep) or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < count:
        raise UserError(f"keep_layers: {list(keep)} of {count} {part} layers; give rising indices below {count}, at least one")
    small, config = clone(model), copy.deepcopy(model.config)
    stack, sizes = layers(small)[part], config_of(config, part)
    for i in sorted(set(range(count)) - set(keep), reverse=True):
        del stack[i]
    sizes.num_hidden_layers = len(keep)
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = [sizes.layer_types[k] for k in keep]
    return checkpoint_with_config(small, config)


@torch.no_grad()
def keep_ffn_neurons(model: nn.Module, keep: Mapping[str, Sequence[Sequence[int]]], rows: Rows | None = None) -> nn.Module:
    """A copy whose FFNs keep only the neurons `keep` {part: a list of indices for each layer, all of one length}.
    With calibration `rows`, `refit` lets what is left compensate what is gone. Raises UserError for lists of several lengths, and
    a number that the config cannot say.
    """
    small, config = clone(model), copy.deepcopy(model.config)
    neurons: dict[nn.Module, Sequence[int]] = {}  # {layer: those it keeps}
    for part, lists in keep.items():
        if len(counts := {len(kept) for kept in lists}) != 1:
            raise UserError(f"keep_ffn_neurons: {sorted(counts)} neurons in the {part} layers; config.json has one number")
        if len(lists) != (depth := len(layers(small)[part])):
            raise UserError(f"keep_ffn_neurons: {len(lists)} lists for the {depth} {part} layers; give one a layer")
        neurons |= zip(layers(small)[part], lists, strict=True)
        set_ffn_width(config_of(config, part), len(lists[0]))
        if tied := tied_ffn(small, part):
            into, out = ffn(tied)
            width = ffn(layers(small)[part][0])[1].in_features
            neurons[tied] = _largest(into, out, out.in_features * len(lists[0]) // width)
    _refit_(small, {ffn(layer)[1]: kept for layer, kept in neurons.items()}, rows)
    for layer, kept in neurons.items():
        into, out = ffn(layer)
        keep_channels_(into, [out], kept)
    return checkpoint_with_config(small, config)


def tied_ffn(model: nn.Module, part: str) -> nn.Module | None:
    """The module besides the layers whose FFN the config ties to theirs in width, if `part` has one."""
    owner, name = TIED[part]
    module = getattr(parts(model).get(owner), name, None)
    return module if hasattr(module, "down_proj") or hasattr(module, "linear_2") else None


def set_ffn_width(config: object, width: int) -> None:
    """Write how many FFN neurons the layers have into a part's config. UserError where it cannot say that number."""
    name = next((n for n in ("ffn_dim", "intermediate_size", "mlp_ratio") if hasattr(config, n)), None)
    if name is None:
        raise UserError(f"{type(config).__name__}: no number of FFN neurons in it; they cannot be cut")
    if name == "mlp_ratio":  # Qwen2-VL's vision encoder
        if width % config.embed_dim:
            least = f"{type(config).__name__} has a whole ratio to the hidden size"
            raise UserError(f"{width} FFN neurons: {least}; keep a multiple of {config.embed_dim}")
        width //= config.embed_dim
    setattr(config, name, width)


@torch.no_grad()
def keep_heads(model: nn.Module, keep: Sequence[Sequence[int]], rows: Rows | None = None) -> nn.Module:
    """A copy whose language layers keep only the query heads `keep`, a list for each layer; `rows` as in `keep_ffn_neurons`.
    Of query heads that share a key and value head, each group keeps as many, or goes whole: UserError for other choices.
    """
    small, config, size = clone(model), copy.deepcopy(model.config), head_dim(model, "language")
    sizes, shapes, chosen = config_of(config, "language"), set(), []
    shared = sizes.num_attention_heads // sizes.num_key_value_heads
    for heads in keep:
        groups = [h // shared for h in heads]
        left = sorted(set(groups))
        shapes.add((len(left), *{groups.count(g) for g in left}))
        chosen.append((_channels(heads, size), _channels(left, size)))
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        given = f"{list(keep)} of {sizes.num_attention_heads} heads, {shared} to a key head"
        raise UserError(f"keep_heads: {given}; keep as many of each key head that stays, the same number in every layer")
    projections = [attention(layer) for layer in layers(small)["language"]]
    _refit_(small, {out: queries for (*_, out), (queries, _) in zip(projections, chosen, strict=True)}, rows)
    for (q, k, v, out), (queries, keys) in zip(projections, chosen, strict=True):
        keep_channels_([q], [out], queries)
        keep_channels_([k, v], [], keys)
    groups, each = next(iter(shapes))
    sizes.head_dim, sizes.num_attention_heads, sizes.num_key_value_heads = size, groups * each, groups
    return checkpoint_with_config(small, config)


@torch.no_grad()
def keep_hidden_channels(model: nn.Module, part: str, channels: Sequence[int], heads: Sequence[Sequence[int]] = ()) -> nn.Module:
    """A copy whose hidden states in `part` keep only `channels`: embeddings, norms, every layer, and the connector.
    A vision encoder's config ties heads to the hidden size: each layer keeps as many channels in `heads`. Idefics3's connector
    reads s x s patches at once and loses a channel s x s times. UserError when heads and channels do not agree.
    """
    small, config, size = clone(model), copy.deepcopy(model.config), head_dim(model, part)
    sizes, modules, keep = config_of(config, part), parts(small), list(channels)
    if part == "vision" and {len(h) * size for h in heads} != {len(keep)}:
        raise UserError(f"keep_hidden_channels: {len(keep)} channels, {[len(h) for h in heads]} heads of {size}; they must agree")
    stack, done = layers(small)[part], set(modules["connector"].modules())
    for layer, left in zip(stack, heads or [None] * len(stack), strict=True):
        (*into, out), (up, down) = attention(layer), ffn(layer)
        if left is not None:
            keep_channels_(into, [out], _channels(left, size))
        keep_channels_([out, down], [*into, *up], keep)
        done |= {*into, out, *up, down}
    for module in set(modules[part].modules()) - done:
        for name, p in list(module.named_parameters(recurse=False)):
            axis = p.ndim - 1 if isinstance(module, nn.Embedding) else 0
            if p.shape[axis] == sizes.hidden_size:
                setattr(module, name, nn.Parameter(p.index_select(axis, torch.tensor(keep))))
    connector = [m for m in modules["connector"].modules() if isinstance(m, nn.Linear)]
    if part == "vision":
        patches = connector[0].in_features // sizes.hidden_size
        keep_channels_([], connector[:1], [patch * sizes.hidden_size + c for patch in range(patches) for c in keep])
        sizes.num_attention_heads = len(heads[0])
    else:
        keep_largest_(connector, len(keep))  # LLaVA's is as wide as the language model
        keep_channels_(connector[-1:], [], keep)
        embeddings = small.get_input_embeddings().weight  # cut above; a head that was tied to it still has its old size
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        modules["head"].weight = embeddings if tied else nn.Parameter(modules["head"].weight[:, keep])
        sizes.head_dim = size
    sizes.hidden_size = len(keep)
    return checkpoint_with_config(small, config)


def _channels(heads: Sequence[int], size: int) -> list[int]:
    return [h * size + i for h in heads for i in range(size)]


def keep_largest_(linears: Sequence[nn.Linear], size: int) -> None:
    """Between each two matrices that follow one another (of an FFN, a connector) keep the `size` channels of largest weights."""
    for before, after in itertools.pairwise(linears):
        keep_channels_([before], [after], _largest([before], after, size))


def _largest(into: Sequence[nn.Linear], out: nn.Linear, size: int) -> list[int]:
    weights = sum(m.weight.square().sum(1) for m in into) + out.weight.square().sum(0)
    return weights.topk(size).indices.sort().values.tolist()


def keep_channels_(rows_of: Sequence[nn.Linear], columns_of: Sequence[nn.Linear], keep: Sequence[int]) -> None:
    """Cut outputs of some matrices, and the inputs of others that read them, down to `keep`, in place, by torch-pruning."""
    import torch_pruning as tp

    for m in rows_of:
        tp.prune_linear_out_channels(m, sorted(set(range(m.out_features)) - set(keep)))
    for m in columns_of:
        tp.prune_linear_in_channels(m, sorted(set(range(m.in_features)) - set(keep)))


def _refit_(model: nn.Module, keep: Mapping[nn.Linear, Sequence[int]], rows: Rows | None) -> None:
    if rows is None:
        return
    names = {m: n for n, m in model.named_modules() if m in keep}
    hessians = input_hessians(model, rows, list(names.values()))
    for m, inputs in keep.items():
        m.weight.copy_(refit(m.weight, hessians[names[m]], inputs))


def refit(weight: Tensor, hessian: Tensor, keep: Sequence[int]) -> Tensor:
    """The matrix (out, in), zero but for the inputs `keep`, whose output is closest to that of `weight`; `hessian` (in, in)."""
    kept = hessian[keep][:, keep].clone()
    kept.diagonal().add_(0.01 * kept.diagonal().mean() + 1e-8)  # H may be nearly singular
    fitted = torch.zeros_like(weight)
    fitted[:, keep] = torch.linalg.solve(kept, hessian[keep] @ weight.T).T
    return fitted
