"""mini-vlm with zeros: what each way of pruning costs in answers, on the whole test split, and what it saves in bytes.

`run()` returns what results/pruned.json says. About 25 minutes on two cores. Each row is kept in runs/ as soon as it is
finished, so that a killed run goes on where it was, on the same commit.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mmrecipes import data, distill, evaluate, measure, models, prune, quantize, train
from mmrecipes.mini import curriculum

CALIBRATION = 64
CONFIG = train.TrainConfig(170, 16, 7e-4, 2e-4)  # of each recovery: at most five minutes on two quiet cores


def per_layer(weight, hessian, sparsity, _):
    """Wanda's scores, ranked over the whole layer."""
    return weight.masked_fill(prune.smallest(weight.abs() * hessian.diagonal().sqrt(), sparsity), 0)


def on_marks(weight, hessian, sparsity, _):
    return prune.sparsegpt_prune(weight, hessian, sparsity, bits=4)


def at_once(weight, hessian, sparsity, _):
    return prune.round_rest(prune.sparsegpt_prune(weight, hessian, sparsity), hessian, 4, 32)


def variants(model: nn.Module, seen: Any) -> dict[str, Callable[[], nn.Module]]:
    """Name -> a function that makes the pruned copy."""
    every, part_of = [n for n, _ in models.linears(model)], models.part_of(model)
    language = [n for n in every if part_of[f"{n}.weight"] == "language"]
    ways = {
        "magnitude": partial(prune.magnitude, model),
        "Wanda": partial(prune.wanda, model, seen),
        "SparseGPT": partial(prune.sparsegpt, model, seen),
    }
    found = {f"{how}, {share:.0%}": partial(way, share) for share in (0.5, 0.7) for how, way in ways.items()}
    found |= {f"{how}, 2:4": partial(way, "2:4") for how, way in ways.items()}
    half, round_all = dict.fromkeys(every, 0.5), partial(quantize.calibrate, rows=seen)
    found["Wanda, one ranking a layer, 50%"] = partial(round_all, model, bits=half, method=per_layer)
    found["magnitude, one ranking for the model, 50%"] = lambda: prune.magnitude(model, prune.global_shares(model, 0.5))
    for what in ("text", "picture", "both"):
        some = prune.only(seen, what)
        made = partial(prune.sparsegpt, model, some, dict.fromkeys(language, 0.7))
        found[f"language model 70%, calibrated on {what}"] = made
    gptq = partial(round_all, model, bits=4, group_size=32)
    found["4 bits, GPTQ"] = gptq
    found["SparseGPT 50%, then 4 bits"] = lambda: round_all(
        prune.sparsegpt(model, seen, 0.5), bits=4, method=prune.round_rest, group_size=32
    )
    found["4 bits, then SparseGPT 50%"] = lambda: round_all(gptq(), bits=half, method=on_marks)
    found["SparseGPT 50% and 4 bits at once"] = partial(round_all, model, bits=half, method=at_once)
    batches = curriculum.chat_batches("recovery", CONFIG, model.processor.tokenizer)
    for how in ("magnitude", "SparseGPT"):
        found[f"{how}, 70%, recovered"] = lambda way=ways[how]: distill.recover(way(0.7), batches, CONFIG)
    return found


def run(n: int | None = None, kept: Path = Path("runs/pruned.json")) -> dict:
    """Of each variant: accuracy, the change against the whole model (paired), families, zeros by part, megabytes."""
    model, rows = models.load("mini-vlm"), data.test_split(n)
    seen, environment = data.calibration(CALIBRATION), measure.environment()
    stamp = [environment["commit"], len(rows), CONFIG.steps]
    old = json.loads(kept.read_text()) if kept.is_file() else {}
    found, base = old["variants"] if old.get("stamp") == stamp else {}, evaluate.vqa(model, rows)
    for name, make in variants(model, seen).items():
        if name in found:
            continue
        started = time.perf_counter()
        small = make()
        seconds, hurt = time.perf_counter() - started, evaluate.vqa(small, rows)
        row = {"accuracy": hurt.overall, "change": evaluate.paired(base.right, hurt.right), "families": hurt.families}
        row |= {"seconds": seconds, "zeros": zeros(small), "mb": megabytes(small, 4 if "bits" in name else 16)}
        found[name] = json.loads(json.dumps(row, default=dataclasses.asdict))
        models.write_json(kept, {"stamp": stamp, "variants": found})
        print(f"{name:42s} {hurt.overall}  {row['change']}", flush=True)
    about = f"{CALIBRATION} pictures with question and answer; linear layers only; SparseGPT and Wanda block after block"
    trained = [row["seconds"] for name, row in found.items() if "recovered" in name]
    recovery = {"steps": CONFIG.steps, "batch": CONFIG.batch, "seconds": max(trained)}
    whole = {"mb": megabytes(model, 16), "n": base.overall.n, "accuracy": base.overall}
    return {"calibration": about, "whole": whole, "recovery": recovery, "variants": found}


def zeros(model: nn.Module) -> dict[str, float]:
    """The share of zeros in the linear layers of each part."""
    part_of, count, gone = models.part_of(model), {}, {}
    for name, layer in models.linears(model):
        part = part_of[f"{name}.weight"]
        count[part] = count.get(part, 0) + layer.weight.numel()
        gone[part] = gone.get(part, 0) + int((layer.weight == 0).sum())
    return {part: gone[part] / n for part, n in count.items()}


def megabytes(model: nn.Module, bits: int) -> dict[str, float]:
    dense = quantize.packed_bytes(model, bits, "group", 32)
    return {"dense": dense / 1e6, "bitmap": prune.sparse_bytes(model, bits) / 1e6, "zip": prune.zipped_bytes(model) / 1e6}
