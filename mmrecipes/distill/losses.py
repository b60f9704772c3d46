"""What a student may be asked to match: logits, features and relations of a VLM; embeddings and the contrast of pairs.

Embeddings are a pair: images (B, D), and texts (M, D), the first B of which belong to the images.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

RELATION_HEADS = 2  # the heads that vectors are split into for attention relations, whatever the heads of either model


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """KL(teacher || student) of logits (..., V), mean over rows, times temperature squared, in nats (arXiv:1503.02531).
    `reverse`: KL(student || teacher), which forgives what is left out, not what is invented (MiniLLM, arXiv:2306.08543).
    """
    log_probs = [logits.float().div(temperature).log_softmax(-1) for logits in (student, teacher)]
    approximate, target = reversed(log_probs) if reverse else log_probs
    return F.kl_div(approximate, target, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (B, T, D), over the teacher's variance: 1 is what a constant scores (FitNets, 1412.6550)."""
    return (student - teacher).square().mean() / teacher.var()


def relation_loss(student: Tensor, teacher: Tensor, heads: int = RELATION_HEADS) -> Tensor:
    """KL divergence of how queries (or keys, or values) (B, T, D) attend to themselves: MiniLMv2 (2012.15828). D may differ."""
    split = [x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher)]  # (B, heads, T, D / heads)
    return kl_loss(*(x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 for x in split))


def ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """The linear map (D, C) of least squares, from x'x (C, C) and x'y (C, D), in their dtype."""
    damping = 1e-3 * gram.diagonal().mean() + 1e-8
    return torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross).T


def embed(model: nn.Module, images: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Embeddings of images (B, 3, H, W), or of token ids (B, T): (B, D), not normalised. SigLIP and CLIP alike."""
    out = model.get_image_features(pixel_values=images) if ids is None else model.get_text_features(input_ids=ids)
    return out if isinstance(out, Tensor) else out.pooler_output


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss (arXiv:2303.15343) of embeddings image (B, D) and text (M, D), M >= B; row i is a pair.
    The sum over all combinations is divided by B. On several processes every image is compared with the texts of all of them.
    """
    with torch.autocast(image.device.type, enabled=False):  # a scale of 100 is too much for 16 bits
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        first = 0  # the column of this process's first text
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            from torch.distributed.nn.functional import all_gather

            first, text = dist.get_rank() * len(text), torch.cat(all_gather(text))
        logits = scale.exp() * image @ text.T + bias
        sign = 2 * torch.eye(*logits.shape, device=logits.device).roll(first, 1) - 1  # +1 for pairs, -1 elsewhere
        return -F.logsigmoid(sign * logits).sum() / len(image)


def pair_loss(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """The contrastive loss of SigLIP or CLIP (arXiv:2103.00020), of image (B, D) and text (M, D), M >= B; row i is a pair."""
    if hasattr(model, "logit_bias"):  # CLIP has none
        return siglip_loss(image, text, model.logit_scale, model.logit_bias)
    logits = _similarity((image, text), model.logit_scale.exp())
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(image)].T, target)) / 2


def affinity_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], scale: Tensor | float) -> Tensor:
    """KL divergence, both ways, of which images (B, D) resemble which texts (M, D): TinyCLIP (arXiv:2309.12314), in nats."""
    logits = [_similarity(pair, scale) for pair in (student, teacher)]
    return (kl_loss(*logits) + kl_loss(*(m[:, : len(m)].T for m in logits))) / 2


def embedding_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """One minus the cosine of the student's embeddings with the teacher's, the mean over both encoders: 0 to 2."""
    return 1 - sum(F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(student, teacher, strict=True)) / 2


def interactive_loss(teacher: nn.Module, own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """The contrastive loss of `teacher`, of the student's images (`own`) with its texts (`wanted`), and the other way round."""
    return (pair_loss(teacher, own[0], wanted[1]) + pair_loss(teacher, wanted[0], own[1])) / 2


def _similarity(pair: tuple[Tensor, Tensor], scale: Tensor | float) -> Tensor:
    image, text = (F.normalize(x, dim=-1) for x in pair)
    return scale * image @ text.T
