"""A student with a quarter of mini-vlm's parameters: taught by it, and, for the same time, by labels alone. All test questions.

Labels alone twice: from the same cut, and from nothing, by the course that made the teacher itself, cut to the same minutes.
`run()` returns what results/student.json says. Each training, and each row, is kept in runs/student as it goes: a killed run
goes on there. An hour on two quiet cores. A tree with other code or another student: remove that folder first.
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
from structured import Kept, answers
from torch import nn

from mmrecipes import data, distill, evaluate, export, inference, measure, models, prune, quantize, train
from mmrecipes.mini import curriculum, vlm

WORK = Path(__file__).resolve().parent.parent / "runs" / "student"
# all layers stay, and all heads: notebook 21 found none to spare. Width and neurons go
SIZES = {"language": distill.StudentSize((0, 1, 2, 3), 128, 192), "vision": distill.StudentSize((0, 1, 2, 3), 160, 192)}
CALIBRATION = 64
VISION = train.TrainConfig(500, 64, 0.002, 5e-4)  # vision encoder and connector first, on images alone
TAUGHT = train.TrainConfig(750, 16, 0.0007, 2e-4)
LABELS = train.TrainConfig(1600, 16, 0.0007, 2e-4)  # as many minutes: without a teacher a step takes less
SHORT = {"vision": 150, "reading": 450, "align": 700, "joint": 320}  # steps: as many minutes again, from nothing
FEWER = 1050  # questions for what answers one at a time


def run(work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """Accuracy of teacher and students, paired; time, memory and bytes. Less of it with `n` and `shrink`."""
    teacher, rows, kept = models.load("mini-vlm"), data.test_split(n), Kept(work)
    few = rows.select(range(min(FEWER, len(rows))))
    kept.row("teacher", lambda: answers(teacher, rows))
    seen = data.calibration(CALIBRATION)
    student = distill.make_student(teacher, SIZES, seen)
    kept.row("cut, untrained", lambda: answers(student, few))
    narrow = prune.slice_language(teacher, SIZES["language"].hidden_size, seen)  # its visual tokens are as wide as the student's
    vision, taught_config, labels = (_shorter(config, shrink) for config in (VISION, TAUGHT, LABELS))
    images = curriculum.image_batches("student", vision)
    sees = distill.match_vision_encoder(student, narrow, images, vision, work / "eye")
    kept.row("its eye matched", lambda: answers(sees, few))
    chats = curriculum.chat_batches("student", taught_config, teacher.processor.tokenizer)
    taught = distill.distill(sees, teacher, chats, taught_config, work=work / "taught")
    spent = {name: train.read_log(work / name) for name in ("eye", "taught")}
    kept.row("taught", lambda: answers(taught, rows) | {"minutes": sum(s["seconds"][-1] for s in spent.values()) / 60})
    chats = curriculum.chat_batches("student", labels, teacher.processor.tokenizer)
    alone = distill.distill(student, None, chats, labels, work=work / "labels")
    spent["labels"] = train.read_log(work / "labels")
    kept.row("labels alone", lambda: answers(alone, rows) | {"minutes": spent["labels"]["seconds"][-1] / 60})
    stages = {name: replace(config, steps=max(2, SHORT[name] // shrink)) for name, config in vlm.STAGES.items()}
    blank = distill.make_student(teacher, SIZES, seen, inherit=False)
    untaught = models.load(vlm.train_mini_vlm(work / "nothing" / "model", work / "nothing", stages, model=blank))
    nothing = _log(untaught)
    kept.row("labels alone, from nothing", lambda: answers(untaught, rows) | {"minutes": nothing["seconds"][-1] / 60})
    kept.row("taught, int8 (ONNX Runtime)", lambda: _exported(taught, few))
    kept.row("times", lambda: _times({"teacher": teacher, "student": taught}, rows))
    logs = {name: {k: v[::25] for k, v in log.items()} for name, log in spent.items()}
    logs["nothing"] = {k: v[::2] for k, v in nothing.items()}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in (("teacher", teacher), ("student", taught))}
    return _content(kept.rows, parameters) | {"logs": logs}


def _shorter(config: train.TrainConfig, shrink: int) -> train.TrainConfig:
    return replace(config, steps=max(2, config.steps // shrink))


def _log(model: nn.Module) -> dict[str, list]:
    """What `train` logged of the stages with questions, their seconds after those of the stages before."""
    rows, before, found = json.loads((Path(model.name_or_path) / "training.json").read_text()), 0.0, []
    for stage in vlm.STAGES:
        own = [r for r in rows if r["stage"] == stage]
        found += [r | {"seconds": before + r["seconds"]} for r in own if "answer" in r]
        before += own[-1]["seconds"]
    return {k: [r.get(k) for r in found] for k in found[0] if k != "stage"}


def _exported(model: nn.Module, rows: Dataset) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        loaded = inference.load_exported(export.export(model, Path(folder) / "small", "onnx", "int8"))
        return answers(loaded, rows) | {"mb": sum(loaded.manifest["bytes"].values()) / 1e6}


def _times(variants: dict[str, nn.Module], rows: Dataset) -> dict:
    """Time of each stage and of a whole question, in PyTorch and in ONNX Runtime, interleaved; peak memory; bytes on disk."""
    inputs = models.chat(variants["teacher"], rows[0]["image"], rows[0]["question"])
    asked = [(r["image"], r["question"]) for r in rows.select(range(5))]

    def each(answer: Callable) -> None:
        for picture, question in asked:
            answer(picture, question)

    found = {"stages": measure.latency(variants, inputs, repeats=21)}
    runs = {k: partial(each, partial(models.ask, m)) for k, m in variants.items()}
    found["five questions, PyTorch"] = measure.wall(runs, repeats=15)
    found["peak"] = {k: measure.peak_memory(m, inputs) for k, m in variants.items()}
    found["disk_mb"] = {k: measure.disk_bytes(quantize.bf16(m)) / 1e6 for k, m in variants.items()}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            at = {k: export.export(m, Path(folder) / f"{k} {precision}", "onnx", precision) for k, m in variants.items()}
            for threads in dict.fromkeys((1, torch.get_num_threads())):  # one for each question at a time, or all for one
                loaded = {k: inference.load_exported(path, threads) for k, path in at.items()}
                runs = {k: partial(each, lambda p, q, e=e: e.generate(p, q, 8)) for k, e in loaded.items()}
                shown = f"{threads} thread{'s' * (threads > 1)}"
                found[f"five questions, ONNX Runtime {precision}, {shown}"] = measure.wall(runs, repeats=15)
    return found


def _content(rows: dict, parameters: dict[str, int]) -> dict:
    """What is published: each row's change against the teacher, the students' against one another, without the answers."""
    right, variants = {k: r["right"] for k, r in rows.items() if "right" in r}, {}
    for name, found in right.items():
        variants[name] = {k: v for k, v in rows[name].items() if k != "right"}
        variants[name]["change"] = evaluate.paired(right["teacher"][: len(found)], found)
    spent = rows["times"]
    asked = {k: spent[k]["teacher"]["median"] / spent[k]["student"]["median"] for k in spent if k.startswith("five")}
    faster = {k.replace("five questions", "a question"): v for k, v in asked.items()}
    both = (spent["stages"]["teacher"], spent["stages"]["student"])
    faster["time to first token, PyTorch"] = both[0]["ttft"]["median"] / both[1]["ttft"]["median"]
    return {
        "parameters": parameters,
        "share": parameters["student"] / parameters["teacher"],
        "threads": torch.get_num_threads(),
        "variants": variants,
        "taught against labels": evaluate.paired(right["labels alone"], right["taught"]),
        "taught against labels from nothing": evaluate.paired(right["labels alone, from nothing"], right["taught"]),
        "times faster": faster,
        "times": spent,
    }
