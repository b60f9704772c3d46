"""One training loop, on one process or many: `accelerate launch` runs it unchanged, on CPUs or GPUs (DDP).

The distillations of chapter 3 and the dual encoder's training use it. A batch is a pure function of its step, so a killed run
goes on where its last checkpoint was, and every process takes its own rows of the same global batch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrecipes import quiet
from mmrecipes.errors import UserError, one_line
from mmrecipes.models import saving
from mmrecipes.train.optim import optimizers, schedule

if TYPE_CHECKING:
    pass

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. `batch` is the global one: all processes together, all parts of an accumulated step together.

    `lr` is for Muon (matrices), `adam_lr` for everything else. `accumulate` steps one batch in so many parts, to save memory.
    """

    steps: int
    batch: int = 16
    lr: float = 0.004
    adam_lr: float = 1e-3
    accumulate: int = 1


class LossModule(nn.Module):
    """Model and loss as one module: DDP only sees gradients that come from calling the module it wraps."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Loss of this process's rows, a mean over them, and what to log."""
        return self.loss(self.model, batch)


def fit(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    course: TrainConfig,
    work: Path | None = None,
    every: int = 100,
    device: str | None = None,
    about: str = "",
) -> nn.Module:
    """Train what in `model` requires a gradient, in place: step `i` on `batches[i]`, a tensor or tuple of tensors, rows first.

    `loss(model, batch)` gives the mean over the batch's rows, and numbers to log. With a folder `work` there are a log, and a
    checkpoint `every` so many steps. A GPU is taken where there is one, unless `device` is "cpu"; its arithmetic is bf16 mixed
    precision unless `accelerate launch` says otherwise. A batch in parts is contrasted part by part: only a loss that is a mean
    over rows stays the same. `about` says what else makes this run what it is: a checkpoint of another is refused. Raises
    UserError when the loss is not finite, when rows do not divide evenly, or when a checkpoint is damaged or foreign.
    """
    from rich.progress import track

    accelerator = _accelerator(device)
    parts = accelerator.num_processes * course.accumulate
    if course.steps < 1 or course.batch < 1 or course.accumulate < 1 or course.batch % parts:
        expected = f"steps >= 1, and a batch that {accelerator.num_processes} processes x {course.accumulate} parts divide"
        raise UserError(f"fit: {course}; expected {expected}")
    model.train()
    for m in model.modules():  # a frozen batch norm keeps its statistics, too
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters()):
            m.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    lesson, *steppers = accelerator.prepare(LossModule(model, loss), *optimizers([model], course.lr, course.adam_lr))
    rates = [stepper.param_groups[0]["lr"] for stepper in steppers]
    begin, seconds = _resume(accelerator, work, f"{course} {about}") if work else (0, 0.0)
    started = time.perf_counter() - seconds
    hidden = quiet.progress_hidden() or not accelerator.is_main_process
    for step in track(range(begin, course.steps), "training", disable=hidden):
        for stepper, rate in zip(steppers, rates, strict=True):
            stepper.param_groups[0]["lr"] = rate * schedule(step, course.steps, max(1, min(50, course.steps // 10)))
        batch, total = batches[step], 0.0
        if parts > 1 and (lengths := _lengths(batch)) != {course.batch}:  # Qwen-VL's patches are no rows
            raise UserError(f"fit: tensors of {sorted(lengths)} rows; to cut it in {parts} parts all must have {course.batch}")
        for part in range(course.accumulate):
            mine = shard(batch, accelerator.process_index * course.accumulate + part, parts, accelerator.device)
            last = part + 1 == course.accumulate
            with torch.enable_grad() if last else accelerator.no_sync(lesson), accelerator.autocast():
                found, logs = lesson(mine)
                accelerator.backward(found / course.accumulate)
            total += found.detach() / course.accumulate
        total = accelerator.reduce(total, "mean").item()  # every process sees the same, so all stop or none
        if total != total or abs(total) == float("inf"):
            raise UserError(f"fit: the loss of step {step} is {total}; lower the course's lr (it is {course.lr})")
        accelerator.clip_grad_norm_(trained, 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if work and accelerator.is_main_process:
            row = {"step": step, "seconds": round(time.perf_counter() - started, 1), "loss": round(total, 4)}
            with (work / "log.jsonl").open("a") as f:
                f.write(json.dumps(row | {k: round(float(v), 4) for k, v in logs.items()}) + "\n")
        if work and ((step + 1) % every == 0 or step + 1 == course.steps):
            _write(accelerator, work, f"{course} {about}", step + 1, time.perf_counter() - started)
    return model.eval()


def mean_over_processes(value: float) -> float:
    """The mean of a number over all processes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    held = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(held)
    return held.item() / dist.get_world_size()


def read_log(work: Path) -> dict[str, list[float]]:
    """The columns of a run's log: "step", "seconds", "loss", and what the loss reported, None where it did not."""
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return {k: [row.get(k) for row in rows] for k in dict.fromkeys(k for row in rows for k in row)}


def main_process() -> bool:
    """Is this the process that writes files? With one process it is."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _accelerator(device: str | None):  # -> accelerate.Accelerator
    from mmrecipes.errors import require

    require("accelerate")
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"fit: device {device!r} cannot be used here; expected cpu, or cuda where there is a GPU")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if on_cpu else "bf16")
    # a tower's last layers may feed nothing, and frozen ones get no gradient
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        found = Accelerator(mixed_precision=wanted, cpu=on_cpu, kwargs_handlers=[unused])
    except ValueError as e:  # accelerate keeps one setting a process
        raise UserError(f"fit: this process already trained on another device ({one_line(e)}); start a new one") from e
    if str(found.distributed_type).endswith("FSDP"):
        raise UserError("fit: FSDP cuts matrices that Muon needs whole; launch it with DDP (--multi_gpu)")
    return found


def _lengths(batch: Any) -> set[int]:
    tensors = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, dict) else batch
    return {len(t) for t in tensors}


def shard(batch: Any, part: int, parts: int, device: torch.device) -> Any:
    """Part `part` of `parts` of a batch's rows, on `device`."""
    if isinstance(batch, dict):
        return {k: shard(t, part, parts, device) for k, t in batch.items()}
    if isinstance(batch, Tensor):
        each = len(batch) // parts
        return (batch if parts == 1 else batch[part * each : (part + 1) * each]).to(device, non_blocking=True)
    cut = [shard(t, part, parts, device) for t in batch]
    return type(batch)(*cut) if hasattr(batch, "_fields") else tuple(cut)


def _write(accelerator: Any, work: Path, course: str, step: int, seconds: float) -> None:
    part, done = work / "checkpoint.part", work / "checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part), safe_serialization=False)  # tied weights: safetensors would warn of them
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "at.json").write_text(json.dumps({"course": course, "step": step, "seconds": seconds}))
        saving.take_place(part, done)
    accelerator.wait_for_everyone()


def _resume(accelerator: Any, work: Path, course: str) -> tuple[int, float]:
    if work.exists() and not work.is_dir():
        raise UserError(f"fit: {work} is a file; give a folder for the checkpoints")
    work.mkdir(parents=True, exist_ok=True)
    done, path = work / "checkpoint", work / "log.jsonl"
    if not done.exists():
        path.unlink(missing_ok=True)
        return 0, 0.0
    try:
        at = json.loads((done / "at.json").read_text())
        if at["course"] != course:
            raise UserError(
                f"fit: {done} was written by another course or with other aims; move it away, or give another work folder"
            )
        # a 4-bit layer writes its scales beside its weight and does not read them; it is frozen, so they are the same
        packed = any(p.dtype == torch.uint8 for m in accelerator._models for p in m.parameters())
        accelerator.load_state(str(done), strict=not packed)
    except UserError:
        raise
    except Exception as e:  # whatever a damaged or foreign file makes the readers raise
        raise UserError(f"fit: {done} cannot be resumed ({one_line(e)}); remove it to begin anew") from e
    if accelerator.is_main_process and path.exists():
        lines = path.read_text().splitlines()[: at["step"]]  # a line a step; what came after the checkpoint comes again
        aside = path.with_suffix(".part")
        aside.write_text("".join(line + "\n" for line in lines))
        os.replace(aside, path)
    return at["step"], at["seconds"]
