"""Measures what results/ and the README say, on this machine. About ten minutes on two cores: `make results`.

- results/mini-vlm.json: accuracy of the committed model on the whole test split, per family, beside the majority floors
- results/damage.json: how it breaks: rounding to few bits and pruning, against fp32 on the same questions
- results/tour.json: the tour's comparison, with 1,000 questions
- results/real-size.json: stage budget and roofline of the real-size twin, fp32, on this machine
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmrecipes import data, evaluate, measure, models, prune, quantize, report, scenes, tour

RESULTS = Path(__file__).resolve().parent.parent / "results"
DAMAGE = {  # name -> what is done to a copy of the model
    "int8 per channel": lambda m: quantize.simulate(m, 8),
    "4 bits per channel": lambda m: quantize.simulate(m, 4),
    "3 bits per channel": lambda m: quantize.simulate(m, 3),
    "4 bits per tensor": lambda m: quantize.simulate(m, 4, "tensor"),
    "3 bits per tensor": lambda m: quantize.simulate(m, 3, "tensor"),
    "2 bits in groups of 32": lambda m: quantize.simulate(m, 2, "group"),
    "magnitude pruning 50%": lambda m: prune.magnitude(m, 0.5),
    "magnitude pruning 70%": lambda m: prune.magnitude(m, 0.7),
}


def write(name: str, content: dict) -> None:
    report.write_json(RESULTS / name, {"environment": measure.environment(), **content})
    print("wrote", RESULTS.name + "/" + name, flush=True)


def accuracy() -> None:
    """The committed model and its damaged copies, each on all 4,200 questions."""
    rows, model = data.test_split(), models.load("mini-vlm")
    base = evaluate.vqa(model, rows)
    parts = measure.parameters(model)
    write(
        "mini-vlm.json",
        {"overall": base.overall, "families": base.families, "floors": base.floors, "parameters": parts},
    )
    found = {}
    for name, damage in DAMAGE.items():
        hurt = evaluate.vqa(damage(model), rows)
        found[name] = {"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right), "families": hurt.families}
        print(f"{name:24s} {hurt.overall}  {found[name]['change']}", flush=True)
    write("damage.json", {"variants": found})


def real_size() -> None:
    """Where a real model's time goes; random weights, so time and memory only."""
    twin = models.real_size("smolvlm-256m")
    inputs = models.chat(twin, scenes.render(scenes.make_scene(1), 512), "What colour is the large circle in this picture?")
    peaks = measure.machine_peaks()
    write(
        "real-size.json",
        {
            "model": "smolvlm-256m twin, random weights, fp32, one picture of 512 px, 8 new tokens",
            "budget": measure.stage_budget(twin, inputs, 8),
            "peaks": peaks,
            "roofline": measure.roofline(twin, inputs, peaks),
            "memory": measure.peak_memory(twin, inputs),
        },
    )


def the_tour() -> None:
    found = tour.run(out=Path("tour.html"), n=1000)
    for row in found.rows:
        del row["predictions"]
    found.save(RESULTS / "tour.json")


if __name__ == "__main__":
    jobs = {"accuracy": accuracy, "tour": the_tour, "real-size": real_size}
    for job in sys.argv[1:] or jobs:
        jobs[job]()
