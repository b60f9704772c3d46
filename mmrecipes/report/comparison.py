"""One row a variant: accuracy, time and memory side by side, as a table, a plot and a JSON file."""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmrecipes import track
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate import generation
from mmrecipes.evaluate.statistics import Paired, Share, agreement, paired
from mmrecipes.inference.exported import Exported
from mmrecipes.measure import machine, memory, process, timing
from mmrecipes.measure import size as measure_size
from mmrecipes.models.prompts import Rows, chat
from mmrecipes.models.saving import write_json

COLUMNS = {  # key of a row -> (heading, how a value is printed)
    "name": ("variant", "{}"),
    "accuracy": ("accuracy [95%]", "{}"),
    "agreement": ("agreement [95%]", "{}"),
    "change": ("points vs first [95%]", "{}"),
    "ttft_ms": ("TTFT ms", "{:.0f}"),
    "tokens_per_s": ("tokens/s", "{:.0f}"),
    "peak_mb": ("peak MB", "{:.0f}"),
    "disk_mb": ("disk MB", "{:.1f}"),
}


@dataclass(frozen=True)
class Comparison:
    """Rows (one dict a variant), where they were measured, and on what. Shows itself in notebooks and terminals."""

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def frame(self):  # -> pandas.DataFrame
        """Printed cells, a row a variant; columns that no row has are left out."""
        import pandas as pd

        keys = [k for k in COLUMNS if any(row.get(k) is not None for row in self.rows)]
        cells = [["-" if row.get(k) is None else COLUMNS[k][1].format(_text(row[k])) for k in keys] for row in self.rows]
        return pd.DataFrame(cells, columns=[COLUMNS[k][0] for k in keys])

    def __str__(self) -> str:
        return "\n".join([self.frame().to_string(index=False, line_width=1000), *self.notes])

    def __rich__(self):  # -> rich.console.RenderableType
        """For a terminal of 80 columns: intervals without spaces, an n that all share below, headings on two lines."""
        from rich.console import Group
        from rich.table import Table

        table, frame, notes = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False), self.frame(), self.notes
        shared = {value.n for row in self.rows for value in row.values() if isinstance(value, Share)}
        if len(shared) == 1:
            note = f" n={shared.pop()}"
            frame, notes = frame.replace(note, "", regex=True), [f"{note.strip()} for each row.", *notes]
        for i, heading in enumerate(frame.columns):
            table.add_column(
                heading if i == 0 else heading.replace(" ", "\n", 1), justify="right" if i else "left", no_wrap=i > 0
            )
        for cells in frame.replace(", ", ",", regex=True).itertuples(index=False):
            table.add_row(*cells)
        return Group(table, *notes)

    def _repr_html_(self) -> str:
        notes = "".join(f"<p><small>{html.escape(n)}</small></p>" for n in self.notes)
        return self.frame().to_html(index=False, border=0) + notes

    def plot(self, x: str = "ttft_ms"):  # -> matplotlib.figure.Figure
        """Accuracy (or agreement) with its interval against `x`, a numeric column; better is up and to the left."""
        from matplotlib.figure import Figure

        measure_of = "accuracy" if self.rows[0].get("accuracy") else "agreement"
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        shown = [r for r in self.rows if r.get(x) is not None and r.get(measure_of)]
        for row, marker in zip(shown, "osD^vPX*<>" * 3, strict=False):
            share = row[measure_of]
            spread = [[100 * (share.value - share.low)], [100 * (share.high - share.value)]]
            axes.errorbar(row[x], 100 * share.value, yerr=spread, fmt=marker, capsize=3, markersize=8, label=row["name"])
        axes.set_xlabel({"ttft_ms": "time to first token (ms)", "disk_mb": "size on disk (MB)"}.get(x, x))
        axes.set_ylabel(f"{measure_of} (%)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON to `path`, aside and then renamed."""
        return write_json(Path(path), {"environment": self.environment, "rows": self.rows, "notes": self.notes})


def _text(value: Any) -> Any:
    if isinstance(value, Share):
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}] n={value.n}"
    if isinstance(value, Paired):
        return f"{value.points:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
    return value


def check_parity(
    model: torch.nn.Module, simulated: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], tolerance: float = 0.15
) -> float:
    """Relative error of `model`'s last logits to those of `simulated`, the same arithmetic done slowly in float32.
    The median over `inputs` (what a processor returns, one a question): a value that rounds to the other side may throw one.
    A model that loses accuracy passes, as its simulation loses it too; one that computes something else raises ParityError.
    """
    errors = []
    for each in inputs:
        with torch.inference_mode():
            found, wanted = (m(**timing.cast(m, each)).logits[:, -1].float() for m in (model, simulated))
        if not torch.isfinite(found).all():
            raise ParityError("the compressed model's logits are not finite: it is broken, not lossy, and gets no row")
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    error = statistics.median(errors)
    if error > tolerance:
        raise ParityError(
            f"the compressed model's logits are {error:.2f} (relative) away from a simulation of the same arithmetic, more than "
            f"{tolerance}: it is broken, not lossy, and gets no row"
        )
    return error


def compare(
    rows: Rows | None = None,
    *,
    n: int = 600,
    seconds: float = 60,
    simulated: dict[str, torch.nn.Module] | None = None,
    timed: bool = True,
    **variants: torch.nn.Module | Exported,
) -> Comparison:
    """Measure every model (name=model; the first, a PyTorch model, is the baseline) on the same questions.
    `rows` defaults to the first `n` of the committed test split; without an `answer` column agreement with the first
    model is measured instead of accuracy. A variant that would need more than `seconds` answers fewer questions, its n
    shown. `simulated` gives, for a variant that runs on other kernels, a simulation of the same arithmetic: a variant that
    disagrees with it, or whose outputs are not finite, raises ParityError. PyTorch models are timed interleaved; an exported
    model (which its export compared with its source) in a fresh process of its own, with as many threads.
    """
    from mmrecipes.data import datasets

    if not variants:
        raise UserError("compare: no model given; call compare(fp32=model, int8=smaller)")
    rows = datasets.test_split(n) if rows is None else rows
    baseline = next(iter(variants.values()))
    probes = [chat(baseline, r["image"], r["question"]) for r in rows.select(range(min(7, len(rows))))]
    for name, simulation in (simulated or {}).items():
        check_parity(variants[name], simulation, probes)
    costs = _costs(variants, probes[0], rows[0], timed)
    table, reference, notes = [], None, []
    for name, model in variants.items():
        predictions = _predict(model, rows, seconds)
        row, reference = _scored(predictions, rows.select(range(len(predictions))), reference)
        table.append({"name": name} | row | {"predictions": predictions} | costs[name])
        if len(predictions) < len(rows):
            notes.append(f"{name} answered {len(predictions)} of {len(rows)} questions: that took the {seconds:.0f} s allowed.")
    found = Comparison(table, machine.environment(), notes)
    track.log_results("compare", vars(found))
    return found


def _costs(variants: Mapping[str, Any], inputs: Mapping, first: Mapping, timed: bool) -> dict[str, dict[str, Any]]:
    """Of each variant, by name: milliseconds, tokens per second, peak memory (unless not `timed`), and size on disk."""
    eager = {name: model for name, model in variants.items() if isinstance(model, torch.nn.Module)}
    speed, found = timing.latency(eager, inputs) if timed else {}, {}
    for name, model in variants.items():
        size = {"disk_mb": measure_size.disk_bytes(model if name in eager else model.folder) / 1e6}
        if timed and name in eager:
            size |= {"ttft_ms": speed[name]["ttft"]["median"], "tokens_per_s": speed[name]["tokens_per_s"]["median"]}
            size |= {"latency": speed[name], "peak_mb": memory.peak_memory(model, inputs)["peak_mb"]}
        elif timed:
            threads = torch.get_num_threads()
            alone = process.profile_exported(model.folder, first["image"], first["question"], 8, 7, threads)
            size |= {k: alone[k] for k in ("ttft_ms", "tokens_per_s", "peak_mb")}
        found[name] = size
    return found


def _scored(predictions: list[str], rows: Rows, reference: list | None) -> tuple[dict[str, Any], list]:
    """Accuracy with what changed against the baseline's `reference`, or agreement with it; and the baseline's, if this is it."""
    from mmrecipes.data import datasets

    if "answer" not in rows.column_names:
        reference = predictions if reference is None else reference
        both = min(len(reference), len(predictions))
        return {"agreement": agreement(predictions[:both], reference[:both])}, reference
    result = generation.score(predictions, rows["answer"][:], rows["family"][:], datasets.majority_floor(rows))
    row = {"accuracy": result.overall, "families": result.families, "floors": result.floors}
    if reference is not None:
        both = min(len(reference), len(result.right))  # the questions that both had time for
        row["change"] = paired(reference[:both], result.right[:both])
    return row, result.right if reference is None else reference


def _predict(model: torch.nn.Module | Exported, rows: Rows, seconds: float) -> list[str]:
    """Answers to as many of `rows`, from the top, as fit in about `seconds`."""
    found: list[str] = []
    started, size = time.perf_counter(), 10
    while len(found) < len(rows):
        part = rows[len(found) : len(found) + size]
        found += generation.answers(model, part["image"], part["question"], progress=False)
        spent = time.perf_counter() - started
        if spent > seconds:
            break
        size = max(10, min(200, int((seconds - spent) * len(found) / spent)))  # what still fits at the pace so far
    return found
