"""`mini-cnn`: a MobileNetV2 that names what lies in each cell of a picture. Chapter 1 quantizes it statically.

The library's own class with its own segmentation head, trained from nothing in minutes on the same targets as the first stage
of `mini-vlm`: which (colour, shape) covers each of 8 x 8 cells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes import checks, evaluate, scenes
from mmrecipes.errors import UserError
from mmrecipes.house import GRID, IMAGE_SIZE
from mmrecipes.lessons import VisionBatches, patch_labels, pixels
from mmrecipes.muon import schedule
from mmrecipes.scenes import COLOURS, SHAPES, Scene

CLASSES = ("nothing", *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))


def make_cnn(seed: int = 0):  # -> transformers.MobileNetV2ForSemanticSegmentation
    """MobileNetV2 with an 8 x 8 output of 49 classes for 128 px pictures, random weights, float32, in training mode."""
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    torch.manual_seed(seed)
    config = MobileNetV2Config(
        image_size=IMAGE_SIZE,
        output_stride=IMAGE_SIZE // GRID,
        tf_padding=False,  # plain symmetric padding: what exporters and other runtimes do best
        classifier_dropout_prob=0.1,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return MobileNetV2ForSemanticSegmentation(config).train()


def make_image_processor():  # -> transformers.MobileNetV2ImageProcessorPil
    """The library's own image processor, set to 128 px and pixels in [-1, 1]."""
    from transformers import MobileNetV2ImageProcessorPil

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MobileNetV2ImageProcessorPil(size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def cells(labels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Patch labels (..., 64, 9), as `lessons.patch_labels` gives them -> classes (..., 8, 8), indices into CLASSES."""
    there, colour, shape = labels[..., 0], labels[..., 1], labels[..., 2]
    return (there * (1 + colour * len(SHAPES) + shape)).reshape(*labels.shape[:-2], GRID, GRID)


def train_mini_cnn(
    out: Path, steps: int = 600, batch: int = 32, lr: float = 2e-3, device: str | None = None, progress=True
) -> Path:
    """Train `mini-cnn` from nothing into directory `out`: minutes on two CPU cores. Returns `out`."""
    from rich.progress import track

    from mmrecipes import models

    checks.check_replaceable(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = make_cnn().to(device)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    stepper = torch.optim.AdamW(groups, lr=lr)
    batches = VisionBatches(0, steps, batch)
    for step in track(range(steps), "mini-cnn", disable=not progress):
        images, labels, _ = batches[step]
        for group in stepper.param_groups:
            group["lr"] = lr * schedule(step, steps)
        loss = model(images.to(device), labels=cells(labels).to(device)).loss
        if not torch.isfinite(loss):
            raise UserError(f"train: the loss of step {step} is {loss.item()}; lower lr (it is {lr})")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return models.save(model.eval(), make_image_processor(), out, dtype=torch.bfloat16)


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


def accuracy(logits_of: Callable[[Tensor], Tensor], n: int = 1000) -> evaluate.Share:
    """Share of the objects in `n` test pictures that are named right, with its interval."""
    right = named(logits_of, [scenes.make_scene(s) for s in scenes.SPLITS["test"][:n]])
    return evaluate.wilson(sum(right), len(right))
