"""mini-vlm with 40% and more of its parameters cut out, at full length: recovery of up to ten minutes, then all questions.

`run()` returns what results/structured.json says. Each row, and each training, is kept in runs/structured as it goes: a killed
run goes on there. About half an hour on two quiet cores. A tree with other code or a new cut: remove that folder first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from mmrecipes import data, distill, evaluate, export, inference, measure, models, prune, quantize, train
from mmrecipes.mini import curriculum

WORK = Path(__file__).resolve().parent.parent / "runs" / "structured"
KEEP = {"vision": 384, "language": 128}  # neurons of each FFN that stay, of 1,024 and 512
DEEPER = {"vision": 256, "language": 128}
SAME = {"vision": {"vision": 448}, "language": {"language": 128}}  # as many parameters gone from either side
CALIBRATION = 64
# the smaller cut has little to learn anew: half the rates. The deeper one was not tried with these at full length
GENTLE = train.TrainConfig(420, 16, 5e-4, 1.5e-4)
ALONE = train.TrainConfig(560, 16, 0.001, 3e-4)
TAUGHT = train.TrainConfig(420, 16, 0.001, 3e-4)  # about as many minutes: a teacher takes its share
SHORT = train.TrainConfig(80, 16, 5e-4, 1.5e-4)
FEWER = 1050  # questions for what answers one at a time, or is a step on the way


def cut(model: nn.Module, keep: dict[str, int], seen: Dataset) -> nn.Module:
    """By magnitude; the vision tower's FFNs fitted anew, the language model's not, where that costs answers (notebook 21)."""
    scores = prune.magnitude_importance(model)
    for part, n in keep.items():
        neurons = {part: prune.strongest(scores[part]["neurons"], n)}
        model = prune.keep_ffn_neurons(model, neurons, seen if part == "vision" else None)
    return model


def run(work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """Accuracy of every variant, paired with the whole model's; time, memory and bytes. Less of it with `n` and `shrink`."""
    model, rows, kept = models.load("mini-vlm"), data.test_split(n), Kept(work)
    seen = data.calibration(CALIBRATION)
    few = rows.select(range(min(FEWER, len(rows))))
    kept.row("whole", lambda: answers(model, rows))
    thin, thinner = cut(model, KEEP, seen), cut(model, DEEPER, seen)
    kept.row("cut", lambda: answers(thin, few))
    kept.row("deeper cut", lambda: answers(thinner, few))
    configs = {
        "recovered with its parent": (thin, GENTLE, model),
        "deeper, recovered alone": (thinner, ALONE, None),
        "deeper, recovered with its parent": (thinner, TAUGHT, model),
    }
    back = {}
    for name, (less, config, teacher) in configs.items():
        back[name] = _recover(less, _shorter(config, shrink), teacher, work / name)
        kept.row(name, lambda m=back[name], at=work / name: answers(m, rows) | {"recovery": _log(at)})
    best, deeper = back["recovered with its parent"], back["deeper, recovered with its parent"]
    kept.row("its int8 (PyTorch, dynamic)", lambda: answers(quantize.dynamic_int8(best), few))
    kept.row("its export (ONNX Runtime, fp32)", lambda: _exported(best, few, "fp32"))
    kept.row("its export (ONNX Runtime, int8)", lambda: _exported(best, few, "int8"))
    for part, keep in SAME.items():
        less, at = cut(model, keep, seen), work / f"same from {part}"
        kept.row(f"same number from {part}, cut", lambda m=less: answers(m, few))
        well = _recover(less, _shorter(SHORT, shrink), model, at)
        kept.row(f"same number from {part}, recovered", lambda m=well, at=at: answers(m, few) | {"recovery": _log(at)})
    variants = {"whole": model, "cut": best, "deeper cut": deeper}
    kept.row("times", lambda: _times(variants, rows))
    return _content(kept.rows, {name: sum(p.numel() for p in m.parameters()) for name, m in variants.items()})


class Kept:
    """Rows by name, written as each is finished."""

    def __init__(self, work: Path):
        self.path, self.rows = work / "rows.json", {}
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def row(self, name: str, make: Callable[[], dict]) -> None:
        if name not in self.rows:
            self.rows[name] = make()
            models.write_json(self.path, self.rows)
        shown = self.rows[name].get("accuracy")
        print(f"{name:36s} {evaluate.Share(**shown) if isinstance(shown, dict) else shown or ''}", flush=True)


def answers(model: nn.Module | inference.Exported, rows: Dataset) -> dict:
    found = evaluate.vqa(model, rows)
    row = {"accuracy": vars(found.overall), "families": {f: vars(s) for f, s in found.families.items()}, "right": found.right}
    if isinstance(model, nn.Module) and not any("quantized" in type(m).__module__ for m in model.modules()):
        row["parameters"] = sum(p.numel() for p in model.parameters())
    return row


def _exported(model: nn.Module, rows: Dataset, precision: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        loaded = inference.load_exported(export.export(model, Path(folder) / "cut", "onnx", precision))
        return answers(loaded, rows) | {"mb": sum(loaded.manifest["bytes"].values()) / 1e6}


def _shorter(config: train.TrainConfig, shrink: int) -> train.TrainConfig:
    return replace(config, steps=max(2, config.steps // shrink))


def _recover(thin: nn.Module, config: train.TrainConfig, teacher: nn.Module | None, work: Path) -> nn.Module:
    batches = curriculum.chat_batches("recovery", config, thin.processor.tokenizer)
    return distill.recover(thin, batches, config, teacher, work)


def _log(at: Path) -> dict:
    log = [json.loads(line) for line in (at / "log.jsonl").read_text().splitlines()]
    return {"steps": len(log), "minutes": log[-1]["seconds"] / 60, "log": log[::10]}


def _times(variants: dict[str, nn.Module], rows: Dataset) -> dict:
    """Time of each stage and of a whole question, in PyTorch and in ONNX Runtime, interleaved; peak memory; bytes on disk."""
    inputs = models.chat(variants["whole"], rows[0]["image"], rows[0]["question"])
    asked = [(r["image"], r["question"]) for r in rows.select(range(5))]

    def each(model: nn.Module) -> None:
        for picture, question in asked:
            models.ask(model, picture, question)

    found = {"stages": measure.latency(variants, inputs, repeats=21)}
    found["five questions"] = measure.wall({k: partial(each, m) for k, m in variants.items()}, repeats=15)
    found["peak"] = {k: measure.peak_memory(m, inputs) for k, m in variants.items()}
    found["disk_mb"] = {k: measure.disk_bytes(quantize.bf16(m)) / 1e6 for k, m in variants.items()}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {k: inference.load_exported(export.export(m, Path(folder) / k, "onnx")) for k, m in variants.items()}
        runs = {k: lambda e=e: [e.generate(p, q, 8) for p, q in asked] for k, e in loaded.items()}
        found["five questions, ONNX Runtime"] = measure.wall(runs, repeats=15)
    return found


def _content(rows: dict, parameters: dict[str, int]) -> dict:
    """What is published: each row's change against the whole model on the questions that both answered, without the answers."""
    base, variants = rows["whole"]["right"], {}
    for name, row in rows.items():
        if "right" not in row:
            continue
        variants[name] = {k: v for k, v in row.items() if k != "right"}
        if name != "whole":
            variants[name]["change"] = evaluate.paired(base[: len(row["right"])], row["right"])
    spent = rows["times"]
    asked, exported_asked, stages = (spent[k] for k in ("five questions", "five questions, ONNX Runtime", "stages"))
    faster = {
        name: {
            "a question, PyTorch": asked["whole"]["median"] / asked[name]["median"],
            "a question, ONNX Runtime": exported_asked["whole"]["median"] / exported_asked[name]["median"],
            "time to first token, PyTorch": stages["whole"]["ttft"]["median"] / stages[name]["ttft"]["median"],
            "tokens a second, PyTorch": stages[name]["tokens_per_s"]["median"] / stages["whole"]["tokens_per_s"]["median"],
        }
        for name in ("cut", "deeper cut")
    }
    return {
        "keep": {"cut": KEEP, "deeper cut": DEEPER},
        "calibration": f"{CALIBRATION} pictures with question and answer",
        "parameters": parameters,
        "share cut": {name: 1 - n / parameters["whole"] for name, n in parameters.items()},
        "threads": torch.get_num_threads(),
        "variants": variants,
        "times faster": faster,
        "times": spent,
    }
