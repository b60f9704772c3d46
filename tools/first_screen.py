"""Draws results/first_screen.png, the picture of the README: a scene, questions, three variants' answers; size against accuracy.

The answers are computed here; sizes and accuracies come from results/tour.json (`make results`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import mmrecipes as mmr
from mmrecipes.data import families, scenes
from mmrecipes.report import tour
from recipes import ROOT

SEED = 3_000_000_105  # of the test split
QUESTIONS = ("reading", "count", "relation")
SHOWN = {"fp32": "o", tour.FOUR_BIT: "*", tour.TWO_BIT: "v"}


def answers() -> tuple[list[str], dict[str, list[str]]]:
    """The questions about the scene, and what each variant and the truth say."""
    scene = scenes.make_scene(SEED)
    asked = [question for family in QUESTIONS if (question := families.ask(scene, family))]
    image, base = scenes.render(scene, 128), mmr.load("mini-vlm")
    with tempfile.TemporaryDirectory() as folder:
        small = mmr.load_exported(mmr.export.export(base, Path(folder) / "model", "onnx", "int4"))
        two = mmr.quantize.simulate(base, 2, per="group")
        found = {"truth": [question.answer for question in asked]}
        found["fp32"] = [mmr.ask(base, image, question.text) for question in asked]
        found[tour.FOUR_BIT] = [small.generate(image, question.text) for question in asked]
        found[tour.TWO_BIT] = [mmr.ask(two, image, question.text) for question in asked]
    return [question.text for question in asked], found


def main() -> None:
    questions, found = answers()
    rows = {row["name"]: row for row in json.loads((ROOT / "results" / "tour.json").read_text())["rows"]}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=(1, 1.7, 1.5), layout="constrained")
    left.imshow(scenes.render(scenes.make_scene(SEED), 512))
    left.axis("off")
    middle.axis("off")
    line = 0.98
    for i, question in enumerate(questions):
        middle.text(0, line, question, va="top", weight="bold", fontsize=10)
        for name in SHOWN:
            answer = found[name][i]
            line -= 0.075
            colour = "black" if answer == found["truth"][i] else "firebrick"
            mark = "" if answer == found["truth"][i] else f"   (it is {found['truth'][i]})"
            middle.text(0.03, line, f"{name}: {answer}{mark}", va="top", color=colour, fontsize=10)
        line -= 0.11
    for name, row in rows.items():
        share = row["accuracy"]
        spread = [[100 * (share["value"] - share["low"])], [100 * (share["high"] - share["value"])]]
        right.errorbar(row["disk_mb"], 100 * share["value"], yerr=spread, fmt=SHOWN.get(name, "s"), markersize=8, label=name)
    right.set_xlabel("size on disk (MB)")
    right.set_ylabel(f"accuracy (%), n up to {max(row['accuracy']['n'] for row in rows.values())}")
    right.set_xlim(left=0)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(ROOT / "results" / "first_screen.png", dpi=110)


if __name__ == "__main__":
    main()
