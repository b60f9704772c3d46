"""mini-vlm with another vision encoder: features first, then the connector, then everything; accuracy, matching, speed.

`run()` returns what results/swap.json says; `python benchmarks/swap.py NAME` trains one encoder alone, so that several can learn
side by side. Trainings and rows are kept in runs/swap as they go: a killed run goes on there. An hour for each encoder on one
core. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmrecipes import cnn, distill, fit, models, swap

WORK = Path(__file__).resolve().parent.parent / "runs" / "swap"
FEATURES = {  # from nothing, and from the weights of mini-cnn, which names what lies in each place (notebook 12)
    "ShuffleNetV2 1.0x": fit.Course(2400, 32, 0.02, 4e-3),
    "MobileNetV2 0.5": fit.Course(900, 32, 0.003, 5e-4),
}
CALIBRATION = 512  # pictures for the linear map that the second one begins with
CONNECTOR = fit.Course(100, 16, 0.004, 1e-3)
ALL = fit.Course(500, 16, 0.001, 3e-4)


def stages(name: str, work: Path = WORK, shrink: int = 1) -> dict[str, nn.Module]:
    """The model after each stage of its training with the encoder `name` of `swap.TOWERS`."""
    teacher, at = models.load("mini-vlm"), work / name.split()[0].lower()
    courses = [replace(c, steps=max(2, c.steps // shrink)) for c in (FEATURES[name], CONNECTOR, ALL)]
    start, pictures = None, None
    if name == "MobileNetV2 0.5":
        start, pictures = house_cnn().mobilenet_v2, cnn.pictures("calibration", CALIBRATION // shrink)
    blank = swap.swap(teacher, swap.TOWERS[name], start)
    first = swap.match_features(blank, teacher, courses[0], at / "features", pictures)
    second = swap.align_connector(first, teacher, courses[1], at / "connector")
    third = distill.distill(second, teacher, courses[2], work=at / "all")
    return {"features": first, "connector": second, "all": third}


def house_cnn() -> nn.Module:
    """`mini-cnn`, float32."""
    from transformers import AutoModelForSemanticSegmentation

    path = models.data_dir() / "models" / "mini-cnn"
    return AutoModelForSemanticSegmentation.from_pretrained(path, dtype=torch.float32).eval()


if __name__ == "__main__":
    for given in sys.argv[1:]:
        stages(given)
