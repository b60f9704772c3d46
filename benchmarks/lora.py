"""Adapters: a new domain learned without forgetting the old one, on floats and on 4 bits; and a pruned model brought back.

`run()` returns what results/lora.json says. Trainings and rows are kept in runs/lora as they go: a killed run goes on there.
Half an hour on two quiet cores. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from structured import Kept, answers
from torch import nn

from mmrecipes import data, distill, evaluate, models, prune, quantize, train
from mmrecipes.data import scenes
from mmrecipes.mini import batches, curriculum

WORK = Path(__file__).resolve().parent.parent / "runs" / "lora"
NEW = 1200  # test questions about new things
LIKE = {w: (*scenes.COLOURS,) if w in scenes.NEW_COLOURS else scenes.SHAPES for w in scenes.NEW_WORDS}  # as what they begin
RANK = 16
WAYS = tuple(f"{what}, {told}" for told in ("new only", "new and old") for what in ("all weights", "LoRA"))
CONFIG = train.TrainConfig(600, 8, 0.0005, 2e-3)  # adapters and new words learn at adam_lr, whole matrices (Muon) at lr
ZEROS = 0.7  # a share at which the smallest weights are missed
BACK = train.TrainConfig(150, 8, 0.001, 1e-3)
FEWER = 1050  # questions for what is slow
WHOLE = 1e-3  # adam_lr where all weights learn: embeddings and norms are in it then, and forget at the rate of adapters


def trainings(work: Path = WORK, shrink: int = 1) -> dict[str, Callable[[], nn.Module]]:
    """Every model that is trained here, by name; each is trained when it is called, and taken up where it was left."""
    house, token_ids = train.add_tokens(models.load("mini-vlm"), LIKE)
    config, back = (replace(c, steps=max(2, c.steps // shrink)) for c in (CONFIG, BACK))

    def novel(replay: bool) -> batches.NovelBatches:
        return curriculum.novel_batches(config, house.processor.tokenizer, replay)

    def adapters(base: nn.Module, name: str, replay: bool) -> nn.Module:
        return train.train_lora(train.add_lora(base, RANK, token_ids=token_ids), novel(replay), config, work / _slug(name))

    def whole(name: str, replay: bool) -> nn.Module:
        return distill.distill(house, None, novel(replay), replace(config, adam_lr=WHOLE), work=work / _slug(name))

    found: dict[str, Callable[[], nn.Module]] = {}
    for told, replay in {"new only": False, "new and old": True}.items():
        found[f"all weights, {told}"] = partial(whole, f"all weights, {told}", replay)
        found[f"LoRA, {told}"] = partial(adapters, house, f"LoRA, {told}", replay)
    found["NF4 + LoRA"] = lambda: adapters(_four_bits(house), "NF4 + LoRA", True)
    ordinary = curriculum.chat_batches("lora", back, house.processor.tokenizer)
    found["pruned + LoRA"] = lambda: train.train_lora(
        train.add_lora(_thin(house), RANK), ordinary, back, work / _slug("pruned + LoRA")
    )
    slow = replace(back, adam_lr=3e-4)
    kept = "pruned, all weights trained, zeros kept"
    found[kept] = lambda: distill.recover(_thin(house), ordinary, slow, work=work / _slug(kept))
    return found


def run(work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """Accuracy on old and on new questions of every way to learn, paired with the model before. Less with `n` and `shrink`."""
    kept, made = Kept(work), trainings(work, shrink)
    house, _ = train.add_tokens(models.load("mini-vlm"), LIKE)
    old, new = data.test_split(n), data.questions("test", n or NEW, batches.NEW, novel=True)
    few = old.select(range(min(FEWER, len(old))))
    kept.row("before", lambda: _row(house, old, new))
    for name in WAYS:
        kept.row(name, lambda name=name: _learned(made[name](), old, new) | _spent(work / _slug(name)))
    kept.row("NF4, before", lambda: _row(_four_bits(house), few, new))
    four = made["NF4 + LoRA"]()
    kept.row("NF4 + LoRA", lambda: _row(four.get_base_model(), few, new) | _spent(work / _slug("NF4 + LoRA")))
    kept.row("NF4 + LoRA, merged and rounded again", lambda: _row(_four_bits(train.merge_lora(four)), few, new))
    thin, taught = _thin(house), made["pruned + LoRA"]()
    kept.row("pruned", lambda: answers(thin, old) | {"zeros": _zeros(thin)})
    kept.row("pruned + LoRA", lambda: answers(taught.get_base_model(), old) | _spent(work / _slug("pruned + LoRA")))
    full = train.merge_lora(taught)
    kept.row("pruned + LoRA, merged", lambda: answers(full, old) | {"zeros": _zeros(full)})
    masked = _masked(train.merge_lora(taught), thin)
    kept.row("pruned + LoRA, merged, zeros kept", lambda: answers(masked, old) | {"zeros": _zeros(masked)})
    last = "pruned, all weights trained, zeros kept"
    kept.row(last, lambda: _pruned_whole(made[last](), old) | _spent(work / _slug(last)))
    return _content(kept.rows, house)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _four_bits(house: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        quantize.write_nf4(house, quantize.can_nf4(house), Path(folder) / "nf4")
        return quantize.load_nf4(Path(folder) / "nf4")


def _thin(house: nn.Module) -> nn.Module:
    thin = models.clone(house)
    with torch.no_grad():
        for _, layer in models.linears(thin):
            layer.weight.copy_(prune.magnitude_prune(layer.weight, ZEROS))
    return thin


def _learned(model: nn.Module, old: Dataset, new: Dataset) -> dict:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _row(train.merge_lora(model) if hasattr(model, "get_base_model") else model, old, new) | {"trained": trained}


def _pruned_whole(model: nn.Module, old: Dataset) -> dict:
    return answers(model, old) | {"zeros": _zeros(model)}


def _row(model: nn.Module, old: Dataset, new: Dataset) -> dict:
    found = answers(model, new)
    return answers(model, old) | {"new": {k: found[k] for k in ("accuracy", "families", "right")}}


def _spent(at: Path) -> dict:
    """By the median step, since a training may have waited for others."""
    seconds = train.read_log(at)["seconds"]
    step = statistics.median(b - a for a, b in itertools.pairwise(seconds))
    return {"minutes": step * len(seconds) / 60, "seconds a step": step}


def _masked(model: nn.Module, like: nn.Module) -> nn.Module:
    with torch.no_grad():
        for (_, layer), (_, zeros) in zip(models.linears(model), models.linears(like), strict=True):
            layer.weight.mul_(zeros.weight != 0)
    return model


def _zeros(model: nn.Module) -> float:
    weights = [layer.weight for _, layer in models.linears(model)]
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)


def _content(rows: dict, house: nn.Module) -> dict:
    before, variants = rows["before"], {}
    for name, row in rows.items():
        variants[name] = {k: v for k, v in row.items() if k not in ("right", "new")}
        variants[name]["change"] = evaluate.paired(before["right"][: len(row["right"])], row["right"])
        if "new" in row:
            variants[name]["new"] = {k: v for k, v in row["new"].items() if k != "right"}
            variants[name]["new"]["change"] = evaluate.paired(before["new"]["right"], row["new"]["right"])
    return {"parameters": sum(p.numel() for p in house.parameters()), "rank": RANK, "variants": variants}


if __name__ == "__main__":
    trainings()[sys.argv[1]]()
