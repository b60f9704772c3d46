"""Retrieval, image-text matching and zero-shot classification of a dual encoder (SigLIP, CLIP), with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmrecipes import quiet
from mmrecipes.data import scenes
from mmrecipes.data.families import caption
from mmrecipes.data.scenes import COLOURS, SHAPES, SIZES, Scene
from mmrecipes.data.splits import SPLITS
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate.generation import answers
from mmrecipes.evaluate.statistics import Share, wilson
from mmrecipes.inference.dual import ExportedDual
from mmrecipes.models.modules import parts

POOL = 100  # scenes in a pool; each brings an image or caption that is false in one attribute
CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}


@dataclass(frozen=True)
class RetrievalResult:
    """What `retrieval_scores` found, each with a 95% Wilson interval, and per query whether it was right.
    `text_r1`: R@1, an image's caption among those of POOL images and as many hard negatives; `image_r1`: a caption's image among
    POOL images and as many with one object changed. `hard_negative_accuracy`: the true caption scores higher than its own hard
    negative. `matching_accuracy`: is the pair of image and text a true one, yes or no, asked of both captions."""

    text_r1: Share
    image_r1: Share
    hard_negative_accuracy: Share
    matching_accuracy: Share | None  # None for CLIP, which has no yes or no
    attributes: dict[str, Share]  # `hard_negative_accuracy`, by the attribute that is false
    right: dict[str, list[bool]] = field(repr=False)  # of the first three, for paired comparisons


@torch.inference_mode()
def embeddings(
    model: nn.Module | ExportedDual, images: Sequence | None = None, texts: Sequence | None = None, batch_size=100, progress=True
) -> Tensor:
    """Unit vectors (N, D), float32, of PIL images or of texts, by the model's own processor.
    Raises ParityError when they are not finite: such a model is broken, not lossy.
    >>> embeddings(dual, texts=["a red circle", "a blue star"]).norm(dim=1).round().tolist()
    [1.0, 1.0]
    """
    if (images is None) == (texts is None):
        raise UserError("embeddings: give either images or texts, not both and not neither")
    if isinstance(model, ExportedDual):
        return torch.from_numpy(model.embed_texts(texts) if images is None else model.embed_images(images))
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise UserError(f"embeddings: {type(model).__name__} is no dual encoder; expected SigLIP, CLIP or their kin")
    given, found, processor = images if texts is None else texts, [], model.processor
    longest = model.config.text_config.max_position_embeddings
    hidden = quiet.progress_hidden() or not progress
    for i in tqdm(range(0, len(given), batch_size), disable=hidden, desc="embedding", leave=False):
        part = list(given[i : i + batch_size])
        if texts is None:
            part = [image.convert("RGB") for image in part]
            inputs = processor(images=part, return_tensors="pt").to(model.device, model.dtype)
            out = model.get_image_features(**inputs)
        else:
            inputs = processor(text=part, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
            out = model.get_text_features(**inputs.to(model.device))
        found.append((out if isinstance(out, Tensor) else out.pooler_output).float())
    vectors = F.normalize(torch.cat(found), dim=-1)
    if not torch.isfinite(vectors).all():
        raise ParityError("the model's embeddings are not finite: it is broken, not lossy; check the step that made it")
    return vectors


@dataclass(frozen=True)
class Gallery:
    """Images and captions of one split: row i of each belongs to scene i."""

    images: list[Image.Image]
    captions: list[str]
    near_images: list[Image.Image]  # with one object changed, as the hard negative says
    negatives: list[str]
    attributes: list[str]  # what is false in the hard negative


def gallery(split: str = "test", n: int = 1000, start: int = 0) -> Gallery:
    """`n` scenes of `split`, short captions (colour and shape), each with a hard negative as a caption and as an image.
    >>> len(gallery(n=2).negatives)
    2
    """
    drawn = [scenes.make_scene(seed) for seed in SPLITS[split][start : start + n]]
    near = [scenes.changed(s) for s in drawn]
    true = [scenes.render(s) for s in drawn], [caption(s) for s in drawn]
    return Gallery(*true, [scenes.render(s) for s, _ in near], [caption(s) for s, _ in near], [key for _, key in near])


def retrieval_scores(model: nn.Module | ExportedDual, seen: Gallery, pool: int = POOL) -> RetrievalResult:
    """Both ways of retrieval, matching and telling apart on `seen`, whose length is a multiple of `pool`.
    >>> retrieval_scores(dual, gallery(n=4), pool=4).text_r1.n
    4
    """
    n = len(seen.images)
    if not n or n % pool:
        raise UserError(f"retrieval: {n} scenes in pools of {pool}; expected a multiple of the pool, at least one")
    image, near = embeddings(model, seen.images), embeddings(model, seen.near_images)
    true, wrong = embeddings(model, texts=seen.captions), embeddings(model, texts=seen.negatives)
    text_r1, image_r1 = [], []
    for i in range(0, n, pool):
        part, own = slice(i, i + pool), torch.arange(pool, device=image.device)
        text_r1 += ((image[part] @ torch.cat([true[part], wrong[part]]).T).argmax(-1) == own).tolist()
        image_r1 += ((true[part] @ torch.cat([image[part], near[part]]).T).argmax(-1) == own).tolist()
    fits, fails = (image * true).sum(-1), (image * wrong).sum(-1)
    told = (fits > fails).tolist()
    matching_accuracy, border = None, None  # the cosine at which it says yes
    if isinstance(model, ExportedDual) and model.manifest["logit_bias"] is not None:
        border = -model.manifest["logit_bias"] / model.manifest["logit_scale"]
    elif hasattr(model, "logit_bias"):
        border = -model.logit_bias.float() / model.logit_scale.float().exp()
    if border is not None:
        matching_accuracy = wilson(int((fits > border).sum() + (fails <= border).sum()), 2 * n)
    kinds = {k: [t for t, key in zip(told, seen.attributes, strict=True) if key == k] for k in sorted(set(seen.attributes))}
    attributes = {k: wilson(sum(v), len(v)) for k, v in kinds.items()}
    right = {"text_r1": text_r1, "image_r1": image_r1, "hard_negative_accuracy": told}
    return RetrievalResult(*(wilson(sum(v), n) for v in right.values()), matching_accuracy, attributes, right)


def image_text_matching(model: nn.Module, split: str = "test", n: int = 1000) -> tuple[Share, Share, list[bool]]:
    """Image-text matching by a VLM: it is asked whether an object is there, and whether one is whose colour or shape is false.
    Shares of right answers among 2 `n`, and of images with both right; the latter one by one. Raises UserError for a dual
    encoder, which cannot be asked, or fewer than one image.
    >>> image_text_matching(model, n=2)[0].n
    4
    """
    if n < 1 or "head" not in parts(model):
        raise UserError(f"asked: {n} images, {type(model).__name__}; expected one or more, and a model that answers questions")
    drawn = [scenes.make_scene(seed) for seed in SPLITS[split][:n]]
    near = [scenes.changed(s)[0] for s in drawn]
    moved = [next((a, b) for a, b in zip(s.things, t.things, strict=True) if a != b) for s, t in zip(drawn, near, strict=True)]
    images, right = [scenes.render(s) for s in drawn], []
    for names, answer in (([a.name for a, _ in moved], "yes"), ([b.name for _, b in moved], "no")):
        found = answers(model, images, [f"Is there a {name}?" for name in names])
        right.append([f.lower() == answer for f in found])
    both = [a and b for a, b in zip(*right, strict=True)]
    return wilson(sum(map(sum, right)), 2 * n), wilson(sum(both), n), both


def zero_shot(model: nn.Module, split: str = "test", n: int = 1000) -> dict[str, Share]:
    """Naming without training for it: one object's attribute in a full caption is tried in all its values; the best one counts.
    For colour (8 values), shape (6) and size (2), one object of each of `n` scenes; names that another object has are left out.
    >>> list(zero_shot(dual, n=2))
    ['colour', 'shape', 'size']
    """
    drawn = [scenes.make_scene(seed) for seed in SPLITS[split][:n]]
    image, found = embeddings(model, [scenes.render(s) for s in drawn]), {}
    for attribute, values in CHOICES.items():
        tried = [_variants(scene, k % len(scene.things), attribute, values) for k, scene in enumerate(drawn)]
        owners = [k for k, texts in enumerate(tried) for _ in texts]
        scores = (image[owners] * embeddings(model, texts=[t for texts in tried for t in texts])).sum(-1).cpu()
        each = scores.split([len(texts) for texts in tried])
        found[attribute] = wilson(sum(bool(s[0] > s[1:].max()) for s in each), n)  # the true one is first; a tie is not right
    return found


def _variants(scene: Scene, at: int, attribute: str, values: Sequence[str]) -> list[str]:
    thing, rest = scene.things[at], scene.things[:at] + scene.things[at + 1 :]
    tried = [thing, *(replace(thing, **{attribute: v}) for v in values if v != getattr(thing, attribute))]
    free = [t for t in tried if t.name not in {other.name for other in rest}]
    return [caption(replace(scene, things=(*rest, t)), full=True) for t in free]


def retrieval_report(model: nn.Module, n: int = 1000) -> dict[str, Share]:
    """All of the above on the test split, {what: share}, on `n` scenes: a multiple of POOL.
    >>> retrieval_report(dual, POOL)["text_r1"].n
    100
    """
    found = retrieval_scores(model, gallery(n=n))
    shares = {"text_r1": found.text_r1, "image_r1": found.image_r1, "hard_negative_accuracy": found.hard_negative_accuracy}
    shares |= {f"hard_negative_accuracy, {k}": v for k, v in found.attributes.items()}
    shares |= {"matching_accuracy": found.matching_accuracy} if found.matching_accuracy else {}
    return shares | {f"zero-shot {k}": v for k, v in zero_shot(model, n=n).items()}


@torch.inference_mode()
def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance between the mean image and text embeddings, unit vectors (N, D) each (Liang et al., arXiv:2203.02053).
    >>> modality_gap(torch.eye(2), torch.eye(2))
    0.0
    """
    return (image.mean(0) - text.mean(0)).norm().item()
