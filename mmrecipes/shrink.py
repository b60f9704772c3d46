"""`mmrecipes shrink`: your vision-language model made smaller, checked on your pictures, with a report and code to run it.

Look at it, calibrate, see what each unit loses in 4 bits, plan, compress, export, verify, report. Nothing appears at `out` until
all of that went well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from mmrecipes import (
    checks,
    doctor,
    evaluate,
    export,
    exported,
    measure,
    models,
    plan,
    quantize,
    runtime,
    shrink_data,
    shrink_report,
    shrink_torch,
)
from mmrecipes.calibrated import block_of
from mmrecipes.checks import check_replaceable, take_place
from mmrecipes.errors import UserError, one_line
from mmrecipes.shrink_data import Loss
from mmrecipes.shrink_plan import STEPS, Rung, best, budget_bytes, costs, float_bytes, ladder, mixed, round_all, takers

if TYPE_CHECKING:
    from datasets import Dataset

    from mmrecipes.exported import Exported

RUNTIMES = (*export.PRECISIONS, "torch")
MOST = {"accuracy": 1.0, "agreement": 5.0}  # points that may be lost; words that differ are often as good, so more of these
PATIENCE = 120.0  # seconds that each stage may take: it works on fewer rows where a model is slow


@dataclass(frozen=True)
class Request:
    """What was asked for. `budget` is "0.25x" of the float32 weights, or "80MB"; `max_loss` is in points (None: MOST)."""

    model: str
    out: Path
    runtime: str = "onnx"
    budget: str | None = None
    max_loss: float | None = None
    calib: Path | None = None
    images: Path | None = None
    n: int | None = None


# ---- how it compares


@dataclass(frozen=True)
class Judge:
    """Rows, and what the original says to them: labels where it knows them, else its own words."""

    rows: Dataset
    words: list[list[int]]
    said: list[str]
    right: list[bool] | None  # None: without labels

    def loss(self, model: nn.Module | Exported) -> tuple[Loss, list[str] | list[list[bool]]]:
        """What `model` loses, and its answers; without labels which tokens agree."""
        if self.right is None:
            same = shrink_data.agreement(model, self.rows, self.words)
            return shrink_data.agreement_loss(same, self.rows["name"]), same
        asked = self.rows["image"][:], self.rows["question"][:]
        answers = evaluate.answers(model, *asked, batch_size=8, max_new_tokens=shrink_data.WORDS)
        return shrink_data.accuracy_loss(self.right, shrink_data.right(answers, self.rows["answer"])), answers


def judge(base: nn.Module, rows: Dataset, labelled: bool | None = None) -> Judge:
    """How `base` answers `rows`. Labels count if it knows them (`shrink_data.knows`), or as `labelled` says."""
    words = shrink_data.words(base, rows)
    said = [base.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in words]
    right = shrink_data.right(said, rows["answer"]) if "answer" in rows.column_names else None
    if right is not None and not (shrink_data.knows(right, rows["answer"]) if labelled is None else labelled):
        right = None
    return Judge(rows, words, said, right if labelled is not False else None)


# ---- the command


def run(request: Request, dry_run: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Shrink a model as `request` says, and write it with its report to `request.out`; returns what report.json holds.

    With `dry_run` it stops before anything is written, and prints the plan and the predicted size. Raises UserError for what
    the user can mend, and where the loss is above what was allowed: then nothing is written.
    """
    console, out = console or Console(), Path(request.out).expanduser().resolve()
    stage = _Stages(console, 5 if dry_run else 8)
    _sensible(request, out)
    with stage("loading the model"):
        base = models.load(request.model)
        budget = None if request.budget is None else budget_bytes(request.budget, float_bytes(base))
        _can_export(base, request.runtime)
        side = getattr(base.config.vision_config, "image_size", None)
        rows = shrink_data.gather(side if isinstance(side, int) else 256, request.calib, request.images, request.n or 600)
    with stage("the doctor looks at it"):
        first = rows.verify[0]
        diagnosis = doctor.examine(base, models.chat(base, first["image"], first["question"]))
        blocked = {f.where for f in diagnosis.findings if "4-bit layers" in f.technique}
        four = takers(base, request.runtime, blocked)
    with stage("the original answers"):
        rows, verify, choose = _answered(base, rows, request.n)
        limit = MOST["agreement" if verify.right is None else "accuracy"] if request.max_loss is None else request.max_loss
    with stage(f"rounding {len(four)} units to 4 bits, and what each loses"):
        rounded = round_all(base, four, request.runtime, rows.calibrate)
        table = costs(base, rounded, four, request.runtime, rows.calibrate.select(range(rows.tried)))
    with stage("choosing a plan"):
        if budget is not None:
            rungs, at = [best(base, table, request.runtime, budget)], 0
        else:
            rungs, at = _climb(base, rounded, ladder(base, table, request.runtime), choose, limit)
    shrink_report.show_plan(console, base, rungs, at, request)
    if dry_run:
        console.print("Nothing was written. The loss of the exported model is measured when it is made.")
        return {"rungs": rungs, "chosen": at, "costs": table}

    found: dict[str, Any] = {"request": request, "limit": limit, "budget_bytes": budget, "rows": _counts(rows)}
    found |= {"notes": rows.notes, "diagnosis": diagnosis, "costs": table, "parts": models.part_of(base)}
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    try:
        part.mkdir(parents=True)
        made = part / "model"
        with stage("compressing, exporting and verifying"):
            found |= _made(base, rounded, table, rungs, at, (made, request, budget, limit), (verify, choose))
        with stage("time and memory, before and after"):
            found |= shrink_report.measured(base, made, request.runtime, verify, found)
        with stage("the report"):
            shrink_report.write(made, base, verify, found)
        take_place(made, out)
    except OSError as e:
        raise UserError(f"{out}: could not be written ({one_line(e)}); nothing was changed: give another directory") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shrink_report.show(console, found, request.out)
    return found


class _Stages:
    """Says which stage runs, and how long each took."""

    def __init__(self, console: Console, count: int):
        self.console, self.count, self.done = console, count, 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.done += 1
        began, label = time.perf_counter(), f"[bold]{self.done}/{self.count}[/] {what}"
        bar = contextlib.nullcontext() if checks.quiet() else self.console.status(f"{label} ...")
        with bar:
            yield
        self.console.print(f"{label} [dim]{time.perf_counter() - began:.0f} s[/]", highlight=False)


def _sensible(request: Request, out: Path) -> None:
    """UserError for what can be seen to be wrong before the model is read."""
    if request.runtime not in RUNTIMES:
        raise UserError(f"--runtime {request.runtime!r}: expected one of {', '.join(RUNTIMES)}")
    if request.budget is not None:
        budget_bytes(request.budget, 1)
    if request.max_loss is not None and not 0 <= request.max_loss <= 100:
        raise UserError(f"--max-loss {request.max_loss:g}: expected points between 0 and 100, such as 1.0")
    if request.runtime == "torch":
        runtime.needs("accelerate", "bitsandbytes")
    check_replaceable(out)


def _can_export(base: nn.Module, runtime: str) -> None:
    if runtime != "torch":
        export.supported(base)
    elif "head" not in models.parts(base):
        raise UserError(f"shrink: {type(base).__name__} compares pictures with texts; give a model that answers")


def _answered(base: nn.Module, rows: shrink_data.Rows, n: int | None) -> tuple[shrink_data.Rows, Judge, Judge]:
    """Rows with answers to all, as many as there is time for, and the original's own on those that verify and choose."""
    few = rows.verify.select(range(min(8, len(rows.verify))))
    pace = _seconds(lambda: shrink_data.words(base, few)) / len(few)
    verify = rows.verify if n else _head(rows.verify, PATIENCE / pace, 32)
    choose = _head(rows.choose, PATIENCE / pace / STEPS, 16)
    judged = judge(base, verify)
    labelled = judged.right is not None and "answer" in choose.column_names
    chosen = judge(base, choose, labelled)
    few = _head(rows.calibrate, 0, 4)
    few = few if labelled and "answer" in few.column_names else shrink_data.with_answers(base, few)
    pace = _seconds(lambda: evaluate.answer_logits(base, few)) / len(few)
    # GPTQ looks at all rows once for each block
    calibrate = _head(rows.calibrate, PATIENCE / pace / len({block_of(n) for n, _ in quantize.linears(base)}), 4)
    tried = min(32, len(calibrate), max(2, int(PATIENCE / pace / len(plan.units(base)))))
    if not labelled or "answer" not in calibrate.column_names:
        calibrate = shrink_data.with_answers(base, calibrate)
    return dataclasses.replace(rows, calibrate=calibrate, choose=choose, verify=verify, tried=tried), judged, chosen


def _head(rows: Dataset, affordable: float, least: int) -> Dataset:
    return rows.select(range(min(len(rows), max(least, int(affordable)))))


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first time is slower
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _climb(base: nn.Module, rounded: nn.Module, rungs: list[Rung], choose: Judge, limit: float) -> tuple[list[Rung], int]:
    """The rungs, tried from the smallest on until one holds, and which; the last where none does."""
    tried = list(rungs)
    for i, rung in enumerate(rungs):
        tried[i] = dataclasses.replace(rung, loss=choose.loss(mixed(base, rounded, rung.plan, trial=True))[0])
        if tried[i].loss.points <= limit:
            break
    return tried, i


def _made(base: nn.Module, rounded: nn.Module, table: list, rungs: list[Rung], at: int, order: tuple, judges: tuple) -> dict:
    """Export plans until one keeps what was promised. UserError where none does."""
    made, request, budget, limit = order
    verify, choose = judges
    tried = list(rungs)
    while True:
        rung = tried[at]
        size = _written(base, rounded, rung, made, request.runtime)
        allowed = budget
        for _ in range(2):  # the prediction may be off by a little: then plan for that much less
            if allowed is None or size <= budget:
                break
            allowed -= size - budget + 1000
            rung = best(base, table, request.runtime, allowed)
            size = _written(base, rounded, rung, made, request.runtime)
        if budget is not None and size > budget:
            raise UserError(f"--budget {request.budget}: the smallest files came to {size / 1e6:.2f} MB; ask for that or more")
        loss, answers = verify.loss(opened(made, request.runtime))
        tried[at] = rung
        if loss.points <= limit:
            return {"rungs": tried, "chosen": at, "loss": loss, "answers": answers, "bytes": size}
        if budget is not None:
            raise UserError(_too_lossy(base, rounded, table, request, loss, limit, size, choose))
        if at + 1 == len(tried):
            raise UserError(
                f"even the largest plan, {size / 1e6:.2f} MB, loses {loss}: more than --max-loss {limit:g}. "
                f"Nothing was written; --max-loss {_above(loss.points)} would accept it"
            )
        at += 1


def _too_lossy(base, rounded, table, request: Request, loss: Loss, limit: float, size: int, choose: Judge) -> str:
    larger = [r for r in ladder(base, table, request.runtime) if r.bytes > size]
    tried, at = _climb(base, rounded, larger, choose, limit) if larger else ([], 0)
    holds = tried[at] if tried and tried[at].loss.points <= limit else None
    cure = "no larger plan was found to hold it either"
    if holds:
        cure = f"the smallest that was found to hold it takes about {holds.bytes / 1e6:.2f} MB: give --budget "
        cure += f"{1.02 * holds.bytes / 1e6:.2f}MB"
    return (
        f"--budget {request.budget}: the best plan within it ({size / 1e6:.2f} MB) loses {loss}: more than --max-loss {limit:g}. "
        f"Nothing was written; {cure}, or --max-loss {_above(loss.points)}"
    )


def _above(points: float) -> str:
    return f"{-(-points * 10 // 1) / 10:.1f}"


def _written(base: nn.Module, rounded: nn.Module, rung: Rung, made: Path, runtime: str) -> int:
    """Write the model of a plan to directory `made`; its bytes."""
    shutil.rmtree(made, ignore_errors=True)
    width = plan.widths(base, rung.plan)
    if runtime == "torch":
        shrink_torch.write(base, {n for n, b in width.items() if b == 4}, made)
    else:
        home, precision = models.part_of(base), {"vision": "int8", "language": "int8"}
        for name, bits in width.items():
            if bits == 4:
                side = "vision" if home[f"{name}.weight"] in ("vision", "connector") else "language"
                precision[side] = "mixed"
        export.export(mixed(base, rounded, rung.plan), made, runtime, precision)
    return measure.disk_bytes(made)


def opened(made: Path, runtime: str) -> nn.Module | Exported:
    """The written model, ready to answer."""
    return shrink_torch.load(made) if runtime == "torch" else exported.load_exported(made)


def _counts(rows: shrink_data.Rows) -> dict[str, int]:
    found = {"calibrated on": len(rows.calibrate), "sensitivity on": rows.tried, "chosen on": len(rows.choose)}
    return found | {"verified on": len(rows.verify), "pictures": len(set(rows.verify["name"]))}
