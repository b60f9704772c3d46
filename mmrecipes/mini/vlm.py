"""Trains the house model `mini-vlm` from nothing: one command, on two CPU cores or a GPU, resumable.

In stages, as the field does it (LLaVA, arXiv:2304.08485; SmolVLM, arXiv:2504.05299), told in notebook 02:
1. `vision`: the vision tower alone learns, patch by patch, what the scene's ground truth says is there; then
   `reading`: the same on pictures with much printed on them, the characters weighted up, since they come last;
2. `align`: connector and language model learn to answer, with the tower frozen. Answers alone teach too little in a few
   hours, so three helpers stand beside them: each visual token should resemble the words for what it shows; seven
   attention heads are told where to look (at the words of a name, at the object so named, at what is printed); and on the way a
   name must tell whether and where its object is;
3. `joint`: everything is unfrozen and trained together, at a lower rate; the tower keeps its first task beside the new
   one, so that it does not forget.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmrecipes.errors import UserError, one_line
from mmrecipes.mini.batches import MANY, ChatBatch, ChatBatches, VisionBatches
from mmrecipes.mini.losses import Probes, answer_loss
from mmrecipes.mini.model import make_model, make_processor
from mmrecipes.train.optim import optimizers, schedule


@dataclass(frozen=True)
class Stage:
    """One training stage. `lr` is for Muon (matrices); `adam_lr` for everything else."""

    name: str
    steps: int
    batch: int
    lr: float
    adam_lr: float


STAGES = (
    Stage("vision", 1000, 64, 0.005, 1.5e-3),
    Stage("reading", 2200, 64, 0.004, 1e-3),
    Stage("align", 1700, 16, 0.004, 1e-3),
    Stage("joint", 500, 16, 0.0007, 2e-4),
)


DENSE = ("vision", "reading")  # the stages that train the tower alone


@dataclass
class _Run:
    """What every stage of one run shares."""

    model: nn.Module
    probes: Probes
    tokenizer: object
    stages: tuple[Stage, ...]
    work: Path
    every: int

    def plan(self) -> str:
        """What a checkpoint belongs to: these stages, and a model of this size."""
        return repr((self.stages, sum(p.numel() for p in self.model.parameters())))


def train_mini_vlm(
    out: Path,
    work: Path = Path("runs/mini-vlm"),
    stages: tuple[Stage, ...] = STAGES,
    device: str | None = None,
    every: int = 100,
    model: nn.Module | None = None,
) -> Path:
    """Train `mini-vlm` from nothing into directory `out`; a killed run goes on where its last checkpoint in `work` was.

    `model`, one of its class with four layers in its language model, is trained in place instead. A checkpoint is written
    `every` so many steps. On a GPU the arithmetic is bf16 mixed precision; on a CPU float32, which trains faster there. Returns
    `out`. Raises UserError when `out` holds something that is not a model, before any work.
    """
    from mmrecipes.models import saving

    if model is not None and (
        type(model).__name__ != "Idefics3ForConditionalGeneration" or model.config.text_config.num_hidden_layers != 4
    ):
        given = type(model).__name__
        raise UserError(f"train: a {given}; expected an Idefics3ForConditionalGeneration with four layers in its language model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    saving.check_replaceable(out)
    saving.check_replaceable(work / "new")  # the same question for checkpoints: may we write there?
    work.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    model = (make_model(processor.tokenizer) if model is None else model.requires_grad_(True).train()).to(device)
    own = model.config
    probes = Probes(own.vision_config.hidden_size, own.text_config.hidden_size).to(device)
    run = _Run(model, probes, processor.tokenizer, stages, work, every)
    state = _read_checkpoint(run)
    if state:
        model.load_state_dict(state["model"])
        probes.load_state_dict(state["probes"])
    at = (state["stage"], state["step"]) if state else (0, 0)
    seconds = _rewind_log(work / "log.jsonl", [s.name for s in stages], *at)
    for number in range(at[0], len(stages)):
        resumed = number == at[0] and at[1] > 0
        _run_stage(run, number, state["optimizers"] if resumed else None, at[1] if resumed else 0, seconds if resumed else 0)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return saving.save(model.eval(), processor, out, dtype=torch.bfloat16, extra={"training.json": json.dumps(log)})


def _run_stage(run: _Run, number: int, optimizer_states: list | None, begin: int, seconds: float) -> None:
    from rich.progress import track

    from mmrecipes import quiet

    stage, model, probes, core = run.stages[number], run.model, run.probes, run.model.model
    device = next(model.parameters()).device
    core.vision_model.requires_grad_(stage.name != "align")
    trained = [core.vision_model if stage.name in DENSE else model, probes]
    first = sum(s.steps * s.batch for s in run.stages[:number]) // stage.batch + 1  # fresh seeds in every stage
    if stage.name in DENSE:
        printed = 0 if stage.name == "vision" else MANY
        batches = VisionBatches(first + begin, first + stage.steps, stage.batch, printed)
    else:
        batches = ChatBatches(first + begin, first + stage.steps, stage.batch, run.tokenizer)
    steppers = optimizers(trained, stage.lr, stage.adam_lr)
    base = [[g["lr"] for g in s.param_groups] for s in steppers]
    for stepper, saved in zip(steppers, optimizer_states or [], strict=bool(optimizer_states)):
        stepper.load_state_dict(saved)
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
    started = time.perf_counter() - seconds
    shown = track(loader, f"{number + 1}/{len(run.stages)} {stage.name}", disable=quiet.progress_hidden())
    for step, batch in enumerate(shown, start=begin):
        for stepper, lrs in zip(steppers, base, strict=True):
            for group, lr in zip(stepper.param_groups, lrs, strict=True):
                group["lr"] = lr * schedule(step, stage.steps)
        moved = (t.to(device, non_blocking=True) for t in batch)
        batch = ChatBatch(*moved) if isinstance(batch, ChatBatch) else tuple(moved)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            if stage.name in DENSE:
                char = 1.0 if stage.name == "vision" else 3.0
                loss, logs = probes.patches(core.vision_model(batch[0]).last_hidden_state, *batch[1:], char=char)
            else:
                loss, logs = answer_loss(model, batch, batches.word_ids, 0.1, probes)
        if not torch.isfinite(loss):
            raise UserError(f"train: the loss of stage {stage.name}, step {step} is {loss.item()}; lower the stage's lr")
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters() if p.grad is not None], 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == stage.steps:
            row = {"stage": stage.name, "step": step, "seconds": round(time.perf_counter() - started, 1), "loss": loss.item()}
            with (run.work / "log.jsonl").open("a") as f:
                f.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in (row | logs).items()}) + "\n")
        if (step + 1) % run.every == 0 and step + 1 < stage.steps:
            _write_checkpoint(run, number, step + 1, steppers)
    _write_checkpoint(run, number + 1, 0, [])


def _rewind_log(path: Path, names: list[str], stage: int, step: int) -> float:
    """Drop what was logged after the checkpoint, so that no step is logged twice; the seconds its stage had taken by then."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [r for r in rows if (names.index(r["stage"]), r["step"]) < (stage, step)]
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(aside, path)
    return max((r["seconds"] for r in kept if names.index(r["stage"]) == stage), default=0.0)


def _write_checkpoint(run: _Run, stage: int, step: int, steppers: list[torch.optim.Optimizer]) -> None:
    state = {
        "plan": run.plan(),
        "stage": stage,
        "step": step,
        "model": run.model.state_dict(),
        "probes": run.probes.state_dict(),
    }
    torch.save(state | {"optimizers": [s.state_dict() for s in steppers]}, run.work / "checkpoint.pt.part")
    os.replace(run.work / "checkpoint.pt.part", run.work / "checkpoint.pt")


def _read_checkpoint(run: _Run) -> dict | None:
    path, device = run.work / "checkpoint.pt", next(run.model.parameters()).device
    if not path.exists():
        return None
    go_on = "move it away to start anew, or give another work folder"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # whatever a damaged file makes the reader raise
        raise UserError(f"train: {path} can't be read as a checkpoint ({one_line(e)}); {go_on}") from e
    if not isinstance(state, dict) or state.get("plan") != run.plan():
        raise UserError(f"train: {path} was written by a run with other stages or another model, so it can't be resumed; {go_on}")
    return state
