"""What a student may be asked to match: logits, features, relations; embeddings and the contrast of pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CaptionBatch(NamedTuple):
    """A batch of B pictures with captions."""

    images: Tensor  # (B, 3, 128, 128)
    captions: Tensor  # (B, 56): the true captions' tokens
    negatives: Tensor  # (B, 56): captions with one attribute of one object changed
    there: Tensor  # (B, 2, 48): 1 for each (colour, shape) in the picture; 1 for each that is large
    sizes: Tensor  # (B,): does the caption tell sizes?


def embed(model: nn.Module, images: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Pooled vectors of pictures (B, 3, H, W), or of texts (B, T): (B, D), not normalised. SigLIP and CLIP alike."""
    out = model.get_image_features(pixel_values=images) if ids is None else model.get_text_features(input_ids=ids)
    return out if isinstance(out, Tensor) else out.pooler_output


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: image (B, D) and text (M, D), M >= B, of which row i of both belong together and nothing else does.

    Every pair is a question of its own, yes or no; the sum over all pairs is divided by B. On several processes every picture
    is compared with the texts of all of them.
    """
    with torch.autocast(image.device.type, enabled=False):  # a scale of 100 is too much for 16 bits
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        texts, own = _all_texts(text)
        logits = scale.exp() * image @ texts.T + bias
        sign = 2 * own[: len(image)].to(logits) - 1  # +1 for pairs, -1 elsewhere
        return -F.logsigmoid(sign * logits).sum() / len(image)


def _all_texts(text: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of all processes (P * M, D), and which of them are this one's i-th: (M, P * M)."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return text, torch.eye(len(text), device=text.device)
    from torch.distributed.nn.functional import all_gather

    eye, at = torch.eye(len(text), device=text.device), dist.get_rank()
    own = torch.zeros(len(text), len(text) * dist.get_world_size(), device=text.device)
    own[:, at * len(text) : (at + 1) * len(text)] = eye
    return torch.cat(all_gather(text)), own


def pair_loss(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """The model's own contrastive loss of pictures (B, D) and texts (M, D), the first B of which belong to them.

    SigLIP has a bias and asks of every pair yes or no; CLIP has none and lets the texts (and pictures) compete.
    """
    if hasattr(model, "logit_bias"):
        return siglip_loss(image, text, model.logit_scale, model.logit_bias)
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits, own = model.logit_scale.exp() * image @ text.T, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(image)].T, own)) / 2


def affinity_loss(own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], scale: Tensor | float) -> Tensor:
    """KL divergence, both ways, of who resembles whom: pictures (B, D) and texts (M, D) of the student and of the teacher."""
    logits = [scale * F.normalize(i, dim=-1) @ F.normalize(t, dim=-1).T for i, t in (own, wanted)]
    ways = [logits, [m[:, : len(own[0])].T for m in logits]]
    return sum(F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean") for a, b in ways) / 2


def embedding_loss(own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """One minus the cosine of the student's vectors with the teacher's, the mean over both towers."""
    return 1 - sum(F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(own, wanted, strict=True)) / 2


def interactive_loss(teacher: nn.Module, own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """The teacher's contrastive loss of the student's pictures with its own texts, and of its pictures with the student's."""
    return (pair_loss(teacher, own[0], wanted[1]) + pair_loss(teacher, wanted[0], own[1])) / 2


RELATION_HEADS = 2  # into so many the vectors are split for attention relations, whatever the heads of either model


# ---- what to match


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits (..., V), mean over rows, times temperature squared, in nats.

    Forward, KL(teacher || student): the student must cover all that the teacher finds likely (Hinton et al. 2015,
    arXiv:1503.02531). `reverse`, KL(student || teacher): it may leave some of it, and must invent nothing (MiniLLM, 2306.08543).
    """
    own, wanted = (x.float().div(temperature).log_softmax(-1) for x in (student, teacher))
    first, second = (wanted, own) if reverse else (own, wanted)
    far = F.kl_div(first, second, log_target=True, reduction="none").sum(-1)
    return far.mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features (B, T, D), over the teacher's variance: 1 is what a constant would score (FitNets)."""
    return (student - teacher).square().mean() / teacher.var()


def relation_loss(student: Tensor, teacher: Tensor, heads: int = RELATION_HEADS) -> Tensor:
    """How differently two sets of queries (or keys, or values), (B, T, D) each, relate tokens to one another.

    Attention of the vectors to themselves, KL divergence, mean over tokens: MiniLMv2 (arXiv:2012.15828). Widths may differ.
    """
    own, wanted = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher))
    own, wanted = ((x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).log_softmax(-1) for x in (own, wanted))
    return F.kl_div(own, wanted, log_target=True, reduction="none").sum(-1).mean()


def ridge(moments: Tensor, products: Tensor) -> Tensor:
    """The linear map (D, C) of least squares, from moments x'x (C, C) and products x'y (C, D), in their dtype.

    A thousandth of the mean moment is added to each channel's own, since samples may not fill all directions.
    """
    small = 1e-3 * moments.diagonal().mean() + 1e-8
    return torch.linalg.solve(moments + small * torch.eye(len(moments), dtype=moments.dtype, device=moments.device), products).T
