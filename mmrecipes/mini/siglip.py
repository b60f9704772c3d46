"""`mini-siglip`: the library's own dual encoder (SigLIP, arXiv:2303.15343) at a size that trains at home. Chapter 3 shrinks it.

First its vision encoder alone learns patch by patch what the scene's ground truth says, then both learn from captions.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.data.splits import block
from mmrecipes.distill.losses import embed, siglip_loss
from mmrecipes.mini.batches import CAPTION_LENGTH, CaptionBatches, VisionBatches
from mmrecipes.mini.labels import CaptionBatch
from mmrecipes.mini.losses import Probes
from mmrecipes.mini.model import GRID, IMAGE_SIZE, PATCH, make_tokenizer, sincos_positions
from mmrecipes.models import saving
from mmrecipes.train.loop import TrainConfig, fit, main_process, read_log

STAGES = {"dense": TrainConfig(1000, 64, 0.005, 1.5e-3), "contrast": TrainConfig(2000, 64, 0.004, 1e-3)}


def make_processor():  # -> transformers.SiglipProcessor
    """SigLIP's real processor for 128 px images, with the tokenizer of `mini-vlm`; pads to full length, which SigLIP needs."""
    from transformers import SiglipImageProcessorPil, SiglipProcessor

    tokenizer = make_tokenizer()
    tokenizer.model_max_length, tokenizer.padding_side = CAPTION_LENGTH, "right"
    # the text encoder is read at the last token, which must always be the same one, as in SigLIP's own tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    # SigLIP's text encoder is trained without a mask; what is set here alone, the library does not save
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
    text |= {"max_position_embeddings": CAPTION_LENGTH, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(vision_config=heads | vision, text_config=heads | text))
    with torch.no_grad():
        # positions that attention can use from the first step, as in mini-vlm; and tokens no quieter than their positions
        model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(GRID, width))
        angle = torch.arange(CAPTION_LENGTH)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
        embeddings = model.text_model.embeddings
        embeddings.position_embedding.weight.copy_(torch.cat([angle.sin(), angle.cos()], 1) / 2)
        embeddings.token_embedding.weight.normal_(std=0.5)
        model.logit_scale.fill_(math.log(10))  # as the paper begins: nothing matches, and not sure of it
        model.logit_bias.fill_(-10)
    return model.train()


def with_probes(model: nn.Module, width: int) -> nn.ModuleDict:
    """The model beside two heads that are thrown away: from either encoder's vector, what is there, and what of it is large?"""
    # contrast alone says only which caption is wrong, not in what; in a training of minutes that is too little
    return nn.ModuleDict({"model": model, "names": nn.ModuleDict({k: nn.Linear(width, 96) for k in ("image", "text")})})


def dual_loss(both: nn.ModuleDict, batch: CaptionBatch) -> tuple[Tensor, dict[str, float]]:
    """Contrast against captions and hard negatives, and the auxiliary heads' question; logs how often each is right."""
    model, names = both["model"], both["names"]
    image, text = embed(model, batch.images), embed(model, ids=torch.cat([batch.captions, batch.negatives]))
    loss = siglip_loss(image, text, model.logit_scale, model.logit_bias)
    true, wrong = text.chunk(2)
    guesses = torch.stack([names["image"](image), names["text"](true)]).unflatten(-1, (2, 48))
    missed = F.binary_cross_entropy_with_logits(guesses, batch.there.expand_as(guesses), reduction="none").mean(-1)
    told_of = torch.ones_like(missed)  # (2, B, 2): encoders, rows, presence and size
    told_of[1, :, 1] = batch.sizes.float()  # a short caption tells no sizes
    helped = (missed * told_of).sum((0, 2)).mean()
    with torch.no_grad():
        near = F.normalize(image, dim=-1)
        told = ((near * F.normalize(true, dim=-1)).sum(-1) > (near * F.normalize(wrong, dim=-1)).sum(-1)).float().mean()
        found = (near @ F.normalize(text, dim=-1).T).argmax(-1) == torch.arange(len(image), device=image.device)
    return loss + 10 * helped, {"contrast": loss.item(), "names": helped.item(), "told": told, "r1": found.float().mean()}


def train_mini_siglip(
    out: Path, work: Path = Path("runs/mini-siglip"), stages: Mapping[str, TrainConfig] | None = None, device: str | None = None
) -> Path:
    """Train `mini-siglip` from nothing into directory `out`; a killed run goes on at its last checkpoint. Returns `out`.
    Raises UserError when `out` holds something that is not a model, before any work, and as `train.fit` does.
    """
    saving.check_replaceable(out)
    processor = make_processor()
    stages = {name: replace(config, device=device or config.device) for name, config in (stages or STAGES).items()}
    dense, contrast = stages["dense"], stages["contrast"]
    model = make_siglip(len(processor.tokenizer))
    width = model.config.vision_config.hidden_size
    encoder = nn.ModuleDict({"encoder": model.vision_model, "probes": Probes(width)})

    def dense_loss(both: nn.ModuleDict, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        return both["probes"].patches(both["encoder"](batch[0]).last_hidden_state, *batch[1:])

    fit(encoder, VisionBatches(block("mini-siglip/images"), dense.steps, dense.batch), dense_loss, dense, work / "dense")
    batches = CaptionBatches(block("mini-siglip/captions"), contrast.steps, contrast.batch, processor.tokenizer)
    fit(with_probes(model, width), batches, dual_loss, contrast, work / "contrast")
    if not main_process():
        return out
    history = {name: {k: v[::20] for k, v in read_log(work / name).items()} for name in stages}
    return saving.save(model.eval(), processor, out, dtype=torch.bfloat16, extra={"training.json": json.dumps(history)})
