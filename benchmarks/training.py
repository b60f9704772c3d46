"""What a training plan, a teacher, a start and labels are worth, compared at equal compute: notebooks 02, 21 and 30.

Many runs at once, each a process of its own, on a GPU where there is one (about ten minutes on an H100 with 16 cores; hours on
two cores). Each finished run is kept in runs/training; a killed one goes on at its last checkpoint. All test questions. Groups:

    stages     mini-vlm from nothing: in stages, or all at once, for as many FLOP
    recovery   mini-vlm with the FFNs of structured.py, started three ways, trained on labels or by the whole model, as many FLOP
    budget     the student of student.py with few labels or many, with and without a teacher and unlabelled images, as many steps
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import structured
import student as students
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmrecipes import data, distill, evaluate, measure, models, prune, train
from mmrecipes.data import families, scenes
from mmrecipes.data.splits import slot
from mmrecipes.mini import batches, losses, vlm
from mmrecipes.mini import model as mini_model
from mmrecipes.train.hooks import captured

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "training"
AT_ONCE = int(os.environ.get("AT_ONCE", max(1, (os.cpu_count() or 1) - 2)))  # processes
SHORTER = int(os.environ.get("SHORTER", 1))  # so many times less of everything, for a trial
TAUGHT_STEPS = 450  # of recovery with a teacher; with labels alone more, for as many FLOP
BUDGET = train.TrainConfig(700, 16, 0.001, 3e-4)
IMAGES = {"100": 8, "1000": 77, "10000": 770, "unlimited": None}  # labelled images, of thirteen questions each
LOGITS_AND_FEATURES = distill.LossWeights()

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "stages": {
        "staged": {"way": "staged", "of": 3},
        "naive": {"way": "naive", "of": 3},
        "helpers without stage 1": {"way": "helpers", "of": 3},
    },
    "recovery": {
        f"{start}, {who}": {"start": start, "from": who}
        for start in ("scored", "random", "scratch")
        for who in ("labels", "teacher")
    },
    "budget": {
        f"{start}, {labels} labels, {how}": {"start": start, "labels": labels, "how": how}
        for start, labels, how in (
            *(("inherited", n, how) for n in IMAGES for how in ("labels", "teacher", "teacher + unlabelled")),
            *(("random", "unlimited", how) for how in ("labels", "teacher")),
        )
        if (labels, how) != ("unlimited", "teacher + unlabelled")
    },
}
RULES = {
    "stages": "as many training FLOP as a third of the committed model's course; one seed each",
    "recovery": f"as many training FLOP, the teacher's included: {TAUGHT_STEPS} steps with a teacher; one seed each",
    "budget": f"{BUDGET.steps} steps of {BUDGET.batch} images; losses of answers and teacher, no patch labels; one seed each",
}
PAIRS = {
    "stages": [("naive", "staged"), ("helpers without stage 1", "staged")],
    "recovery": [
        *((f"{start}, labels", f"{start}, teacher") for start in ("scored", "random", "scratch")),
        *((f"{start}, {who}", f"scored, {who}") for start in ("random", "scratch") for who in ("labels", "teacher")),
    ],
    "budget": [
        *((f"inherited, {n} labels, labels", f"inherited, {n} labels, teacher") for n in IMAGES),
        *((f"inherited, {n} labels, teacher", f"inherited, {n} labels, teacher + unlabelled") for n in list(IMAGES)[:-1]),
        ("random, unlimited labels, labels", "random, unlimited labels, teacher"),
    ],
}


# ---- batches


class AnswersOnly(batches.ChatBatches):
    """`ChatBatches` whose loss is that of the answers alone, of `pool` labelled images over and over if given; with a teacher
    every other batch holds new images without answers, which the teacher gives."""

    def __init__(self, config: train.TrainConfig, tokenizer, pool: int | None, teacher: nn.Module | None = None):
        super().__init__(data.block("student/chat"), config.steps, config.batch, tokenizer)
        self.pool, self.teacher, self.done = pool, teacher, (None, None)
        self.blank = self.ids(f" {'0' * 3}<end_of_utterance>")  # as long as the longest answer, a printed code
        self.unlabelled = False

    def __getitem__(self, i: int):
        self.unlabelled = self.teacher is not None and i % 2 == 1
        return super().__getitem__(i)

    def draw(self, i: int) -> list[scenes.Scene]:
        if self.unlabelled:
            return [scenes.make_scene(seed) for seed in slot(data.block("student/images"), i, self.batch)]
        if self.pool is None:
            return super().draw(i)
        # a new order of the pool each time that it is through; a batch larger than the pool holds images twice
        places = [i * self.batch + k for k in range(self.batch)]
        return [scenes.make_scene(self.block[_shuffled(self.pool, at // self.pool)[at % self.pool]]) for at in places]

    def _question(self, scene: scenes.Scene, family: str, n: int) -> families.Question:
        asked = super()._question(scene, family, n)
        return replace(asked, answer="0" * 3) if self.unlabelled else asked

    def answer_loss(self, model: nn.Module, batch) -> tuple[Tensor, int, dict[str, float]]:
        batch = self._completed(batch)
        loss, logs = losses.answer_loss(model, batch, self.word_ids, align=0.0)
        return loss, int((batch.answers[:, 1:] >= 0).sum()), logs

    def _completed(self, batch):
        """The batch; one of blanks with the teacher's greedy answers in their place, made once for all models that read it."""
        if self.done[0] is not batch:
            slots, size = batch.answers >= 0, len(self.blank)
            blank = torch.tensor(self.blank, device=batch.ids.device)
            same = slots.sum() % size == 0 and bool((batch.answers[slots].view(-1, size) == blank).all())
            whole = complete(self.teacher.to(batch.ids.device), batch, size, self.word_ids) if self.teacher and same else batch
            self.done = (batch, whole)
        return self.done[1]


@cache
def _shuffled(n: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()


@torch.no_grad()
def complete(teacher: nn.Module, batch, size: int, word_ids: Tensor):
    """`batch` with the teacher's greedy answers in its slots of `size` tokens; nothing is asked behind an end of sequence."""
    slots, ids, answers = batch.answers >= 0, batch.ids.clone(), batch.answers.clone()
    stop, going = teacher.processor.tokenizer.eos_token_id, None
    for k in range(size):
        with captured(teacher) as seen:
            losses.answer_loss(teacher, batch._replace(ids=ids, answers=batch.answers), word_ids, 0.0)
        token = seen["logits"].view(-1, size, seen["logits"].shape[-1])[:, k].argmax(-1)
        going = torch.ones_like(token, dtype=torch.bool) if going is None else going
        filled = ids[slots].view(-1, size)
        filled[:, k] = token
        ids[slots] = filled.flatten()
        asked = answers[slots].view(-1, size)
        asked[:, k] = token.where(going, -100)
        answers[slots] = asked.flatten()
        going = going & (token != stop)
    return batch._replace(ids=ids, answers=answers)


# ---- FLOP


def step_flop(module: nn.Module, loss: train.Loss, batch: Any) -> int:
    """Forward and backward of one batch, as PyTorch counts it, on the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(module, batch)[0].backward()
    module.zero_grad()
    return counter.get_total_flops()


def _mean_flop(module: nn.Module, loss: train.Loss, drawn: Sequence[Any]) -> float:
    return statistics.fmean(step_flop(module, loss, drawn[i]) for i in (0, 1))


# ---- groups


def stages(way: str, of: int, work: Path) -> dict:
    """mini-vlm from nothing, in STAGES cut to a part, or all at once for as many FLOP."""
    plan = {name: replace(c, steps=max(2, c.steps // of // SHORTER)) for name, c in vlm.STAGES.items()}
    if way == "staged":
        told = _plan(work, sum(c.steps for c in plan.values()), course_flop(plan))
        return told | {"model": models.load(vlm.train_mini_vlm(work / "model", work, plan))}
    processor = mini_model.make_processor()
    model = mini_model.make_model(processor.tokenizer)
    probes = losses.Probes(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    both = nn.ModuleDict({"model": model} | ({"probes": probes} if way == "helpers" else {}))
    align = vlm.STAGES["align"]
    drawn = batches.ChatBatches(data.block("mini-vlm/align"), 2, align.batch, processor.tokenizer)

    def loss(both: nn.ModuleDict, batch: Any) -> tuple[Tensor, dict[str, float]]:
        helpers = both["probes"] if way == "helpers" else None
        return losses.answer_loss(both["model"], batch, drawn.word_ids, 0.1 if helpers else 0.0, helpers)

    each = _mean_flop(both, loss, drawn)
    steps = max(2, round(course_flop(plan) / each))
    drawn = batches.ChatBatches(data.block("mini-vlm/align"), steps, align.batch, processor.tokenizer)
    told = _plan(work, steps, steps * each)
    train.fit(both, drawn, loss, replace(align, steps=steps), work)
    model.processor = processor
    return told | {"model": model.cpu()}


def course_flop(plan: dict[str, train.TrainConfig]) -> float:
    """Of mini-vlm's stages."""
    processor = mini_model.make_processor()
    model = mini_model.make_model(processor.tokenizer)
    both = nn.ModuleDict({"model": model, "probes": losses.Probes(model.config.vision_config.hidden_size)})
    total = 0.0
    for name, config in plan.items():
        model.model.vision_model.requires_grad_(name != "align")
        drawn = vlm.stage_batches(name, replace(config, steps=2), processor.tokenizer)
        total += config.steps * _mean_flop(both, vlm._stage_loss(name, drawn), drawn)
    return total


def recovery(start: str, who: str, work: Path) -> dict:
    """The narrower model, trained from `start` for as many FLOP as TAUGHT_STEPS with a teacher take."""
    teacher, seen = models.load("mini-vlm").requires_grad_(False), data.calibration(structured.CALIBRATION)
    config = replace(structured.GENTLE, steps=max(2, TAUGHT_STEPS // SHORTER))
    if start == "scratch":  # as fast as a model from nothing may learn
        config = replace(config, lr=vlm.STAGES["align"].lr, adam_lr=vlm.STAGES["align"].adam_lr)
    model = _narrower(teacher, start, seen)
    chats = partial(batches.ChatBatches, data.block("recovery/chat"), batch=config.batch, tokenizer=teacher.processor.tokenizer)
    flop = {k: _recovery_flop(model, t, chats(steps=2)) for k, t in (("labels", None), ("teacher", teacher))}
    steps = config.steps if who == "teacher" else round(config.steps * flop["teacher"] / flop["labels"])
    config = replace(config, steps=steps)
    told = _plan(work, steps, steps * flop[who])
    return told | {"model": distill.recover(model, chats(steps=steps), config, teacher if who == "teacher" else None, work)}


def _narrower(teacher: nn.Module, start: str, seen) -> nn.Module:
    scored = structured.cut(teacher, structured.KEEP, seen)
    if start == "scored":
        return scored
    if start == "random":  # as `structured.cut`, refit included, but for which neurons stay
        noise = torch.Generator().manual_seed(0)
        for part, n in structured.KEEP.items():
            scores = prune.magnitude_importance(teacher)[part]["neurons"]
            drawn = prune.strongest(torch.rand(scores.shape, generator=noise), n)
            teacher = prune.keep_ffn_neurons(teacher, {part: drawn}, seen if part == "vision" else None)
        return teacher
    torch.manual_seed(0)
    blank = type(scored)(scored.config)
    blank.generation_config, blank.processor = scored.generation_config, scored.processor
    return blank.eval()


def _recovery_flop(model: nn.Module, teacher: nn.Module | None, drawn: Sequence[Any]) -> float:
    weights = distill.kd.LABELS_ONLY if teacher is None else distill.LossWeights()
    module = distill.kd.StudentWithProjections(models.clone(model).requires_grad_(True), teacher or model, learned=False)
    return _mean_flop(module, distill.kd.distillation_loss(teacher, weights, drawn.answer_loss), drawn)


def budget(start: str, labels: str, how: str, work: Path) -> dict:
    """The student, trained for BUDGET.steps."""
    teacher, seen = models.load("mini-vlm").requires_grad_(False), data.calibration(students.CALIBRATION)
    config = replace(BUDGET, steps=max(2, BUDGET.steps // SHORTER))
    if start == "random":
        config = replace(config, lr=vlm.STAGES["align"].lr, adam_lr=vlm.STAGES["align"].adam_lr)
    model = distill.make_student(teacher, students.SIZES, seen, inherit=start == "inherited")
    giver = models.clone(teacher).requires_grad_(False) if "unlabelled" in how else None
    drawn = AnswersOnly(config, teacher.processor.tokenizer, IMAGES[labels], giver)
    taught = teacher if how != "labels" else None
    weights = LOGITS_AND_FEATURES if taught else distill.kd.LABELS_ONLY
    module = distill.kd.StudentWithProjections(models.clone(model).requires_grad_(True), taught or model, learned=bool(taught))
    each = _mean_flop(module, distill.kd.distillation_loss(taught, weights, drawn.answer_loss), drawn)
    told = _plan(work, config.steps, config.steps * each)
    return told | {"model": distill.distill(model, taught, drawn, config, weights, work)}


def _plan(work: Path, steps: int, flop: float) -> dict:
    """What a run is about to do, kept for the case that it does not come to its end."""
    told = {"steps": steps, "tflop": flop / 1e12}
    models.write_json(work / "plan.json", told)
    return told


def _log(work: Path) -> dict[str, list]:
    """Every tenth step of a run, or of all its stages with questions, in turn."""
    parts = [work / stage for stage in vlm.STAGES if (work / stage).is_dir()] or [work]
    rows = []
    for part in parts:
        lines = [json.loads(line) for line in (part / "log.jsonl").read_text().splitlines()]
        kept = [r for i, r in enumerate(lines) if i % 10 == 0 or i + 1 == len(lines)]
        rows += [r | ({"stage": part.name} if part != work else {}) for r in kept]
    keys = [k for k in ("stage", "step", "seconds", "loss", "answer", *families.FAMILIES) if any(k in r for r in rows)]
    return {key: [row.get(key) for row in rows] for key in keys}


# ---- all of them


def run(group: str, name: str) -> None:
    """One run in this process, and its row in runs/training."""
    given, work = RUNS[group][name], WORK / group / name
    begin = time.perf_counter()
    if group == "stages":
        found = stages(given["way"], given["of"], work)
    elif group == "recovery":
        found = recovery(given["start"], given["from"], work)
    else:
        found = budget(given["start"], given["labels"], given["how"], work)
    minutes, model = (time.perf_counter() - begin) / 60, found.pop("model")
    rows = data.test_split(4200 // SHORTER)
    scored = evaluate.vqa(model.to("cuda" if torch.cuda.is_available() else "cpu"), rows, batch_size=200)
    row = {"name": name, **given, **found, "minutes": minutes, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"accuracy": vars(scored.overall), "families": {f: vars(s) for f, s in scored.families.items()}, "log": _log(work)}
    models.write_json(WORK / group / f"{name}.json", {"row": row, "right": scored.right, "environment": measure.environment()})


def everything(limit_s: float, chosen: Sequence[str] = ()) -> None:
    """All runs that are not there yet, or those of the groups or names `chosen`, AT_ONCE of them together, the longest first;
    none goes on after `limit_s` seconds."""
    end = time.monotonic() + limit_s
    waiting = [(g, n) for g in RUNS for n in RUNS[g] if not (WORK / g / f"{n}.json").exists()]
    waiting = [(g, n) for g, n in waiting if not chosen or {g, n} & set(chosen)]
    waiting.sort(key=lambda run: "unlabelled" not in run[1])  # its teacher answers, too
    running: dict[tuple[str, str], subprocess.Popen] = {}
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < AT_ONCE:
            group, name = waiting.pop(0)
            (WORK / group).mkdir(parents=True, exist_ok=True)
            log = (WORK / group / f"{name}.out").open("w")
            command = [sys.executable, __file__, "run", group, name]
            running[group, name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        for key, process in list(running.items()):
            if process.poll() is not None:
                print(f"{'/'.join(key)} ended with {process.returncode}", flush=True)
                del running[key]
        time.sleep(0.5)
    for process in running.values():
        process.kill()
    if left := [*running, *waiting]:
        print("not finished:", left)


def collect(before: dict) -> dict:
    """What results/training.json says, groups without a run in runs/training as `before`. A run that was stopped has its log, as
    far as it came, and no accuracy. Groups may have been measured on different days: each names its GPU."""
    found: dict[str, Any] = {"environment": before.get("environment"), "groups": {}}
    for group, runs in RUNS.items():
        if not (WORK / group).is_dir() and group in before.get("groups", {}):
            found["groups"][group] = before["groups"][group]
            continue
        rows, right, where = [], {}, None
        for name, given in runs.items():
            path, work = WORK / group / f"{name}.json", WORK / group / name
            if path.exists():
                kept = json.loads(path.read_text())
                rows.append(kept["row"])
                right[name], found["environment"] = kept["right"], kept["environment"]
                where = {"gpu": kept["environment"].get("gpu"), "date": kept["environment"]["date"]}
            elif (work / "plan.json").exists():
                log = _log(work)
                told = json.loads((work / "plan.json").read_text())
                rows.append({"name": name, **given, **told, "stopped": log["step"][-1] + 1, "log": log})
        pairs = {f"{b} against {a}": evaluate.paired(right[a], right[b]) for a, b in PAIRS[group] if a in right and b in right}
        paired = {k: vars(v) for k, v in pairs.items()}
        found["groups"][group] = {"rule": RULES[group], "measured": where, "runs": rows, "paired": paired}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(*sys.argv[2:])
    else:
        everything(float(sys.argv[1]) if len(sys.argv) > 1 else 10**6, sys.argv[2:])
        results = ROOT / "results" / "training.json"
        models.write_json(results, collect(json.loads(results.read_text()) if results.exists() else {}))
