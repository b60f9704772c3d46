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

from mmrecipes import models
from mmrecipes.errors import UserError
from mmrecipes.quantize import clone

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("vision", "language")
FFN = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))  # what libraries call the matrices into and out of it
OUT = ("o_proj", "out_proj")


# ---- where things are


def layers(model: nn.Module, parts: Sequence[str] = PARTS) -> dict[str, nn.ModuleList]:
    """The transformer layers of "vision" and "language", or of some `parts`. Raises UserError where a tower has none."""
    found = {}
    for part in parts:
        lists = [m for n, m in models.parts(model)[part].named_modules() if n.split(".")[-1] in ("layers", "blocks")]
        if not lists:
            raise UserError(f"{type(model).__name__}: no list of layers in its {part} part; give a transformer")
        found[part] = lists[0]
    return found


def ffn(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The matrices into the columns of a layer's FFN (two where it is gated), and the one out of them."""
    for into, out in FFN:
        if hasattr(layer.mlp, out):
            return [getattr(layer.mlp, n) for n in into], getattr(layer.mlp, out)
    raise UserError(f"{type(layer.mlp).__name__}: no {' or '.join(out for _, out in FFN)} in it; its columns cannot be told")


def attention(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output matrix of a layer's attention."""
    own = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
    out = next((getattr(own, n) for n in OUT if hasattr(own, n)), None)
    if out is None or not hasattr(own, "q_proj"):
        raise UserError(f"{type(own).__name__}: no q_proj, k_proj, v_proj and o_proj in it; its heads cannot be told")
    return own.q_proj, own.k_proj, own.v_proj, out


def config_of(model_or_config: object, part: str) -> object:
    """The part of the config that says how large the part is."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.vision_config if part == "vision" else config.get_text_config()


def head_dim(model: nn.Module, part: str) -> int:
    """Width of one attention head."""
    config = config_of(model, part)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---- cuts


def plain(model: nn.Module, config: object) -> nn.Module:
    """A fresh model of `config` with the weights of `model`, whose modules were cut: what `from_pretrained` would build.

    Raises UserError where a weight does not fit: then the config cannot say what was cut, and no checkpoint could be loaded.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        fresh = type(model)._from_config(config, dtype=next(model.parameters()).dtype)
    fresh.tie_weights()
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as e:
        raise UserError(f"{type(model).__name__}: what was cut does not fit its config ({str(e).splitlines()[1].strip()})") from e
    if model.can_generate():
        fresh.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(model, "processor"):
        fresh.processor = model.processor
    return fresh.to(model.device).train(model.training)


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
    return plain(thin, config)


@torch.no_grad()
def keep_columns(model: nn.Module, keep: Mapping[str, Sequence[Sequence[int]]], rows: Dataset | None = None) -> nn.Module:
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
            slim_(into, [out], columns)
        config_of(config, part).intermediate_size = len(lists[0])
    return plain(thin, config)


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
        slim_([q], [out], queries)
        slim_([k, v], [], keys)
    groups, each = next(iter(shapes))
    own.head_dim, own.num_attention_heads, own.num_key_value_heads = size, groups * each, groups
    return plain(thin, config)


@torch.no_grad()
def keep_width(model: nn.Module, part: str, channels: Sequence[int], heads: Sequence[Sequence[int]] = ()) -> nn.Module:
    """A copy whose embeddings in `part` keep only `channels`: words, positions, norms, every layer, and what joins them.

    In a vision tower the config ties heads to width, so each layer keeps `heads` (as many, of as many channels), too. The
    connector of Idefics3 reads s x s neighbouring patches at once (pixel shuffle): it loses a channel s x s times.
    """
    thin, config, size = clone(model), copy.deepcopy(model.config), head_dim(model, part)
    own, found, keep = config_of(config, part), models.parts(thin), list(channels)
    whole, joined = own.hidden_size, [m for m in found["connector"].modules() if isinstance(m, nn.Linear)]
    if part == "vision" and {len(h) * size for h in heads} != {len(keep)}:
        raise UserError(f"keep_width: {len(keep)} channels with {[len(h) for h in heads]} heads of {size}; they must agree")
    inner = {m for layer in layers(thin)[part] for m in (*ffn(layer)[0], ffn(layer)[1], *attention(layer))}
    for layer, left in zip(layers(thin)[part], heads or [None] * len(layers(thin)[part]), strict=True):
        *into, out = attention(layer)
        if left is not None:
            slim_(into, [out], _channels(left, size))
        slim_([out, ffn(layer)[1]], [*into, *ffn(layer)[0]], keep)
    for module in found[part].modules():
        if module in inner or any(module is m for m in found["connector"].modules()):
            continue
        for name, p in list(module.named_parameters(recurse=False)):
            at = p.ndim - 1 if isinstance(module, nn.Embedding) else 0
            if p.shape[at] == whole:
                setattr(module, name, nn.Parameter(p.index_select(at, torch.tensor(keep))))
    if part == "vision":
        spread = joined[0].in_features // whole
        slim_([], joined[:1], [block * whole + c for block in range(spread) for c in keep])
        own.num_attention_heads = len(heads[0])
    else:
        for before, after in itertools.pairwise(joined):  # LLaVA's has a hidden width, and it is the language model's
            size_of = before.weight.square().sum(1) + after.weight.square().sum(0)
            slim_([before], [after], size_of.topk(len(keep)).indices.tolist())
        slim_(joined[-1:], [], keep)
        words = thin.get_input_embeddings().weight  # cut above; a head that was tied to it still has its old width
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        found["head"].weight = words if tied else nn.Parameter(found["head"].weight[:, keep])
        own.head_dim = size
    own.hidden_size = len(keep)
    return plain(thin, config)


def _channels(heads: Sequence[int], size: int) -> list[int]:
    return [h * size + i for h in heads for i in range(size)]


def slim_(rows_of: Sequence[nn.Linear], columns_of: Sequence[nn.Linear], keep: Sequence[int]) -> None:
    """Cut outputs of some matrices, and the inputs of others that read them, down to `keep`, in place, by torch-pruning."""
    import torch_pruning as tp

    for m in rows_of:
        tp.prune_linear_out_channels(m, sorted(set(range(m.out_features)) - set(keep)))
    for m in columns_of:
        tp.prune_linear_in_channels(m, sorted(set(range(m.in_features)) - set(keep)))


def _refit_(model: nn.Module, keep: Mapping[nn.Linear, Sequence[int]], rows: Dataset | None) -> None:
    from mmrecipes.calibrated import moments

    if rows is None:
        return
    names = {m: n for n, m in model.named_modules() if m in keep}
    h = moments(model, rows, list(names.values()))
    for m, columns in keep.items():
        m.weight.copy_(refit(m.weight, h[names[m]], columns))


def refit(weight: Tensor, moments: Tensor, columns: Sequence[int]) -> Tensor:
    """The matrix (out, in), zero but for `columns`, whose output is closest to that of `weight`; `moments` is H (in, in)."""
    kept = moments[columns][:, columns].clone()
    kept.diagonal().add_(0.01 * kept.diagonal().mean() + 1e-8)  # H may be nearly singular
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = torch.linalg.solve(kept, moments[columns] @ weight.T).T
    return fitted
