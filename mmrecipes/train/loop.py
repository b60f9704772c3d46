"""The one training loop, on one process or many: `accelerate launch` runs it unchanged, on CPUs or GPUs (DDP).

A batch is a pure function of its step: a killed run goes on at its last checkpoint, every process takes its rows of one batch.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import data

from mmrecipes import quiet, track
from mmrecipes.errors import UserError, one_line, require
from mmrecipes.measure import machine
from mmrecipes.models import saving
from mmrecipes.models.modules import parts
from mmrecipes.models.prompts import teacher_forced
from mmrecipes.train.optim import optimizers, schedule

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast."""

    steps: int
    batch: int = 16  # rows of all processes, and of all parts of an accumulated step, together
    lr: float = 0.004  # of Muon (matrices)
    adam_lr: float = 1e-3  # of everything else
    accumulate: int = 1  # parts in which a batch is computed, to save memory
    device: str | None = None  # cpu or cuda; by default cuda where there is one
    checkpoint_every: int = 100
    about: str = ""  # a checkpoint of a run about something else is refused


class LossModule(nn.Module):
    """Model and loss as one module, since DDP only sees gradients that come from calling the module it wraps."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        return self.loss(self.model, batch)


def fit(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    config: TrainConfig,
    work: Path | None = None,
    after_step: Callable[[], None] | None = None,
) -> nn.Module:
    """Train what in `model` requires a gradient, in place: step `i` on `batches[i]`, a tensor, or a tuple or dict, rows first.
    `loss(model, batch)` gives the mean over the batch's rows (other losses, such as contrastive ones, cannot be accumulated), and
    numbers to log. With a folder `work` there are a log and a checkpoint, and a finished run is loaded. A GPU works in bf16 mixed
    precision unless `accelerate launch` says otherwise. Raises UserError when the loss is not finite, when rows do not divide
    evenly, or when a checkpoint is damaged or of another run.
    """
    from rich.progress import track as progress

    accelerator = _accelerator(config.device)
    processes = accelerator.num_processes
    if any(hasattr(p, "placements") for p in model.parameters()):  # a DTensor
        raise UserError(
            "fit: parameters are sharded (fully_shard), and it trains whole ones; hand it the model as it was "
            "loaded, with DDP for several processes, or train the shards as in notebook 53"
        )
    if min(config.steps, config.batch, config.accumulate) < 1 or config.batch % (processes * config.accumulate):
        expected = f"steps >= 1, and a batch that {processes} processes x {config.accumulate} parts divide"
        raise UserError(f"fit: {config}; expected {expected}")
    model.train()
    for m in model.modules():  # a frozen batch norm keeps its statistics, too
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters()):
            m.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    module, *steppers = accelerator.prepare(LossModule(model, loss), *optimizers([model], config.lr, config.adam_lr))
    rates = [stepper.param_groups[0]["lr"] for stepper in steppers]
    run = repr(replace(config, device=None, checkpoint_every=100))  # where it runs and how often it is saved may change
    begin, seconds = _resume(accelerator, model, work, run) if work else (0, 0.0)
    started, warmup = time.perf_counter() - seconds, max(1, min(50, config.steps // 10))
    hidden = quiet.progress_hidden() or not accelerator.is_main_process
    record = _record(accelerator, model, batches, config, work) if begin < config.steps else None
    drawn = _draw(batches, begin, config.steps, accelerator.device)
    for step in progress(range(begin, config.steps), "training", disable=hidden):
        for stepper, rate in zip(steppers, rates, strict=True):
            stepper.param_groups[0]["lr"] = rate * schedule(step, config.steps, warmup)
        total, logs = _backward(accelerator, module, next(drawn), config)
        if not math.isfinite(total):
            raise UserError(f"fit: the loss of step {step} is {total}; lower lr (it is {config.lr})")
        accelerator.clip_grad_norm_(trained, 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if after_step:
            after_step()
        spent = time.perf_counter() - started
        row = {"seconds": round(spent, 1), "loss": round(total, 4)} | {k: round(float(v), 4) for k, v in logs.items()}
        if work and accelerator.is_main_process:
            with (work / "log.jsonl").open("a") as f:
                f.write(json.dumps({"step": step} | row) + "\n")
        track.log(row, step, record)
        if work and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            _write(accelerator, work, {"run": run, "step": step + 1, "seconds": spent})
    return model.eval()


def _record(accelerator: Any, model: nn.Module, batches: Sequence[Any], config: TrainConfig, work: Path | None):  # -> Run | None
    """The run that this training is in the experiment record, with what an earlier process logged; None where it is off."""
    if not (track.wanted() and accelerator.is_main_process):
        return None
    log = work / "log.jsonl" if work else None
    past = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    about = {"model": type(model).__name__, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    about |= vars(config) | {"seed": torch.initial_seed(), "first batch": track.data_hash(batches[0])}
    name = f"train {config.about.partition('(')[0] or type(model).__name__}"
    run = track.open_run(name, lambda: about | machine.environment(), work, resumed=bool(past))
    track.log_past(past, run)
    return run


def _draw(batches: Sequence[Any], begin: int, steps: int, device: torch.device) -> Iterator[Any]:
    """The batches from step `begin` on. Beside a GPU worker processes make those of a torch Dataset, so that it need not wait."""
    beside_gpu, rest = device.type != "cpu" and isinstance(batches, data.Dataset), data.Subset(batches, range(begin, steps))
    workers = min(8, os.cpu_count() or 1) if beside_gpu else 0
    return iter(data.DataLoader(rest, batch_size=None, num_workers=workers, generator=torch.Generator()))


def _backward(accelerator: Any, module: nn.Module, batch: Any, config: TrainConfig) -> tuple[float, dict[str, float]]:
    """Add the gradients of one batch, part by part; its loss, a mean over all processes, and what to log."""
    parts, total = accelerator.num_processes * config.accumulate, 0.0
    tensors = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, dict) else batch
    lengths = {len(t) for t in tensors}
    if parts > 1 and lengths != {config.batch}:  # Qwen-VL's patches are not rows
        raise UserError(f"fit: tensors of {sorted(lengths)} rows; to cut it in {parts} parts all must have {config.batch}")
    for part in range(config.accumulate):
        rows = shard(batch, accelerator.process_index * config.accumulate + part, parts, accelerator.device)
        with accelerator.no_sync(module) if part + 1 < config.accumulate else torch.enable_grad(), accelerator.autocast():
            loss, logs = module(rows)
            accelerator.backward(loss / config.accumulate)
        total += loss.detach() / config.accumulate
    return accelerator.reduce(total, "mean").item(), logs  # every process sees the same, so all stop or none


class RowBatches(Sequence):
    """Rows (image, question, answer) as batches for a model's own processor, over and over: dicts with "answers" (B, T).
    Without a column `image` they are text alone. Raises UserError for fewer rows than a batch.
    """

    def __init__(self, model: nn.Module, rows: Any, config: TrainConfig):
        whole = len(rows) - len(rows) % max(1, config.batch)
        if not whole or config.batch < 1:
            raise UserError(f"train: {len(rows)} rows for batches of {config.batch}; give more rows, or a smaller batch")
        self.steps, self.made = config.steps, []
        for inputs, lengths in teacher_forced(model, rows.select(range(whole)), config.batch):
            answers = torch.full_like(inputs["input_ids"], -100)
            for row, k in enumerate(lengths):
                answers[row, -k:] = inputs["input_ids"][row, -k:]
            self.made.append({**inputs, "answers": answers})

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.made[i % len(self.made)]

    @staticmethod
    def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, float]]:
        """Mean cross-entropy of the right answers' tokens, in nats; how many they are; nothing else to log."""
        inputs = {k: v for k, v in batch.items() if k != "answers"}
        keep = int((batch["answers"] >= 0).sum(-1).max()) + 1  # the answers end their rows
        # not by logits_to_keep, which not every model knows
        with parts(model)["head"].register_forward_pre_hook(lambda _, args: (args[0][:, -keep:],)):
            logits = model(**inputs, use_cache=False).logits.float()
        answers = batch["answers"][:, -keep + 1 :]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), answers.flatten(), ignore_index=-100)
        return loss, int((answers >= 0).sum()), {}


def mean_over_processes(value: float) -> float:
    """The mean of a number over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def read_log(work: Path) -> dict[str, list[float]]:
    """The columns of a run's log: "step", "seconds", "loss", and what the loss reported, None where it did not."""
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return {k: [row.get(k) for row in rows] for k in dict.fromkeys(k for row in rows for k in row)}


def main_process() -> bool:
    """Is this the process that writes files? With one process it is."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _accelerator(device: str | None):  # -> accelerate.Accelerator
    require("accelerate", extra="train")
    from accelerate import Accelerator, DistributedDataParallelKwargs

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if device not in (None, "cpu", "cuda") or (on_cpu and device == "cuda"):
        raise UserError(f"fit: device {device!r} cannot be used here; expected cpu, or cuda where there is a GPU")
    # on CPUs accelerate says nothing of FSDP's settings and keeps every parameter whole
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if on_cpu else "bf16")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # last layers may feed nothing, frozen ones learn nothing
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=[unused])
    except ValueError as e:  # accelerate keeps one setting a process
        raise UserError(f"fit: this process already trained on another device ({one_line(e)}); start a new one") from e
    if fsdp or str(accelerator.distributed_type).endswith("FSDP"):
        raise UserError("fit: FSDP cuts matrices that Muon needs whole; launch it with DDP (--multi_gpu), or see notebook 53")
    return accelerator


def shard(batch: Any, part: int, parts: int, device: torch.device) -> Any:
    """Part `part` of `parts` of the rows of a batch (a tensor, or a dict or tuple of them), on `device`."""
    from accelerate.utils import recursively_apply

    return recursively_apply(lambda t: t.tensor_split(parts)[part].to(device, non_blocking=True), batch)


def _write(accelerator: Any, work: Path, progress: dict[str, Any]) -> None:
    part = work / "checkpoint.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part), safe_serialization=False)  # tied weights: safetensors would warn of them
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "progress.json").write_text(json.dumps(progress))
        saving.take_place(part, work / "checkpoint")
    accelerator.wait_for_everyone()


def _resume(accelerator: Any, model: nn.Module, work: Path, run: str) -> tuple[int, float]:
    """Load the checkpoint in `work`, if there is one, and cut the log behind it: how many steps it had, and seconds."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as e:  # it, or what should hold it, is a file or read-only
        raise UserError(f"fit: {work} cannot be a folder for checkpoints ({one_line(e)}); give another") from e
    checkpoint, log = work / "checkpoint", work / "log.jsonl"
    if not checkpoint.exists():
        log.unlink(missing_ok=True)
        return 0, 0.0
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        # a 4-bit layer writes its scales beside its weight and does not read them; it is frozen, so they are the same
        packed = any(p.dtype == torch.uint8 for p in model.parameters())
        if progress["run"] == run:
            accelerator.load_state(str(checkpoint), strict=not packed)
    except Exception as e:  # whatever a damaged or foreign file makes the readers raise
        raise UserError(f"fit: {checkpoint} cannot be resumed ({one_line(e)}); remove it to begin anew") from e
    if progress["run"] != run:
        raise UserError(f"fit: {checkpoint} is of another run ({progress['run']}); move it away, or give another work folder")
    if accelerator.is_main_process and log.exists():
        lines = log.read_text().splitlines(keepends=True)[: progress["step"]]  # what came after the checkpoint comes again
        aside = log.with_suffix(".part")
        aside.write_text("".join(lines))
        os.replace(aside, log)
    return progress["step"], progress["seconds"]
