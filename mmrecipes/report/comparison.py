"""One row a variant: accuracy, time and memory side by side, as a table, a plot and a JSON file."""

from __future__ import annotations

import html
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate import generation
from mmrecipes.evaluate import statistics as evaluate_statistics
from mmrecipes.measure import machine, memory, timing
from mmrecipes.measure import size as measure_size
from mmrecipes.models.saving import write_json

if TYPE_CHECKING:
    from datasets import Dataset

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

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and one list of printed cells a row; columns that no row has are left out."""
        keys = [k for k in COLUMNS if any(row.get(k) is not None for row in self.rows)]
        return [COLUMNS[k][0] for k in keys], [
            ["-" if row.get(k) is None else COLUMNS[k][1].format(_text(row[k])) for k in keys] for row in self.rows
        ]

    def __str__(self) -> str:
        head, body = self.cells()
        width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, width, strict=True)).rstrip() for line in [head, *body]]
        return "\n".join([*lines, *self.notes])

    def __rich__(self):  # -> rich.console.RenderableType
        from rich.console import Group
        from rich.table import Table

        table = Table()
        head, body = self.cells()
        for i, heading in enumerate(head):
            table.add_column(heading, justify="left" if i == 0 else "right")
        for line in body:
            table.add_row(*line)
        return Group(table, *self.notes)

    def _repr_html_(self) -> str:
        head, body = self.cells()
        top = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body)
        notes = "".join(f"<p><small>{html.escape(n)}</small></p>" for n in self.notes)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>{notes}"

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
    if isinstance(value, evaluate_statistics.Share):
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}] n={value.n}"
    if isinstance(value, evaluate_statistics.Paired):
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
    rows: Dataset | None = None,
    *,
    n: int = 600,
    seconds: float = 60,
    simulated: dict[str, torch.nn.Module] | None = None,
    timed: bool = True,
    **models: torch.nn.Module,
) -> Comparison:
    """Measure every model (name=model; the first is the baseline) on the same questions, interleaved in time.

    `rows` defaults to the first `n` of the committed test split; without an `answer` column agreement with the first
    model is measured instead of accuracy. A variant that would need more than `seconds` answers fewer questions, its n
    shown. `simulated` gives, for a variant that runs on other kernels, a simulation of the same arithmetic: a variant that
    disagrees with it, or whose outputs are not finite, raises ParityError.
    """
    from mmrecipes.data import datasets
    from mmrecipes.models.prompts import chat

    if not models:
        raise UserError("compare: no model given; call compare(fp32=model, int8=smaller)")
    rows = datasets.test_split(n) if rows is None else rows
    baseline = next(iter(models.values()))
    inputs = chat(baseline, rows[0]["image"], rows[0]["question"])
    for name, twin in (simulated or {}).items():
        check_parity(
            models[name], twin, [chat(baseline, r["image"], r["question"]) for r in rows.select(range(min(7, len(rows))))]
        )
    speed = timing.latency(models, inputs) if timed else {}
    table, reference, notes = [], None, []
    for name, model in models.items():
        predictions = _predict(model, rows, seconds)
        part = rows.select(range(len(predictions)))
        row: dict[str, Any] = {"name": name}
        if "answer" in rows.column_names:
            result = generation.score(predictions, part["answer"][:], part["family"][:], datasets.majority_floor(part))
            row |= {"accuracy": result.overall, "families": result.families, "floors": result.floors}
            right = result.right
            if reference is not None:
                both = min(len(reference), len(right))  # the questions that both had time for
                row["change"] = evaluate_statistics.paired(reference[:both], right[:both])
            reference = right if reference is None else reference
        else:
            reference = predictions if reference is None else reference
            both = min(len(reference), len(predictions))
            row["agreement"] = evaluate_statistics.agreement(predictions[:both], reference[:both])
        row["predictions"] = predictions
        if timed:
            row |= {"ttft_ms": speed[name]["ttft"]["median"], "tokens_per_s": speed[name]["tokens_per_s"]["median"]}
            row |= {"latency": speed[name], "peak_mb": memory.peak_memory(model, inputs)["peak_mb"]}
        row["disk_mb"] = measure_size.disk_bytes(model) / 1e6
        table.append(row)
        if len(predictions) < len(rows):
            notes.append(f"{name} answered {len(predictions)} of {len(rows)} questions: that took the {seconds:.0f} s allowed.")
    return Comparison(table, machine.environment(), notes)


def _predict(model: torch.nn.Module, rows: Dataset, seconds: float) -> list[str]:
    """Answers to as many of `rows`, from the top, as fit in about `seconds`."""
    found: list[str] = []
    started, size = time.perf_counter(), 10
    while len(found) < len(rows):
        part = rows[len(found) : len(found) + size]
        found += generation.answers(model, part["image"], part["question"], progress=False)
        spent = time.perf_counter() - started
        if spent > seconds:
            break
        left = (seconds - spent) * len(found) / spent  # questions that still fit at the pace so far
        size = max(10, min(200, int(left)))
    return found
