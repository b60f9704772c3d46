"""`mini-siglip`: a dual encoder, picture and caption into one space. Chapter 3 makes it smaller and keeps its towers aligned.

The library's own class (SigLIP, arXiv:2303.15343) at a size that trains at home, from nothing: first its image tower alone
learns patch by patch what the scene's ground truth says, then both towers learn from pictures and captions.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes import checks, models, scenes
from mmrecipes.fit import Course, fit, log, main_process
from mmrecipes.house import GRID, IMAGE_SIZE, PATCH, make_tokenizer, sincos_positions
from mmrecipes.lessons import VisionBatches, pixels
from mmrecipes.losses import Probes
from mmrecipes.scenes import COLOURS, SHAPES, Scene

LONGEST = 56  # tokens of a caption with its padding: 53 is the longest of 30,000, six objects with size and printed code
STAGES = {"dense": Course(1000, 64, 0.005, 1.5e-3), "contrast": Course(2000, 64, 0.004, 1e-3)}


def make_processor():  # -> transformers.SiglipProcessor
    """SigLIP's real processor for 128 px pictures, with the house tokenizer; pads to full length, which SigLIP needs."""
    from transformers import SiglipImageProcessorPil, SiglipProcessor

    tokenizer = make_tokenizer()
    tokenizer.model_max_length, tokenizer.padding_side = LONGEST, "right"
    # the text tower is read at the last token, which must always be the same one, as in SigLIP's own tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    # SigLIP's text tower is trained without a mask; what is set here alone, the library does not save
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids"]
    images = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return SiglipProcessor(images, tokenizer)


def make_siglip(vocab: int, width: int = 192, vision_layers: int = 4, text_layers: int = 2, seed: int = 0):  # -> SiglipModel
    """A `mini-siglip` with random weights, float32, in training mode. 3.1 million parameters as it is."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    heads = {"num_attention_heads": width // 64, "hidden_size": width}
    vision = {"intermediate_size": 4 * width, "num_hidden_layers": vision_layers, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    text = {"intermediate_size": 2 * width, "num_hidden_layers": text_layers, "vocab_size": vocab, "projection_size": width}
    text |= {"max_position_embeddings": LONGEST, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(vision_config=heads | vision, text_config=heads | text))
    with torch.no_grad():
        # positions that attention can use from the first step, as in mini-vlm; and words no quieter than their places
        model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(GRID, width))
        angle = torch.arange(LONGEST)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
        words = model.text_model.embeddings
        words.position_embedding.weight.copy_(torch.cat([angle.sin(), angle.cos()], 1) / 2)
        words.token_embedding.weight.normal_(std=0.5)
        model.logit_scale.fill_(math.log(10))  # as the paper begins: nothing matches, and not sure of it
        model.logit_bias.fill_(-10)
    return model.train()


class Pairs(NamedTuple):
    """A batch of B pictures with captions."""

    images: Tensor  # (B, 3, 128, 128)
    captions: Tensor  # (B, 56): the true captions' tokens
    negatives: Tensor  # (B, 56): captions with one attribute of one object changed
    there: Tensor  # (B, 2, 48): 1 for each (colour, shape) in the picture; 1 for each that is large
    sizes: Tensor  # (B,): does the caption tell sizes?


class CaptionBatches(Sequence):
    """Batch `i`: pictures, captions, hard negatives. Every other caption is a full one, with sizes and printed codes."""

    def __init__(self, start: int, stop: int, batch: int, tokenizer):
        self.steps, self.batch, self.tokenizer = range(start, stop), batch, tokenizer
        self.names = {f"{c} {s}": i for i, (c, s) in enumerate(itertools.product(COLOURS, SHAPES))}

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Pairs:
        first = self.steps[i] * self.batch
        drawn = [scenes.make_scene(seed) for seed in range(first, first + self.batch)]
        full = [s.seed % 2 == 1 for s in drawn]
        true = [scenes.caption(s, f) for s, f in zip(drawn, full, strict=True)]
        wrong = [scenes.hard_negative(s, full=f)[0] for s, f in zip(drawn, full, strict=True)]
        images = torch.from_numpy(np.stack([pixels(s) for s in drawn]))
        return Pairs(images, self.ids(true), self.ids(wrong), torch.stack([self._there(s) for s in drawn]), torch.tensor(full))

    def ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def _there(self, scene: Scene) -> Tensor:
        found = torch.zeros(2, len(self.names))
        for t in scene.things:
            found[:, self.names[t.name]] = torch.tensor((1.0, float(t.size == "large")))
        return found


class Dual(nn.Module):
    """The model beside two heads that are thrown away: from either tower's vector, what is there, and what of it is large?

    Contrast alone says only which caption is wrong, not in what; in a training of minutes that is too little.
    """

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model = model
        self.names = nn.ModuleDict({"image": nn.Linear(width, 96), "text": nn.Linear(width, 96)})


def embed(model: nn.Module, images: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Pooled vectors of pictures (B, 3, H, W), or of texts (B, T): (B, D), not normalised. SigLIP and CLIP alike."""
    out = model.get_image_features(pixel_values=images) if ids is None else model.get_text_features(input_ids=ids)
    return out if isinstance(out, Tensor) else out.pooler_output


def contrast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: image (B, D) and text (M, D), M >= B, of which row i of both belong together and nothing else does.

    Every pair is a question of its own, yes or no; the sum over all pairs is divided by B. On several processes every picture
    is compared with the texts of all of them.
    """
    with torch.autocast(image.device.type, enabled=False):  # a scale of 100 is too much for 16 bits
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        texts, own = _everywhere(text)
        logits = scale.exp() * image @ texts.T + bias
        sign = 2 * own[: len(image)].to(logits) - 1  # +1 for pairs, -1 elsewhere
        return -F.logsigmoid(sign * logits).sum() / len(image)


def _everywhere(text: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of all processes (P * M, D), and which of them are this one's i-th: (M, P * M)."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return text, torch.eye(len(text), device=text.device)
    from torch.distributed.nn.functional import all_gather

    eye, at = torch.eye(len(text), device=text.device), dist.get_rank()
    own = torch.zeros(len(text), len(text) * dist.get_world_size(), device=text.device)
    own[:, at * len(text) : (at + 1) * len(text)] = eye
    return torch.cat(all_gather(text)), own


def dual_loss(both: Dual, batch: Pairs) -> tuple[Tensor, dict[str, float]]:
    """Contrast against captions and hard negatives, and the helpers' question; logs how often each is right."""
    image = embed(both.model, batch.images)
    text = embed(both.model, ids=torch.cat([batch.captions, batch.negatives]))
    loss = contrast(image, text, both.model.logit_scale, both.model.logit_bias)
    true, wrong = text.chunk(2)
    guesses = torch.stack([both.names["image"](image), both.names["text"](true)]).unflatten(-1, (2, 48))
    missed = F.binary_cross_entropy_with_logits(guesses, batch.there.expand_as(guesses), reduction="none").mean(-1)
    told_of = torch.ones_like(missed)  # (2, B, 2): towers, rows, presence and size
    told_of[1, :, 1] = batch.sizes.float()  # a short caption tells no sizes
    helped = (missed * told_of).sum((0, 2)).mean()
    with torch.no_grad():
        near = F.normalize(image, dim=-1)
        told = ((near * F.normalize(true, dim=-1)).sum(-1) > (near * F.normalize(wrong, dim=-1)).sum(-1)).float().mean()
        found = (near @ F.normalize(text, dim=-1).T).argmax(-1) == torch.arange(len(image), device=image.device)
    return loss + 10 * helped, {"contrast": loss.item(), "names": helped.item(), "told": told, "r1": found.float().mean()}


def dense_loss(both: nn.ModuleDict, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
    """Per patch: what is there? The image tower alone, before it meets words."""
    return both["probes"].patches(both["tower"](batch[0]).last_hidden_state, *batch[1:])


def train_mini_siglip(
    out: Path,
    work: Path = Path("runs/mini-siglip"),
    stages: dict[str, Course] | None = None,
    device: str | None = None,
    every: int = 100,
) -> Path:
    """Train `mini-siglip` from nothing into directory `out`; a killed run goes on at its last checkpoint. Returns `out`."""
    checks.check_replaceable(out)
    stages, processor = stages or STAGES, make_processor()
    model = make_siglip(len(processor.tokenizer))
    width = model.config.vision_config.hidden_size
    dense, after = stages["dense"], stages["contrast"]
    seeing = nn.ModuleDict({"tower": model.vision_model, "probes": Probes(width)})
    fit(seeing, VisionBatches(0, dense.steps, dense.batch), dense_loss, dense, work / "dense", every, device)
    first = dense.steps * dense.batch // after.batch + 1  # pictures that the first stage did not see
    batches = CaptionBatches(first, first + after.steps, after.batch, processor.tokenizer)
    fit(Dual(model, width), batches, dual_loss, after, work / "contrast", every, device)
    if not main_process():
        return out
    history = {name: {k: v[::20] for k, v in log(work / name).items()} for name in stages}
    return models.save(model.eval(), processor, out, dtype=torch.bfloat16, extra={"training.json": json.dumps(history)})
