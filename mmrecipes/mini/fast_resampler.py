"""`mini_resampler` made faster, one step at a time, each of which leaves the answers as they are (notebook 41).

    sdpa            attention by `scaled_dot_product_attention`, also in the resampler: no matrix of weights is kept
    constant_query  the resampler's queries are the same for every image: normalized and projected once
    fused_qkv       one matrix product for query, key and value in each layer of the vision encoder
    packed          the patches of all images in one sequence, without padding; an image attends to itself alone (NaViT,
                    arXiv:2307.06304)
    indexed         visual tokens are written to their places by index, without masks as large as the embeddings
    last_logits     logits of the last position alone, where nobody asks for others

and then a precision: `bf16`, or `int8`, which is int8 in the linear layers and bf16 elsewhere. `benchmarks/waterfall.py` tells
what each step gives. For inference on any width, with SigLIP's layers and a resampler on `nn.MultiheadAttention`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmrecipes.errors import UserError
from mmrecipes.mini.modeling_mini_resampler import attention_bias, places, sincos
from mmrecipes.models.modules import clone, linears

STEPS = ("sdpa", "constant_query", "fused_qkv", "packed", "indexed", "last_logits")
PRECISIONS = ("bf16", "int8")
ROWS = 512  # tokens that an int8 layer takes at once: they stay in the cache from quantization to product


@torch.no_grad()
def faster(model: nn.Module, steps: Sequence[str] = STEPS) -> nn.Module:
    """A copy of `model` with `steps` applied, in eval mode, which shares all weights but those that a step changes: with
    "fused_qkv" those of query, key and value, with a precision all. Any of STEPS may stand alone, and one of PRECISIONS behind
    them. Raises UserError for a step that there is not, or a model without resampler.
    >>> faster(model, ("sdpa",))
    Traceback (most recent call last):
    mmrecipes.errors.UserError: Idefics3ForConditionalGeneration has no resampler; give mini-resampler, or a model of its class
    """
    unknown = next((s for s in steps if s not in STEPS + PRECISIONS), None)
    if unknown is not None:
        raise UserError(f"no step {unknown!r}; expected {', '.join(STEPS + PRECISIONS)}")
    if "int8" in steps and not torch.backends.mkldnn.is_available():
        raise UserError("int8 needs a PyTorch with oneDNN; leave it out, or use bf16")
    if not hasattr(getattr(model, "model", None), "resampler"):
        raise UserError(f"{type(model).__name__} has no resampler; give mini-resampler, or a model of its class")
    fast = clone(model, [*model.parameters(), *model.buffers()]).eval()
    core, steps = fast.model, set(steps)
    if "sdpa" in steps:
        fast.set_attn_implementation("sdpa")
    if steps & {"sdpa", "fused_qkv", "packed"}:
        sdpa = core.vision_model.config._attn_implementation == "sdpa"
        for layer in core.vision_model.encoder.layers:
            layer.self_attn = VisionAttention(layer.self_attn, sdpa, "fused_qkv" in steps)
    if "packed" in steps:
        core.vision_model = PackedEncoder(core.vision_model)
    if steps & {"sdpa", "constant_query", "packed"}:
        core.resampler = FastResampler(core.resampler, steps)
    if "indexed" in steps:
        fast.register_forward_pre_hook(place_visual_tokens, with_kwargs=True)
    if "last_logits" in steps:
        fast.register_forward_pre_hook(keep_last_logits, with_kwargs=True)
    if steps & set(PRECISIONS):
        lower_(fast, "int8" in steps)
    return fast


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sdpa: bool = True) -> Tensor:
    """Attention of q (B, heads, M, d) to k and v (B, heads, N, d), `bias` added to the scores: (B, M, heads * d)."""
    if sdpa:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    else:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores if bias is None else scores + bias
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sdpa: bool = True) -> Tensor:
    """Block-diagonal attention of images in one sequence: q, k, v (1, heads, total, d), `lengths` its patches of each image.
    (1, total, heads * d). One call an image: a mask over the whole sequence would cost what it hides."""
    images = zip(*(each.split(list(lengths), dim=2) for each in (q, k, v)), strict=True)
    return torch.cat([attend(*image, sdpa=sdpa) for image in images], dim=1)


class VisionAttention(nn.Module):
    """SigLIP's attention on a padded batch or, given `lengths`, a packed sequence; one matrix for q, k and v if `fused`."""

    def __init__(self, old: nn.Module, sdpa: bool, fused: bool):
        super().__init__()
        self.heads, self.sdpa, self.fused, self.out_proj = old.num_heads, sdpa, fused, old.out_proj
        self.qkv = nn.ModuleList([old.q_proj, old.k_proj, old.v_proj])
        if fused:
            self.qkv = linear(torch.cat([p.weight for p in self.qkv]), torch.cat([p.bias for p in self.qkv]))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, lengths: Sequence[int] | None = None, **_):
        """hidden_states (B, N, width); a tuple of the same shape and, as no weights are kept, None."""
        found = self.qkv(hidden_states).chunk(3, dim=-1) if self.fused else [each(hidden_states) for each in self.qkv]
        q, k, v = (split_heads(each, self.heads) for each in found)
        packed = lengths is not None
        found = attend_packed(q, k, v, lengths, self.sdpa) if packed else attend(q, k, v, attention_mask, self.sdpa)
        return self.out_proj(found), None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, width) to (B, heads, N, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with this weight (out, in) and bias: the same memory, no copy."""
    layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


class PackedEncoder(nn.Module):
    """`VisionEncoder` on the real patches of all images as one sequence; each image's positions are those of its own grid."""

    def __init__(self, old: nn.Module):
        super().__init__()
        for name in ("config", "patch_size", "side", "patch_embedding", "position_embedding", "encoder", "post_layernorm"):
            setattr(self, name, getattr(old, name))

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """pixel_values (B, 3, H, W) in [-1, 1], patch_mask (B, R, C) true where there is no padding; features (1, total, width)
        of the patches that it tells, image by image."""
        size, (rows, columns) = self.patch_size, (n // self.patch_size for n in pixel_values.shape[-2:])
        if patch_mask is None:
            patch_mask = torch.ones(len(pixel_values), rows, columns, dtype=torch.bool, device=pixel_values.device)
        pixels = pixel_values[..., : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        patches = pixels.permute(0, 2, 4, 1, 3, 5)[patch_mask].flatten(1)  # (total, 3 * size * size), real ones alone
        kernel = self.patch_embedding
        at = (places(patch_mask)[patch_mask.flatten(1)] * self.side).long().clamp(max=self.side - 1)
        hidden = F.linear(patches, kernel.weight.flatten(1), kernel.bias)
        hidden = (hidden + self.position_embedding(at[:, 1] * self.side + at[:, 0]))[None]
        lengths = patch_mask.flatten(1).sum(1).tolist()
        for layer in self.encoder.layers:
            hidden = layer(hidden, None, lengths=lengths)
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(hidden))


class FastResampler(nn.Module):
    """`Resampler` with its attention written out, as steps that can be left out: "sdpa", "constant_query", "packed"."""

    def __init__(self, old: nn.Module, steps: set[str]):
        super().__init__()
        attn = old.attn
        self.heads, self.sdpa, self.packed = attn.num_heads, "sdpa" in steps, "packed" in steps
        self.kv_proj, self.ln_kv, self.ln_post, self.proj = old.kv_proj, old.ln_kv, old.ln_post, old.proj
        weights, biases = attn.in_proj_weight.detach().chunk(3), attn.in_proj_bias.detach().chunk(3)
        q_proj, self.k_proj, self.v_proj = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = linear(attn.out_proj.weight.detach(), attn.out_proj.bias.detach())
        self.constant = "constant_query" in steps
        if self.constant:
            self.register_buffer("queries", q_proj(old.ln_q(old.query)))  # (queries, width)
        else:
            self.query, self.ln_q, self.q_proj = old.query, old.ln_q, q_proj

    def forward(self, features: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Packed features (1, total, vision width) or padded ones (B, R * C, vision width): visual tokens (B, queries, width)."""
        if patch_mask is None:
            side = int(features.shape[1] ** 0.5)
            patch_mask = torch.ones(len(features), side, side, dtype=torch.bool, device=features.device)
        values = self.ln_kv(self.kv_proj(features))
        at = places(patch_mask)
        at = at[patch_mask.flatten(1)][None] if self.packed else at
        keys = values + sincos(at, values.shape[-1]).to(values.dtype)
        queries = self.queries if self.constant else self.q_proj(self.ln_q(self.query))
        q, k, v = (split_heads(x, self.heads) for x in (queries[None], self.k_proj(keys), self.v_proj(values)))
        if self.packed:
            images = zip(*(x.split(patch_mask.flatten(1).sum(1).tolist(), dim=2) for x in (k, v)), strict=True)
            found = torch.cat([attend(q, *image, sdpa=self.sdpa) for image in images])
        else:
            found = attend(q.expand(len(k), -1, -1, -1), k, v, attention_bias(patch_mask, q.dtype), self.sdpa)
        return self.ln_post(self.out_proj(found)) @ self.proj


def place_visual_tokens(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before `forward`: embeds text and images, so that `forward` need not; ValueError where their tokens misfit."""
    if args or kwargs.get("pixel_values") is None or kwargs.get("inputs_embeds") is not None:
        return args, kwargs
    kwargs, ids = dict(kwargs), kwargs["input_ids"]
    images = {key: kwargs.pop(key, None) for key in ("pixel_values", "pixel_attention_mask")}
    visual, at = model.get_image_features(**images).pooler_output, ids == model.config.image_token_id
    if (tokens := int(at.sum())) != len(visual):
        raise ValueError(f"Image features and image tokens do not match, tokens: {tokens}, features: {len(visual)}")
    embedded = model.get_input_embeddings()(ids)
    embedded[at] = visual.to(embedded.dtype)
    return args, kwargs | {"input_ids": None, "inputs_embeds": embedded}


def keep_last_logits(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before `forward`: logits of the last position, unless the caller asks for others, trains, or pads on the right,
    where the last position is not the last token of each row."""
    mask = kwargs.get("attention_mask")
    padded = mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all())
    if "logits_to_keep" in kwargs or kwargs.get("labels") is not None or padded:
        return args, kwargs
    return args, kwargs | {"logits_to_keep": 1}


def lower_(model: nn.Module, int8: bool) -> None:
    """In place: bf16 everywhere and, if `int8`, the `linears` in int8, one after the other, so that no two copies coexist."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for name, layer in list(linears(model)) if int8 else []:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int8Linear(layer))
    for module in model.modules():  # not .to(), which would change the tensors that the original shares
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            if b.is_floating_point() and "inv_freq" not in name:  # the angles of rotary positions stay exact
                setattr(module, name, b.bfloat16())
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight


class Int8Linear(nn.Module):
    """A linear layer in int8 on a CPU: a scale for each output channel and, found on the fly, for each token, which therefore
    does not depend on what else is in the batch. Input and output in bf16; oneDNN's kernel, as in a compiled int8 model."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(levels, [ROWS, layer.in_features])  # opaque: not a buffer
        self.scale, self.zero = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = torch.empty(len(rows), self.out_features, dtype=x.dtype)
        for given, into in zip(rows.split(ROWS), out.split(ROWS), strict=True):
            given = given.float()
            step = given.abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127  # (n, 1)
            levels = (given / step).add_(128.5).to(torch.uint8)  # 128 stands for zero
            rest = (self.weight, self.scale, self.zero, None, 1.0, 0, x.dtype, "none", [], "")
            product = torch.ops.onednn.qlinear_pointwise(levels, 1.0, 128, *rest)
            step = step.to(x.dtype)
            torch.mul(product, step, out=into) if self.bias is None else torch.addcmul(self.bias, product, step, out=into)
        return out.view(*x.shape[:-1], self.out_features)
