"""Quantization-aware training of mini-vlm after GPTQ, at the same bytes: with labels or a teacher, all or a part; 2 to 4 bits.

`python benchmarks/qat.py [NAME ...]` makes the named rows (by default all) and writes results/qat.json with those that are there.
Models, trainings and rows are kept in runs/qat as they go: a killed run goes on there. Each training takes about ten minutes on
one core, all of it about two hours. A tree with other code: remove that folder first.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from structured import Kept, answers
from torch import nn

from mmrecipes import data, distill, evaluate, measure, models, quantize, train
from mmrecipes.mini import curriculum

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "qat"
GROUP, CALIBRATION, MANY = 32, 64, 512  # inputs that share a scale; images for GPTQ; as many as its time allows
CONFIG = train.TrainConfig(400, 8, adam_lr=5e-4, checkpoint_every=50)
SHOWN = 10  # steps of a log that are shown as their mean


@dataclass(frozen=True)
class Variant:
    """How a model of `bits` bits is trained, from GPTQ's weights or from those on the scale of least squared error."""

    bits: int = 2
    teacher: bool = True
    only: tuple[str, ...] = quantize.PARTS
    learned: bool = True  # the scales (LSQ)
    levels: bool = True  # the weights, too; otherwise each stays on its level
    gptq: bool = True


VARIANTS = {
    "2 bits, teacher": Variant(),
    "2 bits, labels": Variant(teacher=False),
    "2 bits, teacher, vision encoder alone": Variant(only=("vision",)),
    "2 bits, teacher, language model alone": Variant(only=("language",)),
    "3 bits, teacher": Variant(3),
    "2 bits, teacher, fixed scales": Variant(learned=False),
    "2 bits, teacher, levels fixed": Variant(levels=False),
    "2 bits, teacher, not from GPTQ": Variant(gptq=False),
    "4 bits, teacher": Variant(4),
}
STARTS = {f"{bits} bits, GPTQ": bits for bits in (2, 3, 4)}


def start(bits: int, gptq: bool, work: Path, images: int = CALIBRATION) -> nn.Module:
    """mini-vlm with all linear weights rounded, kept in `work`."""
    model = models.load("mini-vlm")
    kept = work / f"{bits} bits, {f'GPTQ, {images} images' if gptq else 'searched scale'}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept))
        return model
    method = quantize.gptq_round if gptq else (lambda w, _, bits, group: quantize.search_round(w, bits, group))
    made = quantize.calibrate(model, data.calibration(images), bits, method, GROUP)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), kept)
    return made


def trained(name: str, work: Path, config: train.TrainConfig) -> nn.Module:
    """The model of one of VARIANTS, taken up where it was left."""
    given, model = VARIANTS[name], models.load("mini-vlm")
    prepared = quantize.prepare_qat_(start(given.bits, given.gptq, work), given.bits, given.only, given.learned)
    for _, layer in models.linears(prepared):
        if not given.levels:
            layer.parametrizations.weight.original.requires_grad_(False)
    batches = curriculum.chat_batches("qat", config, model.processor.tokenizer)
    return distill.qat(prepared, batches, replace(config, about=name), model if given.teacher else None, work=work / name)


def spent(work: Path) -> dict[str, float]:
    """What a training took, by the fastest tenth of its steps, since it may have waited for other programs in all others."""
    seconds = train.read_log(work)["seconds"]
    step = statistics.quantiles((b - a for a, b in itertools.pairwise(seconds)), n=10)[0]
    return {"steps": len(seconds), "seconds a step": step, "minutes": step * len(seconds) / 60}


def curve(work: Path) -> dict[str, list[float]]:
    """The log of a training, a mean over each few steps."""
    log = train.read_log(work)
    starts = range(0, len(log["step"]), SHOWN)
    means = {
        key: [statistics.fmean(log[key][i : i + SHOWN]) for i in starts] for key in ("loss", "answers", "logits") if key in log
    }
    return {"step": [log["step"][i] for i in starts]} | means


def run(names: tuple[str, ...] = (), work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """What results/qat.json says, of the rows named or of all. Less of it with `n` and `shrink`."""
    rows, kept, model = data.test_split(n), Kept(work), models.load("mini-vlm")
    config = replace(CONFIG, steps=max(2, CONFIG.steps // shrink))
    many = f"2 bits, GPTQ on {MANY} images"
    jobs: dict[str, Callable[[], dict]] = {"fp32": lambda: answers(model, rows)}
    jobs |= {name: lambda bits=bits: answers(start(bits, True, work), rows) for name, bits in STARTS.items()}
    jobs |= {name: lambda name=name: answers(trained(name, work, config), rows) for name in VARIANTS}
    jobs[many] = lambda: answers(start(2, True, work, max(CALIBRATION, MANY // shrink)), rows)
    jobs["2 bits, not from GPTQ, before"] = lambda: answers(start(2, False, work), rows)
    for name in ("fp32", *(names or jobs)):
        kept.row(name, jobs[name])
    variants = {}
    for name in (name for name in jobs if name in kept.rows):
        found = kept.rows[name]
        bits = 32 if name == "fp32" else int(name[0])
        variants[name] = {key: value for key, value in found.items() if key in ("accuracy", "families")}
        if name in VARIANTS:
            variants[name] |= spent(work / name) | {"log": curve(work / name)}
        whole = measure.model_bytes(model)
        size = whole if bits == 32 else quantize.packed_bytes(model, bits, "group", GROUP)
        variants[name] |= {"mb": size / 1e6, "times_smaller": whole / size}
        variants[name]["change"] = evaluate.paired(kept.rows["fp32"]["right"], found["right"])
        if name in VARIANTS and f"{bits} bits, GPTQ" in kept.rows:
            variants[name]["after GPTQ"] = evaluate.paired(kept.rows[f"{bits} bits, GPTQ"]["right"], found["right"])
    about = (
        f"{config.steps} steps of {config.batch} images with 13 questions each; linear layers in groups of {GROUP} inputs, scales"
        f" and all else in 16 bits; GPTQ on {CALIBRATION} images; a part alone: the other stays as GPTQ left it"
    )
    return {"about": about, "config": vars(config), "variants": variants}


if __name__ == "__main__":
    content = {"environment": measure.environment(), **run(tuple(sys.argv[1:]))}
    models.write_json(ROOT / "results" / "qat.json", content)
