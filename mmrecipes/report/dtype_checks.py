"""Which layers a quantizer must leave alone, and where dtypes change between parts: told without running the model, and cured.

A layer is left alone for what the code around it does, never for its name. Built by hand in notebook 40.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from mmrecipes.models import modules
from mmrecipes.quantize import nf4

READ = re.compile(r"\bself\.([\w.]+)\.weight\b(\.dtype)?")  # in the source of a module's `forward`
SEEN = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)  # whose weights quantizers and runtimes know
NEXT = (("vision", "connector"), ("connector", "language"), ("language", "head"))
TIED = ("its weight is that of the token embeddings, too", "quantize both together, or untie them first")


@dataclass(frozen=True)
class Finding:
    """One thing in the way: of which technique, where, what, and the cure."""

    technique: str
    where: str
    what: str
    cure: str


def dtype_findings(model: nn.Module) -> Iterator[Finding]:
    """What a quantizer or another dtype breaks in `model`, or never reaches; its weights may be packed, or on the meta device."""
    for name, how in read_not_called(model).items():
        state = "ends in an error" if packed(model.get_parameter(f"{name}.weight")) else "would break"
        cure = "ask a norm for the dtype" if "dtype" in how else "call the layer (`call_the_layer_`)"
        what = f"{how} this weight past its layer: a quantized layer in its place {state}"
        yield Finding("dynamic int8, 4-bit layers", name, what, f"leave it in floating point, or {cure}")
    seen = {id(p) for m in model.modules() if isinstance(m, SEEN) for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if id(p) not in seen and sum(side > 1 for side in p.shape) > 1:
            shape, kept = " x ".join(map(str, p.shape)), p.nbytes / 1e6
            what = f"{shape} in a bare parameter ({kept:,.2f} MB): quantizers that replace linear layers pass it by"
            yield Finding("int8, 4-bit layers", name, what, "hold it in layers, or count it as not compressed")
    if small := [(name, p.dtype) for name, p in model.named_parameters() if packed(p)]:
        what = f"{len(small)} packed weights, here {small[0][1]}: code that takes a dtype from one gets that"
        yield Finding("packed weights", small[0][0], what, "take dtypes from a norm or a bias")
    for before, after, given, wanted in boundaries(model):
        what = f"{given} meets {wanted}".replace("torch.", "")
        yield Finding("all", f"{before} -> {after}", what, "load with one dtype, or `cast_at_boundaries_`")
    if torch.float16 in _dtypes(model).get("vision", ()):
        what = "float16 ends at 65504, and an encoder's largest activations may not"
        yield Finding("fp16", "vision", what, "load it in bfloat16, or look at its activations first")
    images = getattr(getattr(model, "processor", None), "image_processor", None)
    if not getattr(images, "do_rescale", True) and not getattr(images, "do_normalize", True):
        what = "its processor neither rescales nor normalizes: pixels arrive as integers from 0 to 255"
        yield Finding("all", "pixel_values", what, "normalize them before the first layer, in that layer's dtype")


def packed(weight: nn.Parameter) -> bool:
    """Whether a quantizer holds it: integers, or a subclass of tensor (bitsandbytes, torchao)."""
    return type(weight) is not nn.Parameter or not weight.is_floating_point()


def read_not_called(model: nn.Module) -> dict[str, str]:
    """{linear layer: who reads its weight, or that weight's dtype}, from the source of each module's `forward`: so do
    `nn.MultiheadAttention` and all that inherit its `forward`, and not a subclass that calls its layers."""
    found = {}
    for name, module in model.named_modules():
        try:
            reads = READ.findall(inspect.getsource(type(module).forward))
        except (OSError, TypeError):  # compiled code
            continue
        layers = dict(module.named_modules()) if reads else {}
        for path, dtype in reads:
            if isinstance(layers.get(path), nn.Linear):
                found[f"{name}.{path}".lstrip(".")] = f"{type(module).__name__} reads{' the dtype of' if dtype else ''}"
    return found


def skip_list(model: nn.Module) -> list[str]:
    """The linear layers that no quantizer may replace: those whose weights are read past them, and heads tied to embeddings."""
    return [*read_not_called(model), *modules.tied_heads(model)]


@torch.no_grad()
def prove(model: nn.Module, inputs: Mapping, skip: Iterable[str]) -> dict[str, float]:
    """NF4 in a copy of `model`, in all linear layers but those of `skip` that its kernels take; then one forward pass. How many,
    "finite", and the logits' relative "error". Raises whatever a layer that is missing in `skip` makes the model raise."""
    wanted = model(**inputs).logits.float()
    able = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and nf4.takes_nf4(m)}
    names = sorted(able - set(skip))  # whatever a quantizer that knows nothing of this model would replace
    found = nf4.to_nf4_(modules.clone(model), names)(**inputs).logits.float()
    error = ((found - wanted).norm() / wanted.norm()).item()
    return {"layers": len(names), "finite": bool(found.isfinite().all()), "error": error}


def _dtypes(model: nn.Module) -> dict[str, list[torch.dtype]]:
    """{part: its floating dtypes, in the order of its parameters}, without packed weights."""
    parts, found = modules.part_of(model), {}
    for name, p in model.named_parameters():
        if not packed(p):
            found.setdefault(parts[name], []).append(p.dtype)
    if "head" not in found and hasattr(model, "lm_head"):  # tied
        found["head"] = [model.lm_head.weight.dtype]
    return found


def boundaries(model: nn.Module) -> Iterator[tuple[str, str, torch.dtype, torch.dtype]]:
    """(part, next part, dtype that one gives, dtype that the other takes), where these differ."""
    ends = _dtypes(model)
    steps = NEXT if "connector" in ends else (("vision", "language"), NEXT[-1]) if "head" in ends else ()  # none: a dual encoder
    for before, after in steps:
        if before in ends and after in ends and (given := ends[before][-1]) != (wanted := ends[after][0]):
            yield before, after, given, wanted


def cast_at_boundaries_(model: nn.Module) -> dict[str, list[RemovableHandle]]:
    """Hooks that cast floating tensors where one part's dtype meets another's; none where they agree: {boundary: handles}.
    Before the language model it is the giver's output that is cast, as visual tokens are put among its embeddings before it
    runs. A model that casts visual tokens to its own `dtype`, that of its first weight (SmolVLM), undoes this."""
    hooks: dict[str, list[RemovableHandle]] = {}
    for before, after, _, dtype in boundaries(model):
        to_taker = partial(_cast, dtype)
        for part, module in modules.nested_parts(model):
            if after == "language" and part == before:
                handle = module.register_forward_hook(lambda _, __, output, cast=to_taker: cast(output))
            elif after != "language" and part == after:
                handle = module.register_forward_pre_hook(lambda _, *given, cast=to_taker: cast(given), with_kwargs=True)
            else:
                continue
            hooks.setdefault(f"{before} -> {after}", []).append(handle)
    return hooks


def _cast(dtype: torch.dtype, values: object) -> object:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


class CalledAttention(nn.Module):
    """`nn.MultiheadAttention` as four linear layers that are called: the same arguments, equal outputs."""

    in_proj_bias = None  # nn.TransformerEncoderLayer looks here before it reads weights past their layers

    def __init__(self, source: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.batch_first, self.dropout = source.num_heads, source.batch_first, source.dropout
        own = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        weights = source.in_proj_weight.chunk(3) if source.in_proj_weight is not None else own
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        out = source.out_proj
        self.out_proj = out if packed(out.weight) else _linear(out.weight, out.bias)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
        """As `nn.MultiheadAttention.forward`, whose options `average_attn_weights` and `is_causal` it takes, too."""
        one, axis = query.dim() == 2, 0 if self.batch_first else 1
        inputs = [x.unsqueeze(axis) if one else x for x in (query, key, value)]
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in inputs]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (m(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for m, x in zip(layers, inputs, strict=True))
        bias = q.new_zeros(len(q), 1, 1, k.shape[2])
        if key_padding_mask is not None:
            bias = bias + _added(key_padding_mask, q.dtype).view(len(q), 1, 1, -1)
        if attn_mask is not None:
            mask = _added(attn_mask, q.dtype)
            bias = bias + (mask.unflatten(0, (len(q), self.num_heads)) if mask.dim() == 3 else mask)
        if need_weights:
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(1) if options.get("average_attn_weights", True) else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
            weights = None
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        return (out.squeeze(axis), weights if weights is None else weights[0]) if one else (out, weights)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = bias if bias is None else nn.Parameter(bias.detach().clone())
    return layer


def call_the_layer_(model: nn.Module) -> list[str]:
    """Replace each `nn.MultiheadAttention` (but those with extra keys) by a `CalledAttention`, whose layers a quantizer may
    replace, or has replaced. Returns their names. A checkpoint saved from here has other names of weights than the old class."""
    cured = []
    for name, m in list(model.named_modules()):
        plain = isinstance(m, nn.MultiheadAttention) and type(m).forward is nn.MultiheadAttention.forward
        if plain and m.bias_k is None and not m.add_zero_attn:
            model.set_submodule(name, CalledAttention(m).train(m.training))
            cured.append(name)
    return cured
