"""Trains `mini-resampler`, which takes images of any size and shape, on from `mini-vlm`'s vision encoder and language model.

As in the field, both come trained and the resampler between them does not. It begins as local averages: each query looks at the
patches around a place of its own, so that what `mini-vlm` knows is of use from the first step. The vision encoder knows one size
of image alone: first it learns to see at every size what it sees at that one (feature distillation, without any labels).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmrecipes.data import families, scenes
from mmrecipes.data.scenes import Scene
from mmrecipes.data.splits import block
from mmrecipes.mini import losses
from mmrecipes.mini import modeling_mini_resampler as modeling
from mmrecipes.mini.batches import ChatBatches, SceneBatches
from mmrecipes.mini.labels import ChatBatch, pixels
from mmrecipes.mini.model import CHAT_TEMPLATE, PATCH, VISUAL_TOKENS
from mmrecipes.models import loading, saving
from mmrecipes.models.prompts import Rows
from mmrecipes.train.loop import TrainConfig, fit, main_process, read_log

SMALLEST, LARGEST = 96, 384  # px a side
STAGES = {
    "sizes": TrainConfig(1200, 16, 0.004, 1e-3),  # the vision encoder, taught by what it sees at 128 px
    "connect": TrainConfig(100, 16, 0.002, 1e-3),  # the resampler
    "joint": TrainConfig(1500, 16, 0.0007, 2e-4),  # all of it, on questions
}


def make_processor(tokenizer):  # -> transformers.Idefics2Processor
    """The library's own: an image keeps its shape, sides from SMALLEST to LARGEST px, and becomes 64 placeholders."""
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor

    sides, half = {"shortest_edge": SMALLEST, "longest_edge": LARGEST}, [0.5] * 3
    images = Idefics2ImageProcessorPil(size=sides, image_mean=half, image_std=half, do_image_splitting=False)
    return Idefics2Processor(images, tokenizer, image_seq_len=VISUAL_TOKENS, chat_template=CHAT_TEMPLATE)


def make_resampler(source: nn.Module):  # -> MiniResamplerForConditionalGeneration
    """A `mini-resampler` with the vision encoder and language model of `source`, a `mini-vlm`; float32, in training mode."""
    own = source.config
    vision = {k: getattr(own.vision_config, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")}
    vision |= {"num_attention_heads": own.vision_config.num_attention_heads, "image_size": LARGEST, "patch_size": PATCH}
    config = modeling.MiniResamplerConfig(
        vision_config=vision | {"layer_norm_eps": own.vision_config.layer_norm_eps},
        text_config=own.text_config.to_dict(),
        image_token_id=own.image_token_id,
    )
    torch.manual_seed(0)
    model = modeling.MiniResamplerForConditionalGeneration(config)
    vision, core = source.model.vision_model, model.model
    core.text_model.load_state_dict(source.model.text_model.state_dict())
    core.vision_model.encoder.load_state_dict(vision.encoder.state_dict())
    core.vision_model.post_layernorm.load_state_dict(vision.post_layernorm.state_dict())
    core.vision_model.patch_embedding.load_state_dict(vision.embeddings.patch_embedding.state_dict())
    learned = vision.embeddings.position_embedding.weight.detach()  # (side * side, width)
    grid = learned.T.unflatten(1, (int(len(learned) ** 0.5), -1))[None]
    finer = F.interpolate(grid, size=(core.vision_model.side,) * 2, mode="bilinear")[0]
    with torch.no_grad():
        core.vision_model.position_embedding.weight.copy_(finer.flatten(1).T)
    _look_around_(core.resampler, config.queries_per_side)
    images = torch.stack([torch.from_numpy(pixels(scenes.make_scene(seed))) for seed in block("seen")[:16]])
    with torch.no_grad():
        features = vision(images).last_hidden_state  # the resampler's last norm gives them their size again
        core.resampler.ln_post.weight.fill_(features.std(-1).mean())
        core.resampler.ln_post.bias.fill_(features.mean())
        core.resampler.proj.copy_(source.model.connector.modality_projection.proj.weight.T)
    model.generation_config = source.generation_config
    model.processor = make_processor(source.processor.tokenizer)
    return model.train()


@torch.no_grad()
def _look_around_(resampler: nn.Module, side: int) -> None:
    """Each query attends to the patches around its own place in a square grid; values pass through unchanged."""
    width, attention = resampler.query.shape[1], resampler.attn
    grid = torch.ones(1, side, side, dtype=torch.bool)
    resampler.query.copy_(modeling.sincos(modeling.places(grid)[0], width))
    for matrix in (resampler.kv_proj.weight, attention.out_proj.weight):
        nn.init.eye_(matrix)
    resampler.ln_kv.weight.fill_(0.25)  # positions outweigh what a patch shows, in keys
    attention.in_proj_weight.copy_(torch.cat([4 * torch.eye(width), torch.eye(width), 4 * torch.eye(width)]))
    nn.init.zeros_(attention.in_proj_bias)


def drawn_size(rng: np.random.Generator) -> tuple[int, tuple[int, int]]:
    """A scene's side, and the size (width, height) of an image that holds it: square, half as long again, or twice as long."""
    side = int(rng.integers(SMALLEST, LARGEST + 1))
    longer = min(LARGEST, int(side * rng.choice((1, 1, 1.5, 2))))
    return side, (longer, side) if rng.random() < 0.5 else (side, longer)


def normalized(images: list[Image.Image]) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of images of one size, as the processor makes them."""
    return torch.from_numpy(np.stack([np.asarray(i, np.float32) for i in images])).permute(0, 3, 1, 2) / 127.5 - 1


class TwoSizes(SceneBatches):
    """Batch `i`: scenes at a drawn size (B, 3, H, W), at 128 px (B, 3, 128, 128), and which patches of the first, (B, rows,
    columns), show the scene, which lies at a whole number of patches."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        rng, drawn = np.random.default_rng(i), self.draw(i)
        side, size = drawn_size(rng)
        side, (width, height) = side - side % PATCH, (n - n % PATCH for n in size)
        left, top = (int(rng.integers(0, (n - side) // PATCH + 1)) for n in (width, height))
        images = []
        for scene in drawn:
            images.append(Image.new("RGB", (width, height), scene.background))
            images[-1].paste(scenes.render(scene, side), (left * PATCH, top * PATCH))
        inside = torch.zeros(len(drawn), height // PATCH, width // PATCH, dtype=torch.bool)
        inside[:, top : top + side // PATCH, left : left + side // PATCH] = True
        return normalized(images), torch.from_numpy(np.stack([pixels(scene) for scene in drawn])), inside


def sizes_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], teacher: nn.Module) -> tuple[Tensor, dict[str, float]]:
    """How far the features of a scene, averaged over a coarse grid, are from `teacher`'s at 128 px: mean squared error of
    normalized features, from 0 (equal) to about 2 (unrelated)."""
    images, small, inside = batch
    features = model.model.vision_model(images).last_hidden_state
    with torch.no_grad():
        known = teacher(small).last_hidden_state
    coarse = []
    side = min(int(inside[0].sum() ** 0.5), int(known.shape[1] ** 0.5))
    for own in (features[inside.flatten(1)].unflatten(0, (len(images), -1)), known):
        square = own.transpose(1, 2).unflatten(2, (int(own.shape[1] ** 0.5), -1)).float()
        averages = F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)
        coarse.append(F.layer_norm(averages, averages.shape[-1:]))
    return F.mse_loss(*coarse), {}


class ResizedChats(ChatBatches):
    """`ChatBatches` on images of SMALLEST to LARGEST px, wide, square or tall: one size a batch, each scene somewhere in it."""

    def __init__(self, seeds: range, steps: int, batch: int, tokenizer):
        super().__init__(seeds, steps, batch, tokenizer)
        image = "<image>" * VISUAL_TOKENS
        self.prefix = self.ids(f"<|im_start|>User:<fake_token_around_image>{image}<fake_token_around_image>")

    def __getitem__(self, i: int) -> ChatBatch:
        rng = np.random.default_rng(i)
        side, size = drawn_size(rng)
        images = [placed(scene, side, size, rng.random()) for scene in self.draw(i)]
        return super().__getitem__(i)._replace(images=normalized(images))

    def _question(self, scene: Scene, family: str, n: int) -> families.Question:
        asked = super()._question(scene, family, n)
        return replace(asked, text=f" {asked.text}")  # Idefics2's processor puts a space behind an image


def placed(scene: Scene, side: int, size: tuple[int, int], at: float = 0.5) -> Image.Image:
    """The scene, `side` px square, on a larger ground of `size` (width, height), `at` from 0 (left, top) to 1 (right, bottom)."""
    ground = Image.new("RGB", size, scene.background)
    ground.paste(scenes.render(scene, side), (round(at * (size[0] - side)), round(at * (size[1] - side))))
    return ground


def resized(rows: Rows, size: tuple[int, int]) -> dict[str, list]:
    """The questions of `rows` about the same scenes drawn anew at `size` (width, height) px: as wide or tall as that."""
    images = [placed(scenes.make_scene(seed), min(size), size) for seed in rows["seed"][:]]
    return {name: rows[name][:] for name in ("question", "answer", "family")} | {"image": images}


def loss(model: nn.Module, batch: ChatBatch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens, in nats, and the share of right answers per family."""
    core = model.model
    rows, columns = (n // PATCH for n in batch.images.shape[-2:])
    patch_mask = torch.ones(len(batch.images), rows, columns, dtype=torch.bool, device=batch.ids.device)
    visual = core.resampler(core.vision_model(batch.images, patch_mask).last_hidden_state, patch_mask)
    out, _ = losses.packed_pass(core, visual, batch)
    here = batch.answers[:, 1:] >= 0
    logits, want = model.lm_head(out.last_hidden_state[:, :-1][here]), batch.answers[:, 1:][here]
    answer = F.cross_entropy(logits.float(), want)
    right = losses.family_accuracy(logits.argmax(-1) == want, here, batch.segments[:, 1:], batch.kinds)
    return answer, {"answer": answer.item(), **right}


def train_mini_resampler(
    out: Path,
    work: Path = Path("runs/mini-resampler"),
    stages: Mapping[str, TrainConfig] | None = None,
    device: str | None = None,
) -> Path:
    """Train `mini-resampler` into directory `out`: its vision encoder, its resampler, then all of it. A killed run goes on at its
    last checkpoint in `work`. Returns `out`. Raises UserError when `out` holds something that is not a model, before any work,
    where there is no `mini-vlm`, and as `train.fit` does.
    """
    saving.check_replaceable(out)
    stages = {name: replace(c, device=device or c.device, about=name) for name, c in (stages or STAGES).items()}
    source, start = loading.load("mini-vlm"), 0
    model, teacher = make_resampler(source), source.model.vision_model.requires_grad_(False)
    processor, seeds = model.processor, block("mini-resampler/chat")
    trained = {"sizes": model.model.vision_model, "connect": model.model.resampler, "joint": model}
    for name, config in stages.items():
        model.requires_grad_(False)
        trained[name].requires_grad_(True)
        kind = TwoSizes if name == "sizes" else ResizedChats
        drawn = _From(kind(seeds, start + config.steps, config.batch, processor.tokenizer), start)
        objective = partial(sizes_loss, teacher=teacher) if name == "sizes" else loss
        fit(model, drawn, objective, config, work / name)
        start += config.steps
    if not main_process():
        return out
    history: dict[str, Any] = {name: {k: v[::10] for k, v in read_log(work / name).items()} for name in stages}
    for kind, auto in ((modeling.MiniResamplerConfig, "AutoConfig"), (type(model), "AutoModelForImageTextToText")):
        kind.register_for_auto_class(auto)  # its code is saved beside the weights
    return saving.save(model.eval().cpu(), processor, out, torch.bfloat16, {"training.json": json.dumps(history)})


class _From(torch.utils.data.Dataset):
    """The batches from `start` on: no stage sees a scene of another."""

    def __init__(self, batches: SceneBatches, start: int):
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __getitem__(self, i: int):
        return self.batches[self.start + i]
