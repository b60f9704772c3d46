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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from mmrecipes import quiet
from mmrecipes.data import folders
from mmrecipes.errors import UserError, one_line, require
from mmrecipes.evaluate import fidelity, likelihood
from mmrecipes.evaluate.fidelity import Loss
from mmrecipes.export import pipeline
from mmrecipes.models import loading, modules, prompts
from mmrecipes.models.modules import block_of
from mmrecipes.models.saving import check_replaceable, take_place
from mmrecipes.quantize import mixed_precision
from mmrecipes.report import doctor
from mmrecipes.shrink import artifact, report
from mmrecipes.shrink.artifact import open_artifact, write_artifact
from mmrecipes.shrink.candidates import STEPS, Candidate, best, candidates, costs, eligible_units, mixed, round_all
from mmrecipes.shrink.request import MAX_LOSS, RUNTIMES, STAGE_SECONDS, Evaluator, Request, make_evaluator
from mmrecipes.shrink.sizes import budget_bytes, float_bytes

if TYPE_CHECKING:
    from datasets import Dataset

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
        base = loading.load(request.model)
        budget = None if request.budget is None else budget_bytes(request.budget, float_bytes(base))
        _can_export(base, request.runtime)
        side = getattr(base.config.vision_config, "image_size", None)
        rows = folders.gather(side if isinstance(side, int) else 256, request.calib, request.images, request.n or 600)
    with stage("the doctor looks at it"):
        first = rows.verify[0]
        diagnosis = doctor.examine(base, prompts.chat(base, first["image"], first["question"]))
        blocked = {f.where for f in diagnosis.findings if "4-bit layers" in f.technique}
        four = eligible_units(base, request.runtime, blocked)
    with stage("the original answers"):
        rows, verify, choose = _answered(base, rows, request.n)
        limit = MAX_LOSS["agreement" if verify.right is None else "accuracy"] if request.max_loss is None else request.max_loss
    with stage(f"rounding {len(four)} units to 4 bits, and what each loses"):
        rounded = round_all(base, four, request.runtime, rows.calibrate)
        table = costs(base, rounded, four, request.runtime, rows.calibrate.select(range(rows.tried)))
    with stage("choosing a plan"):
        if budget is not None:
            rungs, at = [best(base, table, request.runtime, budget)], 0
        else:
            rungs, at = _climb(base, rounded, candidates(base, table, request.runtime), choose, limit)
    report.show_plan(console, base, rungs, at, request)
    if dry_run:
        console.print("Nothing was written. The loss of the exported model is measured when it is made.")
        return {"rungs": rungs, "chosen": at, "costs": table}

    found: dict[str, Any] = {"request": request, "limit": limit, "budget_bytes": budget, "rows": _counts(rows)}
    found |= {"notes": rows.notes, "diagnosis": diagnosis, "costs": table, "parts": modules.part_of(base)}
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    try:
        part.mkdir(parents=True)
        made = part / "model"
        with stage("compressing, exporting and verifying"):
            found |= _made(base, rounded, table, rungs, at, (made, request, budget, limit), (verify, choose))
        with stage("time and memory, before and after"):
            found |= artifact.measured(base, made, request.runtime, verify, found)
        with stage("the report"):
            report.write(made, base, verify, found)
        take_place(made, out)
    except OSError as e:
        raise UserError(f"{out}: could not be written ({one_line(e)}); nothing was changed: give another directory") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report.show(console, found, request.out)
    return found


class _Stages:
    """Says which stage runs, and how long each took."""

    def __init__(self, console: Console, count: int):
        self.console, self.count, self.done = console, count, 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.done += 1
        began, label = time.perf_counter(), f"[bold]{self.done}/{self.count}[/] {what}"
        bar = contextlib.nullcontext() if quiet.progress_hidden() else self.console.status(f"{label} ...")
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
        require("accelerate", "bitsandbytes")
    check_replaceable(out)


def _can_export(base: nn.Module, runtime: str) -> None:
    if runtime != "torch":
        pipeline.supported(base)
    elif "head" not in modules.parts(base):
        raise UserError(f"shrink: {type(base).__name__} compares pictures with texts; give a model that answers")


def _answered(base: nn.Module, rows: folders.Rows, n: int | None) -> tuple[folders.Rows, Evaluator, Evaluator]:
    """Rows with answers to all, as many as there is time for, and the original's own on those that verify and choose."""
    few = rows.verify.select(range(min(8, len(rows.verify))))
    pace = _seconds(lambda: fidelity.greedy_tokens(base, few)) / len(few)
    verify = rows.verify if n else _head(rows.verify, STAGE_SECONDS / pace, 32)
    choose = _head(rows.choose, STAGE_SECONDS / pace / STEPS, 16)
    judged = make_evaluator(base, verify)
    labelled = judged.right is not None and "answer" in choose.column_names
    chosen = make_evaluator(base, choose, labelled)
    few = _head(rows.calibrate, 0, 4)
    few = few if labelled and "answer" in few.column_names else fidelity.with_answers(base, few)
    pace = _seconds(lambda: likelihood.answer_logits(base, few)) / len(few)
    # GPTQ looks at all rows once for each block
    calibrate = _head(rows.calibrate, STAGE_SECONDS / pace / len({block_of(n) for n, _ in modules.linears(base)}), 4)
    tried = min(32, len(calibrate), max(2, int(STAGE_SECONDS / pace / len(mixed_precision.units(base)))))
    if not labelled or "answer" not in calibrate.column_names:
        calibrate = fidelity.with_answers(base, calibrate)
    return dataclasses.replace(rows, calibrate=calibrate, choose=choose, verify=verify, tried=tried), judged, chosen


def _head(rows: Dataset, affordable: float, least: int) -> Dataset:
    return rows.select(range(min(len(rows), max(least, int(affordable)))))


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first time is slower
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _climb(
    base: nn.Module, rounded: nn.Module, rungs: list[Candidate], choose: Evaluator, limit: float
) -> tuple[list[Candidate], int]:
    """The rungs, tried from the smallest on until one holds, and which; the last where none does."""
    tried = list(rungs)
    for i, rung in enumerate(rungs):
        tried[i] = dataclasses.replace(rung, loss=choose.loss(mixed(base, rounded, rung.plan, trial=True))[0])
        if tried[i].loss.points <= limit:
            break
    return tried, i


def _made(base: nn.Module, rounded: nn.Module, table: list, rungs: list[Candidate], at: int, order: tuple, judges: tuple) -> dict:
    """Export plans until one keeps what was promised. UserError where none does."""
    made, request, budget, limit = order
    verify, choose = judges
    tried = list(rungs)
    while True:
        rung = tried[at]
        size = write_artifact(base, rounded, rung, made, request.runtime)
        allowed = budget
        for _ in range(2):  # the prediction may be off by a little: then plan for that much less
            if allowed is None or size <= budget:
                break
            allowed -= size - budget + 1000
            rung = best(base, table, request.runtime, allowed)
            size = write_artifact(base, rounded, rung, made, request.runtime)
        if budget is not None and size > budget:
            raise UserError(f"--budget {request.budget}: the smallest files came to {size / 1e6:.2f} MB; ask for that or more")
        loss, answers = verify.loss(open_artifact(made, request.runtime))
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


def _too_lossy(base, rounded, table, request: Request, loss: Loss, limit: float, size: int, choose: Evaluator) -> str:
    larger = [r for r in candidates(base, table, request.runtime) if r.bytes > size]
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


def _counts(rows: folders.Rows) -> dict[str, int]:
    found = {"calibrated on": len(rows.calibrate), "sensitivity on": rows.tried, "chosen on": len(rows.choose)}
    return found | {"verified on": len(rows.verify), "pictures": len(set(rows.verify["name"]))}
