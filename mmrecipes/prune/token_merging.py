"""Fewer visual tokens in the vision encoder: like ones merged (ToMe), or a larger pixel shuffle. By hand in notebook 22."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import clone, parts


def match(metric: Tensor, r: int, fixed: int = 0) -> Tensor:
    """Where each token goes when `r` of them join their likes: (B, N, D) -> (B, N), numbers below N - r.
    Bipartite soft matching (ToMe, arXiv:2210.09461): of pairs of an even token with its nearest odd one, by cosine, the `r`
    best merge, half of all tokens at most. The first `fixed` (a class token) stay alone.
    """
    n = metric.shape[1]
    even, odd = (torch.arange(fixed + i, n, 2, device=metric.device) for i in (0, 1))
    unit = F.normalize(metric, dim=-1)
    likeness, nearest = (unit[:, even] @ unit[:, odd].mT).max(-1)
    pairs = likeness.topk(min(r, len(odd))).indices  # (B, r)
    gone, joined = even[pairs], odd[nearest.gather(1, pairs)]
    place = torch.ones(metric.shape[:2], dtype=torch.long, device=metric.device).scatter(1, gone, 0).cumsum(1) - 1
    return place.scatter(1, gone, place.gather(1, joined))


def combine(x: Tensor, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Average tokens `x` (B, N, D), each of `size` (B, N) patches, into M at their `place` (B, N): (B, M, D), sizes (B, M)."""
    batch, m = len(x), int(place.max()) + 1
    flat = (place + m * torch.arange(batch, device=x.device)[:, None]).flatten()
    total = size.new_zeros(batch * m).index_add_(0, flat, size.flatten())
    summed = size.new_zeros(batch * m, x.shape[-1]).index_add_(0, flat, (x * size[..., None]).flatten(0, 1))
    return (summed / total[:, None]).to(x.dtype).view(batch, m, -1), total.view(batch, m)


def merged_layer(layer: nn.Module, x: Tensor, size: Tensor, r: int, fixed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of a SigLIP or CLIP encoder that merges `r` tokens between attention and MLP: new x, new size, place (B, N)."""
    attention, normed = layer.self_attn, layer.layer_norm1(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections)
    # attention is proportional: a token of s patches counts s times
    bias = size.log()[:, None, None].to(x.dtype) if size.max() > 1 else None
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    x = x + attention.out_proj(seen.transpose(1, 2).flatten(2))
    place = match(k.mean(1), r, fixed)  # keys, the mean of the heads: they say what a token offers to others
    x, size = combine(x, size, place)
    return x + layer.mlp(layer.layer_norm2(x)), size, place


def merged_vision(model: nn.Module, pixels: Tensor, merge: float) -> Tensor:
    """Patches (images, N, D) as the connector wants them, from `pixels` (images, 3, H, W), a share `merge` merged on the way.
    Early layers merge more, as that saves more. At the end each patch gets a copy of its token. UserError for another encoder.
    """
    encoder = parts(model)["vision"]
    layers = getattr(getattr(encoder, "encoder", None), "layers", None)
    if layers is None or not hasattr(layers[0], "layer_norm1"):
        raise UserError(f"merging is for SigLIP and CLIP encoders, and this is {type(encoder).__name__}; drop tokens instead")
    is_clip = hasattr(encoder.embeddings, "class_embedding")
    if is_clip:
        x = encoder.pre_layrnorm(encoder.embeddings(pixels))
    else:
        side = [s // encoder.config.patch_size for s in pixels.shape[-2:]]
        x = encoder.embeddings(pixels, torch.ones(len(pixels), *side, dtype=torch.bool, device=pixels.device))
    last = getattr(model.config, "vision_feature_layer", -1)  # LLaVA may leave out the last layers
    used = layers[: last + 1 or None] if last < 0 else layers[:last]
    n, size, source = x.shape[1], torch.ones(x.shape[:2], device=x.device), None
    for i, layer in enumerate(used):
        before, after = (round(merge * n * (1 - (1 - t / len(used)) ** 2)) for t in (i, i + 1))
        x, size, place = merged_layer(layer, x, size, after - before, int(is_clip))
        source = place if source is None else place.gather(1, source)
    x = x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))
    if not is_clip:
        return encoder.post_layernorm(x) if len(used) == len(layers) else x
    return x[:, 1:] if model.config.vision_feature_select_strategy == "default" else x


def coarser(model: nn.Module, factor: int = 2) -> nn.Module:
    """A copy of an Idefics3 with `factor` times its pixel shuffle, so 1 / `factor`² of the visual tokens; it needs training."""
    small = clone(model)
    connector = parts(small).get("connector")
    if not hasattr(connector, "scale_factor") or factor < 2:
        raise UserError(f"coarser: {type(model).__name__}, {factor=}; expected a pixel shuffle in it and a factor of 2 or more")
    old, proj = connector.scale_factor, connector.modality_projection.proj
    weight = proj.weight.detach().unflatten(1, (old, old, -1)).repeat(1, factor, factor, 1).flatten(1) / factor**2
    proj.weight, proj.in_features = nn.Parameter(weight), weight.shape[1]
    connector.scale_factor = small.config.scale_factor = old * factor
    small.processor = copy.copy(model.processor)
    small.processor.image_seq_len = model.processor.image_seq_len // factor**2
    return small
