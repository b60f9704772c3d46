"""A dual encoder with less than 40% of mini-siglip's parameters: taught by it, and on pairs alone for as many minutes.

`run()` returns what results/dual.json says. Trainings and rows are kept in runs/dual as they go: a killed run goes on there.
Three quarters of an hour on one core. A tree with other code or another student: remove that folder first.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from structured import Kept
from torch import Tensor, nn

from mmrecipes import distill, evaluate, measure, models, quantize, train
from mmrecipes.mini import curriculum

WORK = Path(__file__).resolve().parent.parent / "runs" / "dual"
LAYERS, NEURONS = {"vision": (0, 2), "language": (0, 1)}, {"vision": 96, "language": 112}
# the teacher's embeddings first, then all losses; and pairs alone for about as many minutes
CONFIGS = {
    "vectors": train.TrainConfig(300, 64, 0.003, 1e-3),
    "taught": train.TrainConfig(500, 64, 0.003, 1e-3),
    "alone": train.TrainConfig(1300, 64, 0.003, 1e-3),
}
EMBEDDINGS = distill.ContrastiveWeights(contrast=0, affinity=0, interactive=0)
SCENES, HARDER = 4000, 1000  # test scenes; and pools of so many, beside those of 100


def run(work: Path = WORK, n: int = SCENES, shrink: int = 1) -> dict:
    """Retrieval both ways, matching and telling apart of every variant, paired with the teacher's; time and bytes."""
    teacher, kept, seen = models.load("mini-siglip"), Kept(work), evaluate.gallery(n=n)
    index = [evaluate.embeddings(teacher, texts=t) for t in (seen.captions, seen.negatives)]  # as somebody embedded them once
    student = distill.make_dual_student(teacher, LAYERS, NEURONS)
    kept.row("teacher", lambda: _found(teacher, seen, index))
    kept.row("cut, untrained", lambda: _found(student, seen, index))
    configs = {name: _shorter(config, shrink) for name, config in CONFIGS.items()}
    batches = {name: curriculum.caption_batches("student", c, teacher.processor.tokenizer) for name, c in configs.items()}
    first = distill.distill_dual(student, teacher, batches["vectors"], configs["vectors"], EMBEDDINGS, work / "vectors")
    kept.row("its vectors matched", lambda: _found(first, seen, index))
    taught = distill.distill_dual(first, teacher, batches["taught"], configs["taught"], work=work / "taught")
    alone = distill.distill_dual(student, None, batches["alone"], configs["alone"], work=work / "alone")
    spent = {name: train.read_log(work / name) for name in ("vectors", "taught", "alone")}
    minutes = {name: log["seconds"][-1] / 60 for name, log in spent.items()}
    kept.row("taught", lambda: _found(taught, seen, index) | {"minutes": minutes["vectors"] + minutes["taught"]})
    kept.row("pairs alone", lambda: _found(alone, seen, index) | {"minutes": minutes["alone"]})
    kept.row("times", lambda: _times({"teacher": teacher, "student": taught}, seen))
    logs = {name: {k: v[::20] for k, v in log.items()} for name, log in spent.items()}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in (("teacher", teacher), ("student", taught))}
    return _content(kept.rows, parameters) | {"logs": logs}


def _shorter(config: train.TrainConfig, shrink: int) -> train.TrainConfig:
    return replace(config, steps=max(2, config.steps // shrink))


def _found(model: nn.Module, seen: evaluate.Gallery, index: list[Tensor]) -> dict:
    easy, n = evaluate.retrieval_scores(model, seen), len(seen.images)
    hard = evaluate.retrieval_scores(model, seen, min(n, HARDER))
    row = {k: asdict(getattr(easy, k)) for k in ("text_r1", "image_r1", "hard_negative_accuracy", "matching_accuracy")}
    row |= {f"{k}, harder pool": asdict(getattr(hard, k)) for k in ("text_r1", "image_r1")}
    image, text = evaluate.embeddings(model, seen.images), evaluate.embeddings(model, texts=seen.captions)
    old, own = [], torch.arange(evaluate.POOL)
    for i in range(0, n, evaluate.POOL):
        part = slice(i, i + evaluate.POOL)
        old += ((image[part] @ torch.cat([texts[part] for texts in index]).T).argmax(-1) == own).tolist()
    row["text_r1, the teacher's texts"] = asdict(evaluate.wilson(sum(old), n))
    right = easy.right | {"harder": hard.right["text_r1"], "old": old}
    return row | {"gap": evaluate.modality_gap(image, text), "right": right}


def _times(variants: dict[str, nn.Module], seen: evaluate.Gallery) -> dict:
    """A picture and a caption, one at a time, in PyTorch, interleaved, processing and all; bytes on disk."""
    found = {"disk_mb": {k: measure.disk_bytes(quantize.bf16(m)) / 1e6 for k, m in variants.items()}}
    asked = {"picture": {"images": seen.images[:1]}, "caption": {"texts": seen.captions[:1]}}
    for what, given in asked.items():
        runs = {k: partial(evaluate.embeddings, m, **given, progress=False) for k, m in variants.items()}
        found[what] = measure.wall(runs, repeats=31)
    return found


def _content(rows: dict, parameters: dict[str, int]) -> dict:
    base, variants = rows["teacher"]["right"], {}
    for name, row in rows.items():
        if "right" in row:
            variants[name] = {k: v for k, v in row.items() if k != "right"}
            variants[name]["change"] = {k: evaluate.paired(base[k], row["right"][k]) for k in base}
    pairs, spent = (rows["pairs alone"]["right"], rows["taught"]["right"]), rows["times"]
    return {
        "parameters": parameters,
        "share": parameters["student"] / parameters["teacher"],
        "threads": torch.get_num_threads(),
        "variants": variants,
        "taught against pairs": {k: evaluate.paired(pairs[0][k], pairs[1][k]) for k in pairs[0]},
        "times faster": {k: spent[k]["teacher"]["median"] / spent[k]["student"]["median"] for k in ("picture", "caption")},
        "times": spent,
    }
