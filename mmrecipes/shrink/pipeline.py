"""`mmrecipes shrink`: your vision-language model made smaller, checked on your images, with a report and code to run it.

Examine it, calibrate, measure what each unit loses in 4 bits, plan, compress, export, verify, report. Nothing appears at the
output directory until all of that went well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mmrecipes import quiet, track
from mmrecipes.errors import UserError, require, unsupported
from mmrecipes.evaluate import generation
from mmrecipes.export import fastest, pipeline
from mmrecipes.measure import machine
from mmrecipes.measure import size as measured_size
from mmrecipes.models import loading, prompts
from mmrecipes.models.modules import parts
from mmrecipes.models.prompts import Rows
from mmrecipes.models.saving import check_replaceable, directory_aside
from mmrecipes.quantize.mixed_precision import Cost
from mmrecipes.report import doctor
from mmrecipes.shrink import artifact, fidelity, folders, report
from mmrecipes.shrink.candidates import STEPS, Candidate, best, costs, eligible_units, mixed, round_all, series
from mmrecipes.shrink.fidelity import Evaluator, Loss, make_evaluator
from mmrecipes.shrink.source import Source, budget_bytes

RUNTIMES = ("onnx", "openvino", "executorch", "torch", "auto")  # auto: onnx, and its vision encoder where that runs fastest here
MAX_LOSS = {"accuracy": 1.0, "agreement": 5.0}  # points; another token is often as good, so more of these may differ


@dataclass(frozen=True)
class Request:
    """What was asked for. `budget` is "0.25x" of the float32 weights, or "80MB"; `max_loss` is in points (None: MAX_LOSS).
    Each stage may take about `stage_seconds`: it works on fewer rows where a model is slow."""

    model: str
    out: Path
    runtime: str = "onnx"
    budget: str | None = None
    max_loss: float | None = None
    calib: Path | None = None
    images: Path | None = None
    n: int | None = None
    stage_seconds: float = 120.0


def check_request(request: Request) -> None:
    """UserError for what can be seen to be wrong before the model is read."""
    if request.runtime not in RUNTIMES:
        raise UserError(f"--runtime {request.runtime!r}: expected one of {', '.join(RUNTIMES)}")
    if request.budget is not None:
        budget_bytes(request.budget, 1)
    if request.max_loss is not None and not 0 <= request.max_loss <= 100:
        raise UserError(f"--max-loss {request.max_loss:g}: expected points between 0 and 100, such as 1.0")
    if request.runtime == "torch":
        require("accelerate", "bitsandbytes")
    pipeline.check_apart(str(request.model), request.out)
    check_replaceable(request.out)


@dataclass(frozen=True)
class Search:
    """What the search for a plan works with: every unit rounded, what each loses, and who says what a candidate loses."""

    request: Request
    source: Source
    rounded: nn.Module
    table: list[Cost]
    choose: Evaluator
    verify: Evaluator
    limit: float  # points that may be lost
    budget: int | None  # bytes
    images: Sequence[Any]  # a dozen, to fix ranges on


def run(request: Request, dry_run: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Shrink a model as `request` says, and write it with its report to `request.out`; returns what report.json holds.
    With `dry_run` it stops before anything is written, and prints the plan and the predicted size. Raises UserError for what
    the user can mend, and where the loss is above what was allowed: then nothing is written. In the experiment record all of it
    is one run: what was tried and lost, the report's numbers, images with other answers, and the error that ended it.
    """
    asked = {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(request).items()}
    with track.running(f"shrink {Path(request.model).name}", lambda: asked | {"seed": folders.SEED} | machine.environment()):
        return _run(request, dry_run, console or Console())


def _run(request: Request, dry_run: bool, console: Console) -> dict[str, Any]:
    out = Path(request.out).expanduser().resolve()
    stage = _Stages(console, 5 if dry_run else 8 + (request.runtime == "auto"))
    check_request(request)
    with stage("loading the model"):
        source = Source(loading.load(request.model), "onnx" if request.runtime == "auto" else request.runtime)
        stage.model = type(source.model).__name__
        if "head" not in parts(source.model):
            raise UserError(f"shrink: {stage.model} compares images with texts; give a model that answers, or use export.export")
        if request.runtime != "torch":
            pipeline.supported(source.model, source.runtime)
        elif getattr(source.model.config, "auto_map", None):
            cure = "give --runtime onnx or openvino, whose files need no code"
            raise UserError(f"shrink: {stage.model} runs code from its own directory, and would in 4 bits, too; {cure}")
        budget = None if request.budget is None else budget_bytes(request.budget, source.float_bytes)
        side = getattr(source.model.config.vision_config, "image_size", None)
        rows = folders.gather(side if isinstance(side, int) else 256, request.calib, request.images, request.n or 600)
    with stage("the doctor examines it"):
        if ignored := fidelity.settings(source.model):
            said = ", ".join(f"{name} {value}" for name, value in ignored.items())
            rows.notes.append(f"compared by the likeliest tokens alone, on both sides without the model's {said}")
        first = rows.verify[0]
        diagnosis = doctor.examine(source.model, prompts.chat(source.model, first["image"], first["question"]))
        four = eligible_units(source, {f.where for f in diagnosis.findings if "4-bit layers" in f.technique})
    with stage("the original answers"):
        rows, verify, choose = _answered(source, rows, request)
        limit = MAX_LOSS[verify.measure] if request.max_loss is None else request.max_loss
        if track.wanted():
            track.log({name: track.data_hash(getattr(rows, name)) for name in ("calibrate", "choose", "verify")})
    with stage(f"rounding {len(four)} units to 4 bits, and what each loses"):
        rounded = round_all(source, four, rows.calibrate)
        table = costs(source, rounded, four, rows.calibrate.select(range(rows.tried)))
    with stage("choosing a plan"):
        images = rows.calibrate.select(range(min(12, len(rows.calibrate))))["image"][:]
        search = Search(request, source, rounded, table, choose, verify, limit, budget, images)
        within = ([best(source, table, budget)], 0) if budget is not None else smallest_within(search, series(source, table))
        candidates, chosen = within
    report.show_plan(console, source, candidates, chosen)
    if dry_run:
        console.print("Nothing was written. The loss of the exported model is measured when it is made.")
        return {"candidates": candidates, "chosen": chosen, "costs": table}
    found = {"request": request, "limit": limit, "rows": rows.counts(), "notes": rows.notes, "diagnosis": diagnosis}
    found |= {"costs": table, "part": source.part, "float_bytes": source.float_bytes}
    found |= {"own_bytes": source.own_bytes, "kept": source.kept}
    _write(search, candidates, chosen, out, stage, found)
    report.show(console, found, request.out)
    return found


def _write(search: Search, candidates: list[Candidate], chosen: int, out: Path, stage: _Stages, found: dict[str, Any]) -> None:
    """Everything that appears at `out`, made aside; what is found on the way goes into `found`."""
    with directory_aside(out) as part:
        made = part / "model"
        with stage("compressing, exporting and verifying"):
            found |= build(search, candidates, chosen, made)
        if search.request.runtime == "auto":
            with stage("the vision encoder where it runs fastest"):
                found |= with_fastest_vision(search, found, made)
        with stage("time and memory, before and after"):
            found |= artifact.measured(search.source, made, search.verify, found)
        with stage("the report"):
            report.write(made, search.verify, found)
        for file in made.iterdir():
            file.rename(part / file.name)
        made.rmdir()


class _Stages:
    """Says which stage runs, and how long each took. What breaks in one for an unknown reason is told in one line."""

    def __init__(self, console: Console, count: int):
        self.console, self.count, self.done, self.model = console, count, 0, "this model"

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.done += 1
        began, label = time.perf_counter(), f"[bold]{self.done}/{self.count}[/] {what}"
        with contextlib.nullcontext() if quiet.progress_hidden() else self.console.status(f"{label} ..."):
            try:
                yield
            except (UserError, ImportError):
                raise
            except Exception as e:  # whatever an architecture that nobody tried makes the libraries raise
                raise unsupported(self.model, what, e) from e
        self.console.print(f"{label} [dim]{time.perf_counter() - began:.0f} s[/]", highlight=False)


def _answered(source: Source, rows: folders.RowSets, request: Request) -> tuple[folders.RowSets, Evaluator, Evaluator]:
    """Rows with answers to all, as many as there is time for, and the evaluators that verify and choose."""
    base, seconds = source.model, request.stage_seconds
    few = _head(rows.verify, 0, 8)
    pace = _seconds(lambda: fidelity.greedy_tokens(base, few)) / len(few)
    verify = make_evaluator(base, rows.verify if request.n else _head(rows.verify, seconds / pace, 32))
    choose_rows = _head(rows.choose, seconds / pace / STEPS, 16)
    labelled = verify.right is not None and "answer" in choose_rows.column_names
    choose = make_evaluator(base, choose_rows, labelled)
    own = not labelled or "answer" not in rows.calibrate.column_names  # calibrate on the model's own answers
    few = _head(rows.calibrate, 0, 4)
    few = fidelity.with_answers(base, few) if own else few
    pace = _seconds(lambda: generation.answer_logits(base, few)) / len(few)
    calibrate = _head(rows.calibrate, seconds / pace / source.passes, 4)
    tried = min(32, len(calibrate), max(2, int(seconds / pace / len(source.units))))
    calibrate = fidelity.with_answers(base, calibrate) if own else calibrate
    return dataclasses.replace(rows, calibrate=calibrate, choose=choose.rows, verify=verify.rows, tried=tried), verify, choose


def _head(rows: Rows, affordable: float, least: int) -> Rows:
    return rows.select(range(min(len(rows), max(least, int(affordable)))))


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first time is slower
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def smallest_within(search: Search, candidates: Sequence[Candidate]) -> tuple[list[Candidate], int]:
    """The candidates with their losses, tried from the smallest on until one is within the limit, and its index (or the last)."""
    tried = list(candidates)
    for i, candidate in enumerate(candidates):
        trial = mixed(search.source, search.rounded, candidate.plan, trial=True)
        tried[i] = dataclasses.replace(candidate, loss=search.choose.loss(trial)[0])
        track.log({"name": f"candidate {i}", "bytes": candidate.bytes, "points lost when tried": tried[i].loss.points})
        if tried[i].loss.points <= search.limit:
            break
    return tried, i


def build(search: Search, candidates: Sequence[Candidate], chosen: int, made: Path) -> dict[str, Any]:
    """Export candidates until one keeps what was promised. UserError where none does."""
    tried = list(candidates)
    while True:
        tried[chosen], size = _export_within(search, tried[chosen], made)
        loss, answers = search.verify.loss(artifact.open_artifact(made, search.source.runtime))
        track.log({"name": f"export {chosen}", "bytes": size, "points lost": loss.points, "allowed": search.limit})
        if loss.points <= search.limit:
            return {"candidates": tried, "chosen": chosen, "loss": loss, "answers": answers, "bytes": size}
        if search.budget is not None:
            raise UserError(_too_lossy(search, loss, size))
        if chosen + 1 == len(tried):
            raise UserError(
                f"even the largest plan, {size / 1e6:.2f} MB, loses {loss}: more than --max-loss {search.limit:g}. "
                f"Nothing was written; --max-loss {_above(loss.points)} would accept it"
            )
        chosen += 1


def with_fastest_vision(search: Search, found: dict[str, Any], made: Path) -> dict[str, Any]:
    """The export in `made` with the vision encoder that is fastest here, where loss and size stay within what is allowed; what
    then changes in `found`, and what was tried."""
    before = made.with_name("before")
    shutil.copytree(made, before)
    tried = fastest.choose_vision_(search.source.model, made, search.images)
    size = measured_size.disk_bytes(made)
    changed = not tried[0]["kept"]
    loss, answers = search.verify.loss(artifact.open_artifact(made, "auto")) if changed else (found["loss"], found["answers"])
    within = loss.points <= search.limit and (search.budget is None or size <= search.budget)
    if not within:
        shutil.rmtree(made)
        before.rename(made)
        return {"vision": [row | {"kept": i == 0} for i, row in enumerate(tried)]}
    shutil.rmtree(before)
    return {"vision": tried, "loss": loss, "answers": answers, "bytes": size}


def _export_within(search: Search, candidate: Candidate, made: Path) -> tuple[Candidate, int]:
    """The candidate written to `made`, and its bytes; a smaller one where the prediction was a little off the budget."""
    size, allowed = artifact.write_artifact(search.source, search.rounded, candidate, made), search.budget
    for _ in range(2):
        if allowed is None or size <= search.budget:
            break
        allowed -= size - search.budget + 1000
        candidate = best(search.source, search.table, allowed)
        size = artifact.write_artifact(search.source, search.rounded, candidate, made)
    if search.budget is not None and size > search.budget:
        budget = search.request.budget
        raise UserError(f"--budget {budget}: the smallest files came to {size / 1e6:.2f} MB; ask for that or more")
    return candidate, size


def _too_lossy(search: Search, loss: Loss, size: int) -> str:
    larger = [c for c in series(search.source, search.table) if c.bytes > size]
    tried, last = smallest_within(search, larger) if larger else ([], 0)
    cure = "no larger plan was found within the limit either"
    if tried and tried[last].loss.points <= search.limit:
        mb = tried[last].bytes / 1e6
        cure = f"the smallest that was found within it takes about {mb:.2f} MB: give --budget {1.02 * mb:.2f}MB"
    return (
        f"--budget {search.request.budget}: the best plan within it ({size / 1e6:.2f} MB) loses {loss}: more than "
        f"--max-loss {search.limit:g}. Nothing was written; {cure}, or --max-loss {_above(loss.points)}"
    )


def _above(points: float) -> str:
    return f"{-(-points * 10 // 1) / 10:.1f}"
