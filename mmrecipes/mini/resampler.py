"""Trains `mini-resampler`, which takes images of any size and shape, on from `mini-vlm`'s vision encoder and language model.

As in the field, both come trained and the resampler between them does not. It begins as local averages: each query looks at the
patches around a place of its own, so that what `mini-vlm` knows is of use from the first step.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
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
from mmrecipes.mini.batches import ChatBatches
from mmrecipes.mini.labels import ChatBatch, pixels
from mmrecipes.mini.model import CHAT_TEMPLATE, PATCH, VISUAL_TOKENS
from mmrecipes.models import loading, saving
from mmrecipes.models.prompts import Rows
from mmrecipes.train.loop import TrainConfig, fit, main_process, read_log

SMALLEST, LARGEST = 96, 384  # px a side
STAGES = {"connect": TrainConfig(300, 16, 0.004, 1e-3), "joint": TrainConfig(3000, 16, 0.002, 5e-4)}


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


class ResizedChats(ChatBatches):
    """`ChatBatches` on images of SMALLEST to LARGEST px, wide, square or tall: one size a batch, each scene somewhere in it."""

    def __init__(self, seeds: range, steps: int, batch: int, tokenizer):
        super().__init__(seeds, steps, batch, tokenizer)
        image = "<image>" * VISUAL_TOKENS
        self.prefix = self.ids(f"<|im_start|>User:<fake_token_around_image>{image}<fake_token_around_image>")

    def __getitem__(self, i: int) -> ChatBatch:
        rng = np.random.default_rng(i)
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        longer = min(LARGEST, int(side * rng.choice((1, 1, 1.5, 2))))
        size = (longer, side) if rng.random() < 0.5 else (side, longer)
        images = [np.asarray(placed(scene, side, size, rng.random()), np.float32) for scene in self.draw(i)]
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        return super().__getitem__(i)._replace(images=stacked)

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
    """Train `mini-resampler` into directory `out`: its resampler first, then all of it. A killed run goes on at its last
    checkpoint in `work`. Returns `out`. Raises UserError when `out` holds something that is not a model, before any work, where
    there is no `mini-vlm`, and as `train.fit` does.
    """
    saving.check_replaceable(out)
    stages = {name: replace(c, device=device or c.device, about=name) for name, c in (stages or STAGES).items()}
    model, start = make_resampler(loading.load("mini-vlm")), 0
    processor, seeds = model.processor, block("mini-resampler/chat")
    for name, config in stages.items():
        model.requires_grad_(name == "joint")
        model.model.resampler.requires_grad_(True)
        drawn = _From(ResizedChats(seeds, start + config.steps, config.batch, processor.tokenizer), start)
        fit(model, drawn, loss, config, work / name)
        start += config.steps
    if not main_process():
        return out
    history: dict[str, Any] = {name: {k: v[::10] for k, v in read_log(work / name).items()} for name in stages}
    for kind, auto in ((modeling.MiniResamplerConfig, "AutoConfig"), (type(model), "AutoModelForImageTextToText")):
        kind.register_for_auto_class(auto)  # its code is saved beside the weights
    return saving.save(model.eval().cpu(), processor, out, torch.bfloat16, {"training.json": json.dumps(history)})


class _From(torch.utils.data.Dataset):
    """The batches from `start` on: no stage sees a scene of another."""

    def __init__(self, batches: ChatBatches, start: int):
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __getitem__(self, i: int) -> ChatBatch:
        return self.batches[self.start + i]
