"""`mini-cnn`: a MobileNetV2 that names what (colour, shape) covers each of an image's 8 x 8 cells. Chapter 1 quantizes it.

The library's own class with its own segmentation head, trained from nothing in minutes on targets of `mini-vlm`'s first stage.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.data import scenes
from mmrecipes.data.scenes import SHAPES, Scene
from mmrecipes.data.splits import SPLITS, block
from mmrecipes.mini.batches import NAMES, VisionBatches
from mmrecipes.mini.labels import patch_labels, pixels
from mmrecipes.mini.model import GRID, IMAGE_SIZE
from mmrecipes.models import saving
from mmrecipes.train.loop import TrainConfig, fit, main_process, read_log

CLASSES = ("nothing", *NAMES)
CONFIG = TrainConfig(900, 32, 0.02, 0.004)


def make_cnn(seed: int = 0):  # -> transformers.MobileNetV2ForSemanticSegmentation
    """MobileNetV2 with an 8 x 8 output of 49 classes for 128 px images, random weights, float32, in training mode."""
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
    """Patch labels (..., 64, 9), as `patch_labels` gives them -> classes (..., 8, 8), indices into CLASSES."""
    there, colour, shape = labels[..., 0], labels[..., 1], labels[..., 2]
    return (there * (1 + colour * len(SHAPES) + shape)).reshape(*labels.shape[:-2], GRID, GRID)


def train_mini_cnn(out: Path, work: Path = Path("runs/mini-cnn"), config: TrainConfig = CONFIG) -> Path:
    """Train `mini-cnn` from nothing into directory `out`, with its log: minutes on two CPU cores. Returns `out`.
    A killed run goes on where its last checkpoint in `work` was. Raises UserError when `out` holds something that is not a model,
    before any work, and as `train.fit` does.
    """
    saving.check_replaceable(out)
    model = make_cnn()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        return model(batch[0], labels=cells(batch[1])).loss, {}

    fit(model, VisionBatches(block("mini-cnn/images"), config.steps, config.batch), loss, config, work)
    if not main_process():
        return out
    every = max(1, config.steps // 100)
    history = {"steps": config.steps, "batch": config.batch, "lr": config.lr}
    history["log"] = {k: v[::every] for k, v in read_log(work).items()}
    return saving.save(model.eval(), make_image_processor(), out, torch.bfloat16, {"training.json": json.dumps(history)})


def images(split: str, n: int) -> Tensor:
    """The first `n` images of a split of `data.SPLITS`: pixels (n, 3, 128, 128) in [-1, 1]."""
    return torch.from_numpy(np.stack([pixels(scenes.make_scene(s)) for s in SPLITS[split][:n]]))


def named(logits_of: Callable[[Tensor], Tensor], drawn: list[Scene], batch: int = 50) -> list[bool]:
    """For each object of the scenes: is the class that its cells vote for its own colour and shape?
    `logits_of` takes pixels (B, 3, 128, 128) in [-1, 1] and gives logits (B, 49, 8, 8): a model in any runtime.
    """
    right = []
    for part in (drawn[i : i + batch] for i in range(0, len(drawn), batch)):
        with torch.inference_mode():
            logits = logits_of(torch.from_numpy(np.stack([pixels(s) for s in part])))
        for scene, votes in zip(part, logits.flatten(2).transpose(1, 2), strict=True):  # votes (64, 49)
            labels, centres = patch_labels(scene)
            for t in scene.things:
                mine = torch.from_numpy((centres == np.float32((t.x, t.y))).all(-1) & (labels[:, 0] == 1))
                guess = CLASSES[int(votes[mine].sum(0).argmax())] if mine.any() else ""
                right.append(guess == t.name)
    return right
