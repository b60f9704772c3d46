"""mini-vlm with another vision encoder: features first, then the connector, then everything; accuracy, matching, speed.

`run()` returns what results/swap.json says; `python benchmarks/swap.py NAME` trains one encoder alone, so that several can learn
side by side. Trainings and rows are kept in runs/swap as they go: a killed run goes on there. An hour for each encoder on one
core. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from mmrecipes import distill, fit, models, swap

WORK = Path(__file__).resolve().parent.parent / "runs" / "swap"
TRAINED = ("ShuffleNetV2 1.0x", "MobileNetV2 0.5")
FEATURES = fit.Course(2400, 32, 0.02, 4e-3)
CONNECTOR = fit.Course(100, 16, 0.004, 1e-3)
ALL = fit.Course(500, 16, 0.001, 3e-4)


def stages(name: str, work: Path = WORK, shrink: int = 1) -> dict[str, nn.Module]:
    """The model after each stage of its training with the encoder `name` of `swap.TOWERS`."""
    teacher, at = models.load("mini-vlm"), work / name.split()[0].lower()
    courses = [replace(c, steps=max(2, c.steps // shrink)) for c in (FEATURES, CONNECTOR, ALL)]
    first = swap.match_features(swap.swap(teacher, swap.TOWERS[name]), teacher, courses[0], at / "features")
    second = swap.align_connector(first, teacher, courses[1], at / "connector")
    third = distill.distill(second, teacher, courses[2], work=at / "all")
    return {"features": first, "connector": second, "all": third}


if __name__ == "__main__":
    for given in sys.argv[1:]:
        stages(given)
