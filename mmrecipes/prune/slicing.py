"""Smaller hidden sizes: only the principal directions of the hidden states stay (SliceGPT, arXiv:2401.15024; notebook 23)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import attention, checkpoint_with_config, clone, config_of, ffn, layers, parts
from mmrecipes.models.prompts import Rows, teacher_forced
from mmrecipes.prune.structured import keep_largest_
from mmrecipes.quantize.calibration import watched

NORMS = {"language": ("input_layernorm", "post_attention_layernorm"), "vision": ("layer_norm1", "layer_norm2")}
LAST = {"language": "norm", "vision": "post_layernorm"}


@torch.no_grad()
def directions(model: nn.Module, part: str, rows: Rows, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Principal directions (D, D) of what the norms of `part` get on `rows`, a column each, strongest first; their share (D,)."""
    size = config_of(model, part).hidden_size
    total = torch.zeros(size, size, dtype=torch.float64)

    def add(_: int, x: Tensor, out: Tensor) -> None:
        x = x.flatten(0, -2).double()
        x = x - x.mean(-1, keepdim=True) if part == "vision" else x  # LayerNorm takes the mean away, RMSNorm does not
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)  # to one length, as norms do
        total.add_((x.T @ x).cpu())

    with watched(dict.fromkeys(_norms(model, part)), add):
        for inputs, _ in teacher_forced(model, rows, batch_size):
            model(**inputs, use_cache=False)
    shares, vectors = torch.linalg.eigh(total)  # rising
    return vectors.flip(1).float(), (shares.flip(0) / shares.sum()).float()


def kept(shares: Tensor, sizes: Sequence[int]) -> dict[int, float]:
    """How much of the hidden states the first so many directions hold: {hidden size: share}."""
    return {size: shares[:size].sum().item() for size in sizes}


def _norms(model: nn.Module, part: str) -> list[nn.Module]:
    core, stack = parts(model)[part], layers(model)[part]
    names, last = NORMS[part], getattr(core, LAST[part], None)
    if last is None or any(not hasattr(stack[0], n) for n in names):
        raise UserError(f"{type(core).__name__}: no {', '.join(names)} and {LAST[part]} in it; its hidden size cannot be sliced")
    return [*(getattr(layer, n) for layer in stack for n in names), last]


@torch.no_grad()
def slice_language(model: nn.Module, size: int, rows: Rows) -> nn.Module:
    """A copy whose language model has hidden size `size`, its head untied. UserError where the size or its norms do not fit."""
    whole = config_of(model, "language").hidden_size
    _check(model, size, whole, 2)
    if "Gemma" in type(_norms(model, "language")[0]).__name__:
        raise UserError("slice_language: Gemma's norms scale by one more than their weights; expected Llama's")
    rotation = directions(model, "language", rows)[0][:, :size]  # [whole, size]
    small, config = clone(model), copy.deepcopy(model.config)
    modules, embeddings = parts(small), small.get_input_embeddings()
    _rotate_layers_(small, "language", rotation)
    _absorb_(modules["language"].norm, [modules["head"]], rotation)
    embeddings.weight = nn.Parameter(embeddings.weight @ rotation)
    connector = [m for m in modules["connector"].modules() if isinstance(m, nn.Linear)]
    keep_largest_(connector, size)
    _rotate_output_(connector[-1], rotation)
    sizes = config_of(config, "language")
    sizes.head_dim, sizes.hidden_size = getattr(sizes, "head_dim", None) or whole // sizes.num_attention_heads, size
    config.tie_word_embeddings = sizes.tie_word_embeddings = False
    return checkpoint_with_config(small, config)


@torch.no_grad()
def slice_vision(model: nn.Module, size: int, rows: Rows) -> nn.Module:
    """A copy whose vision encoder has hidden size `size`, in as many heads as before, each of fewer channels.
    Heads are narrowed by low-rank approximation of Q^T K and O V. UserError for another encoder or an uneven size.
    """
    whole, heads = config_of(model, "vision").hidden_size, config_of(model, "vision").num_attention_heads
    _check(model, size, whole, heads)
    small, config = clone(model), copy.deepcopy(model.config)
    core, first = parts(small)["vision"], next(m for m in parts(small)["connector"].modules() if isinstance(m, nn.Linear))
    embeddings = getattr(core, "embeddings", core)
    # CLIP has a class embedding and more norms, and LLaVA's connector a bias
    if not hasattr(embeddings, "position_embedding") or hasattr(embeddings, "class_embedding") or first.bias is not None:
        raise UserError(f"slice_vision: {type(core).__name__}; expected SigLIP's vision encoder, as in Idefics3")
    if first.in_features != whole:
        raise UserError(f"slice_vision: the connector reads {first.in_features} channels; expected {whole}, no pixel shuffle")
    # [size, size - 1], orthogonal to ones: LayerNorm takes the mean away, so the direction of equal channels stays empty
    even = torch.linalg.qr(torch.eye(size).index_fill(1, torch.tensor(0), 1)).Q[:, 1:]
    rotation = directions(model, "vision", rows)[0][:, : size - 1] @ even.T  # [whole, size]
    _rotate_layers_(small, "vision", rotation)
    for layer in layers(small)["vision"]:
        _narrow_heads_(*attention(layer), heads, size // heads)
    patches, positions, norm = embeddings.patch_embedding, embeddings.position_embedding, core.post_layernorm
    patches.weight = nn.Parameter(torch.einsum("dw,d...->w...", rotation, patches.weight))
    patches.bias = nn.Parameter(rotation.T @ patches.bias)
    positions.weight = nn.Parameter(positions.weight @ rotation)
    first.bias = nn.Parameter(torch.zeros(first.out_features))  # a loan: what it gets is given back to the norm
    _absorb_(norm, [first], rotation)
    norm.bias = nn.Parameter(torch.linalg.lstsq(first.weight, first.bias, driver="gelsd").solution)
    first.bias = None
    config_of(config, "vision").hidden_size = size
    return checkpoint_with_config(small, config)


def _rotate_layers_(model: nn.Module, part: str, rotation: Tensor) -> None:
    """Every layer's matrices in the space that `rotation` (whole, size) leads to; its norms' weights go into what reads them."""
    for layer in layers(model)[part]:
        (*into, out), (up, down) = attention(layer), ffn(layer)
        for name, readers in zip(NORMS[part], (into, up), strict=True):
            _absorb_(getattr(layer, name), readers, rotation)
        for m in (out, down):
            _rotate_output_(m, rotation)


def _absorb_(norm: nn.Module, readers: Sequence[nn.Linear], rotation: Tensor) -> None:
    """Weights and bias of `norm` go into the matrices that read it, and these into the space of `rotation` (whole, size)."""
    whole, size = rotation.shape
    for m in readers:
        if getattr(norm, "bias", None) is not None:
            m.bias = nn.Parameter(m.bias + m.weight @ norm.bias)
        grow = (whole / size) ** 0.5  # the norm now divides by the root mean square of fewer channels
        m.weight = nn.Parameter((m.weight * norm.weight) @ rotation * grow)
    norm.weight = nn.Parameter(torch.ones(size))
    if getattr(norm, "bias", None) is not None:
        norm.bias = nn.Parameter(torch.zeros(size))


def _rotate_output_(linear: nn.Linear, rotation: Tensor) -> None:
    linear.weight = nn.Parameter(rotation.T @ linear.weight)
    if linear.bias is not None:
        linear.bias = nn.Parameter(rotation.T @ linear.bias)


def _narrow_heads_(query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, heads: int, size: int) -> None:
    """Every head's channels down to `size`. A key's bias is the same for all tokens, so softmax does not see it; a value's
    bias reaches the output whole, because attention adds up to one."""
    old = query.out_features // heads
    new, biases = {m: [] for m in (query, key, value, out)}, []
    out.bias = nn.Parameter(out.bias + out.weight @ value.bias)
    for h in range(heads):
        head = slice(h * old, (h + 1) * old)
        queries = torch.cat([query.weight[head], query.bias[head, None]], 1)  # [old, hidden + 1]
        left, right = _factor(queries.T @ key.weight[head], size)  # [hidden + 1, size], [size, hidden]
        left = left * (size / old) ** 0.5  # attention divides by the root of a head's channels
        new[query].append(left[:-1].T)
        biases.append(left[-1])
        new[key].append(right)
        left, right = _factor(out.weight[:, head] @ value.weight[head], size)
        new[out].append(left)
        new[value].append(right)
    for m, matrices in new.items():
        m.weight = nn.Parameter(torch.cat(matrices, int(m is out)).contiguous())
    query.bias = nn.Parameter(torch.cat(biases))
    key.bias, value.bias = (nn.Parameter(torch.zeros(heads * size)) for _ in range(2))


def _factor(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two matrices of `rank` whose product is closest to `product` (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]


def _check(model: nn.Module, size: int, whole: int, heads: int) -> None:
    weight = next(model.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UserError(f"slicing: the model is {weight.dtype} on {weight.device}; slice it in float32 on the CPU, then move it")
    if not 0 < size <= whole or size % heads:
        raise UserError(f"slicing: hidden size {size}; expected a multiple of {heads} up to {whole}")
