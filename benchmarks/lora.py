"""Adapters: a new domain learned without forgetting the old one, on floats and on 4 bits; and a pruned model brought back.

`run()` returns what results/lora.json says. Trainings and rows are kept in runs/lora as they go: a killed run goes on there.
Half an hour on two quiet cores. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from structured import Kept, answers
from torch import nn

from mmrecipes import data, distill, evaluate, fit, lora, models, prune, quantize, recovery, shrink_torch

WORK = Path(__file__).resolve().parent.parent / "runs" / "lora"
FAMILIES = ("colour", "shape", "exists")  # what can be asked about one new thing in a scene
EXAMPLES, NEW = 600, 1200  # training questions about new things, and as many old ones to replay; test questions
RANK = 16
COURSE = fit.Course(200, 8, 0.0005, 2e-3)  # adapters learn at adam_lr, whole matrices (Muon) at lr
ZEROS = 0.7  # a share at which the smallest weights are missed
BACK = fit.Course(150, 8, 0.001, 2e-3)
FEWER = 1050  # questions for what is slow


def run(work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """Accuracy on old and on new questions of every way to learn, paired with the model before. Less with `n` and `shrink`."""
    house, kept = models.load("mini-vlm"), Kept(work)
    old, new = data.test_split(n), data.questions("test", n or NEW, FAMILIES, novel=True)
    fresh = data.questions("train", EXAMPLES, FAMILIES, novel=True)
    both = concatenate_datasets([fresh, data.questions("train", EXAMPLES)]).shuffle(seed=0)
    course, back = (replace(c, steps=max(2, c.steps // shrink)) for c in (COURSE, BACK))
    ways = {"new only": fresh, "new and old": both}

    def learned(name: str, make) -> None:
        kept.row(name, lambda: _row(*make(work / name.replace(" ", "-")), old, new))

    learned("before", lambda at: (house, {}))
    for name, rows in ways.items():
        learned(f"all weights, {name}", lambda at, rows=rows: _whole(house, course, rows, at))
        learned(f"LoRA, {name}", lambda at, rows=rows: _adapters(lora.adapted(house, RANK), course, rows, at))
    with tempfile.TemporaryDirectory() as folder:
        four = Path(folder) / "nf4"
        shrink_torch.write(house, shrink_torch.can(house), four)
        kept.row("NF4, before", lambda: _row(shrink_torch.load(four), {}, old.select(range(min(FEWER, len(old)))), new))
        for name in ("NF4 + LoRA", "NF4 + LoRA, merged and rounded again"):
            again = name.endswith("again")
            few = old.select(range(min(FEWER, len(old))))
            at = work / "NF4"
            kept.row(name, lambda again=again, few=few, at=at: _row(*_four_bits(four, course, both, at, again), few, new))
    thin = quantize.clone(house)
    with torch.no_grad():
        for _, layer in quantize.linears(thin):
            layer.weight.copy_(prune.magnitude_prune(layer.weight, ZEROS))
    kept.row("pruned", lambda: answers(thin, old))
    taught = lora.learn(lora.adapted(thin, RANK), back, work=work / "pruned")
    kept.row("pruned + LoRA", lambda: answers(taught.get_base_model(), old) | _spent(work / "pruned"))
    kept.row("pruned + LoRA, merged", lambda: answers(lora.merged(taught), old) | {"zeros": _zeros(lora.merged(taught))})
    kept.row("pruned + LoRA, merged, zeros kept", lambda: answers(_masked(lora.merged(taught), thin), old))
    slow = recovery.Course(back.steps, back.batch, back.lr, 3e-4)
    whole = recovery.recover(thin, slow, work=work / "pruned-whole")
    kept.row("pruned, all weights trained, zeros kept", lambda: answers(whole, old) | {"zeros": _zeros(whole)})
    return _content(kept.rows, house)


def _row(model: nn.Module, spent: dict, old: Dataset, new: Dataset) -> dict:
    found = answers(model, new)
    return answers(model, old) | {"new": {k: found[k] for k in ("accuracy", "families", "right")}} | spent


def _spent(at: Path) -> dict:
    log = fit.log(at)
    return {"minutes": log["seconds"][-1] / 60, "seconds a step": log["seconds"][-1] / len(log["seconds"])}


def _adapters(model: nn.Module, course: fit.Course, rows: Dataset, at: Path) -> tuple[nn.Module, dict]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = lora.learn(model, course, rows, at)
    return lora.merged(model), {"trained": trained} | _spent(at)


def _whole(model: nn.Module, course: fit.Course, rows: Dataset, at: Path) -> tuple[nn.Module, dict]:
    gentle = replace(course, adam_lr=2e-4)
    trained = sum(p.numel() for p in model.parameters())
    return distill.distill(model, None, gentle, rows=rows, work=at), {"trained": trained} | _spent(at)


def _four_bits(folder: Path, course: fit.Course, rows: Dataset, at: Path, again: bool) -> tuple[nn.Module, dict]:
    """QLoRA: the matrices in NF4, adapters in floats; with `again`, added to the matrices, which are rounded to NF4 again."""
    model = lora.learn(lora.adapted(shrink_torch.load(folder), RANK), course, rows, at)
    return (lora.merged(model) if again else model.get_base_model()), _spent(at)


def _masked(model: nn.Module, like: nn.Module) -> nn.Module:
    with torch.no_grad():
        for (_, layer), (_, zeros) in zip(quantize.linears(model), quantize.linears(like), strict=True):
            layer.weight.mul_(zeros.weight != 0)
    return model


def _zeros(model: nn.Module) -> float:
    weights = [layer.weight for _, layer in quantize.linears(model)]
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)


def _content(rows: dict, house: nn.Module) -> dict:
    before, variants = rows["before"], {}
    for name, row in rows.items():
        variants[name] = {k: v for k, v in row.items() if k not in ("right", "new")}
        variants[name]["change"] = evaluate.paired(before["right"][: len(row["right"])], row["right"])
        if "new" in row:
            variants[name]["new"] = {k: v for k, v in row["new"].items() if k != "right"}
            variants[name]["new"]["change"] = evaluate.paired(before["new"]["right"], row["new"]["right"])
    return {"parameters": sum(p.numel() for p in house.parameters()), "rank": RANK, "examples": EXAMPLES, "variants": variants}
