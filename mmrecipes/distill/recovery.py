"""A short training after pruning: the loss of the right answers, alone or beside a parent that shows what it would have said.

Notebooks 20 and 21 use it. With a parent this is knowledge distillation (Hinton et al. 2015, arXiv:1503.02531), its features
included (FitNets, arXiv:1412.6550; for cut language models: Minitron, arXiv:2407.14679).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import clone, linears
from mmrecipes.train.hooks import captured, layer_pairs
from mmrecipes.train.optim import optimizers, schedule


@dataclass(frozen=True)
class Course:
    """How long and how fast. `lr` is for Muon (matrices), `adam_lr` for everything else."""

    steps: int = 500
    batch: int = 16
    lr: float = 0.001
    adam_lr: float = 3e-4


def lessons(model: nn.Module, course: Course) -> Sequence[Any]:
    """The house model's lessons for `course`: pictures and questions that it has never seen."""
    from mmrecipes.mini.curriculum import chat_batches

    return chat_batches("recovery", course, model.processor.tokenizer)


def recover(
    model: nn.Module,
    course: Course,
    parent: nn.Module | None = None,
    rows: Any = None,
    work: Path | None = None,
    every: int = 50,
) -> nn.Module:
    """A trained copy of `model`, which was made from `parent`; without one it learns from the right answers alone.

    Zeros of linear layers stay zeros, so that a pruned model stays pruned.
    Trains on the house model's lessons, or on `rows` (image, question, answer), over and over: that takes any VLM. With a
    folder `work` a checkpoint is written `every` so many steps, and a killed run goes on there. Raises UserError when the
    loss is not finite, or a checkpoint is damaged or belongs to another course.
    """
    if course.steps < 1 or course.batch < 1:
        raise UserError(f"recover: {course}; expected at least one step, and at least one row in each batch")
    student = clone(model).train()
    student.requires_grad_(True)
    parent = None if parent is None else clone(parent).requires_grad_(False)  # it only shows, and computes no gradients
    steppers = optimizers([student], course.lr, course.adam_lr)
    base = [[g["lr"] for g in s.param_groups] for s in steppers]
    masks = {layer.weight: layer.weight != 0 for _, layer in linears(student) if (layer.weight == 0).any()}
    begin, seconds = _resume(student, steppers, work, repr(course)) if work else (0, 0.0)
    started = time.perf_counter() - seconds
    lesson = _lessons_loss(student, course) if rows is None else _rows_loss(student, course, rows)
    for step in range(begin, course.steps):
        for stepper, rates in zip(steppers, base, strict=True):
            for group, lr in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = lr * schedule(step, course.steps, max(1, min(50, course.steps // 10)))
        loss, logs = imitate(student, parent, lambda m, step=step: lesson(m, step))
        if not torch.isfinite(loss):
            raise UserError(f"recover: the loss of step {step} is {loss.item()}; lower the course's lr")
        loss.backward()
        for weight, mask in masks.items():
            if weight.grad is not None:  # a tower's last layers may feed nothing
                weight.grad.mul_(mask)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, mask in masks.items():  # momentum and Muon's matrix arithmetic would bring them back
                weight.mul_(mask)
        if work:
            row = {"step": step, "seconds": round(time.perf_counter() - started, 1)} | logs
            with (work / "log.jsonl").open("a") as f:
                f.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            if (step + 1) % every == 0 or step + 1 == course.steps:
                state = {"course": repr(course), "step": step + 1, "seconds": time.perf_counter() - started}
                state |= {"model": student.state_dict(), "optimizers": [s.state_dict() for s in steppers]}
                torch.save(state, work / "checkpoint.pt.part")
                os.replace(work / "checkpoint.pt.part", work / "checkpoint.pt")
    return student.eval()


def imitate(student: nn.Module, parent: nn.Module | None, lesson: Callable[[nn.Module], Tensor]) -> tuple[Tensor, dict]:
    """`lesson(model)`, the loss of the right answers, plus, with a parent, how far the student is from what it computes.

    Two distances: of the answers' probabilities (Kullback-Leibler divergence, nats a token), and of the visual features and
    the language model's hidden states (squared error over their variance), where widths are the same.
    """
    with captured(student) as own:
        loss = lesson(student)
    logs = {"answers": loss.item()}
    if parent is None:
        return loss, logs
    with captured(parent) as wanted, torch.no_grad():
        lesson(parent)
    far = F.kl_div(
        own["logits"].float().log_softmax(-1), wanted["logits"].float().log_softmax(-1), log_target=True, reduction="none"
    )
    terms = {"divergence": far.sum(-1).mean(), "vision": _apart(own["vision"], wanted["vision"])}
    pairs = layer_pairs(own["hidden"], wanted["hidden"])
    terms["hidden"] = sum(_apart(*pair) for pair in pairs) / len(pairs)
    return loss + sum(terms.values()), logs | {k: v.item() for k, v in terms.items()}


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    if found.shape != wanted.shape:  # the width was cut: only the answers can be compared
        return torch.zeros((), device=found.device)
    return (found - wanted).square().mean() / wanted.var()


def _lessons_loss(model: nn.Module, course: Course) -> Callable[[nn.Module, int], Tensor]:
    from mmrecipes.mini.losses import answer_loss

    batches, last = lessons(model, course), {}

    def loss(m: nn.Module, step: int) -> Tensor:
        if step not in last:  # student and parent see the same batch, made once
            last.clear()
            last[step] = batches[step]
        return answer_loss(m, last[step], batches.word_ids, 0.1)[0]

    return loss


def _rows_loss(model: nn.Module, course: Course, rows: Any) -> Callable[[nn.Module, int], Tensor]:
    from mmrecipes.models.prompts import teacher_forced

    batches = list(teacher_forced(model, rows, course.batch))

    def loss(m: nn.Module, step: int) -> Tensor:
        inputs, lengths = batches[step % len(batches)]
        wanted = torch.full_like(inputs["input_ids"], -100)
        for row, k in enumerate(lengths):
            wanted[row, -k:] = inputs["input_ids"][row, -k:]
        keep = max(lengths) + 1
        logits = m(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, -keep + 1 :].flatten(), ignore_index=-100)

    return loss


def _resume(student: nn.Module, steppers: list, work: Path, course: str) -> tuple[int, float]:
    if work.exists() and not work.is_dir():
        raise UserError(f"recover: {work} is a file; give a folder for the checkpoints")
    work.mkdir(parents=True, exist_ok=True)
    path = work / "checkpoint.pt"
    if not path.exists():
        (work / "log.jsonl").unlink(missing_ok=True)
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True)
    except Exception as e:
        raise UserError(f"recover: {path} cannot be read ({e}); remove it to begin anew") from e
    if not isinstance(state, dict) or state.get("course") != course:
        raise UserError(f"recover: {path} was written by another course; move it away, or give another work folder")
    try:
        student.load_state_dict(state["model"])
    except RuntimeError as e:  # other names or shapes
        raise UserError(f"recover: {path} holds another model than this one; move it away, or give another work folder") from e
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    log = work / "log.jsonl"
    rows = [line for line in log.read_text().splitlines() if json.loads(line)["step"] < state["step"]]
    log.write_text("".join(line + "\n" for line in rows))
    return state["step"], state["seconds"]
