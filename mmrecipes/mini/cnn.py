"""`mini-cnn`: a MobileNetV2 that names what lies in each cell of a picture. Chapter 1 quantizes it statically.

The library's own class with its own segmentation head, trained from nothing in minutes on the same targets as the first stage
of `mini-vlm`: which (colour, shape) covers each of 8 x 8 cells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.data import scenes, splits
from mmrecipes.data.scenes import COLOURS, SHAPES, Scene
from mmrecipes.errors import UserError
from mmrecipes.evaluate import statistics
from mmrecipes.mini.batches import VisionBatches, patch_labels, pixels
from mmrecipes.mini.model import GRID, IMAGE_SIZE
from mmrecipes.models import saving
from mmrecipes.train.optim import Muon, schedule

CLASSES = ("nothing", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))


def make_cnn(seed: int = 0):  # -> transformers.MobileNetV2ForSemanticSegmentation
    """MobileNetV2 with an 8 x 8 output of 49 classes for 128 px pictures, random weights, float32, in training mode."""
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    torch.manual_seed(seed)
    config = MobileNetV2Config(
        image_size=IMAGE_SIZE,
        depth_multiplier=0.5,  # half the channels: minutes of training, not an hour
        output_stride=IMAGE_SIZE // GRID,
        tf_padding=False,  # plain symmetric padding: what exporters and other runtimes do best
        classifier_dropout_prob=0.1,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    model = MobileNetV2ForSemanticSegmentation(config).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1  # the library took TensorFlow's 0.997, which here means: the last batch alone
    return model


def make_image_processor():  # -> transformers.MobileNetV2ImageProcessorPil
    """The library's own image processor, set to 128 px and pixels in [-1, 1]."""
    from transformers import MobileNetV2ImageProcessorPil

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MobileNetV2ImageProcessorPil(size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def cells(labels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Patch labels (..., 64, 9), as `mini.batches.patch_labels` gives them -> classes (..., 8, 8), indices into CLASSES."""
    there, colour, shape = labels[..., 0], labels[..., 1], labels[..., 2]
    return (there * (1 + colour * len(SHAPES) + shape)).reshape(*labels.shape[:-2], GRID, GRID)


def train_mini_cnn(
    out: Path, steps: int = 900, batch: int = 32, lr: float = 0.02, device: str | None = None, progress: bool = True
) -> Path:
    """Train `mini-cnn` from nothing into directory `out`, with its log: minutes on two CPU cores. Returns `out`."""
    from rich.progress import Progress

    saving.check_replaceable(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, log, start = make_cnn().to(device), [], time.perf_counter()
    dense = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]  # depthwise convolutions mix no channels
    rest = [p for p in model.parameters() if p.ndim != 4 or p.shape[1] == 1]
    steppers = [Muon(dense, lr), torch.optim.AdamW(rest, lr / 5, weight_decay=0.0)]
    rates = [lr, lr / 5]
    batches = VisionBatches(0, steps, batch)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("mini-cnn", total=steps)
        for step in range(steps):
            images, labels, _ = batches[step]
            loss = model(images.to(device), labels=cells(labels).to(device)).loss
            if not torch.isfinite(loss):
                raise UserError(f"train: the loss of step {step} is {loss.item()}; lower lr (it is {lr})")
            loss.backward()
            for stepper, rate in zip(steppers, rates, strict=True):
                stepper.param_groups[0]["lr"] = rate * schedule(step, steps)
                stepper.step()
            model.zero_grad()
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - start, 1)})
            bar.update(task, advance=1, description=f"mini-cnn, loss {loss.item():.2f}")
    made = {"training.json": json.dumps({"steps": steps, "batch": batch, "lr": lr, "log": log[:: max(1, steps // 100)]})}
    return saving.save(model.eval(), make_image_processor(), out, dtype=torch.bfloat16, extra=made)


def pictures(split: str, n: int) -> Tensor:
    """The first `n` pictures of a split of `data.SPLITS`: pixels (n, 3, 128, 128) in [-1, 1]."""
    return torch.from_numpy(np.stack([pixels(scenes.make_scene(s)) for s in splits.SPLITS[split][:n]]))


def named(logits_of: Callable[[Tensor], Tensor], drawn: list[Scene], batch: int = 50) -> list[bool]:
    """For each object of the scenes: is the class that its cells vote for its own colour and shape?

    `logits_of` takes pixels (B, 3, 128, 128) in [-1, 1] and gives logits (B, 49, 8, 8): a model in any runtime.
    """
    right = []
    for i in range(0, len(drawn), batch):
        part = drawn[i : i + batch]
        with torch.inference_mode():
            logits = logits_of(torch.from_numpy(np.stack([pixels(s) for s in part])))
        for scene, votes in zip(part, logits.flatten(2).transpose(1, 2), strict=True):  # votes (64, 49)
            labels, centres = patch_labels(scene)
            for t in scene.things:
                mine = torch.from_numpy((centres == np.float32((t.x, t.y))).all(-1) & (labels[:, 0] == 1))
                guess = CLASSES[int(votes[mine].sum(0).argmax())] if mine.any() else ""
                right.append(guess == t.name)
    return right


def accuracy(logits_of: Callable[[Tensor], Tensor], n: int = 1000) -> statistics.Share:
    """Share of the objects in `n` test pictures that are named right, with its interval."""
    right = named(logits_of, [scenes.make_scene(s) for s in splits.SPLITS["test"][:n]])
    return statistics.wilson(sum(right), len(right))
