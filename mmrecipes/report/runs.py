"""The experiment record as tables and a plot: `mmrecipes runs`. What is logged, and where: `mmrecipes.track`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmrecipes import track
from mmrecipes.errors import UserError

SIZES = {"disk_mb": 1, "mb": 1, "bytes": 1e-6}  # columns that hold a size -> megabytes
TIMES = {"ttft_ms": 1, "ms": 1}
AXES = {"mb": "size (MB)", "ms": "time to first token (ms)"}


@dataclass(frozen=True)
class Recorded:
    """One run as it was logged: `points` are its rows with an accuracy, each with a size ("mb") and a time ("ms") or None."""

    name: str
    id: str
    began: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    points: list[dict[str, Any]] = field(default_factory=list)


def read(wanted: Sequence[str] = ()) -> list[Recorded]:
    """The runs whose ids begin as one of `wanted` (none: all), the oldest first. UserError where there is none."""
    storage, found = track.storage(), []
    for record in storage.get_run_records(track.PROJECT):
        if wanted and not record["id"].startswith(tuple(wanted)):
            continue
        rows = storage.get_logs(track.PROJECT, run_id=record["id"])
        config = storage.get_run_config(track.PROJECT, run_id=record["id"]) or {}
        points = [_point(row) for row in rows if isinstance(row.get("accuracy"), float | int)]
        found.append(Recorded(record["name"], record["id"], record["created_at"] or "", config, rows, points))
    if not found:
        what = f"none of the runs is {', '.join(wanted)}" if wanted else "no runs yet: log some with --track or MMRECIPES_TRACK=1"
        raise UserError(f"runs: {what} (the record lies in TRACKIO_DIR, where that is set)")
    return sorted(found, key=lambda run: run.began)


def _point(row: dict[str, Any]) -> dict[str, Any]:
    def first(columns: dict[str, float]) -> float | None:
        return next((row[key] * unit for key, unit in columns.items() if isinstance(row.get(key), int | float)), None)

    return {"name": row.get("name", ""), "accuracy": row["accuracy"], "mb": first(SIZES), "ms": first(TIMES)}


def pareto(points: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """The points to which no other is at least as accurate and at least as small (or fast), from the smallest on."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p[against], -p["accuracy"])):
        if not found or point["accuracy"] > found[-1]["accuracy"]:
            found.append(point)
    return found


def show(runs: Sequence[Recorded], against: str = "mb", plot: Path | None = None) -> None:
    """Print the runs, in which settings they differ, and what they measured; with `plot` write the Pareto plot there."""
    if against not in AXES:
        raise UserError(f"runs: --against {against!r}; expected {' or '.join(AXES)}")
    console, table = Console(), Table("id", "run", "began", "commit", "CPU", "rows", "last loss", "ended by")
    for run in runs:
        losses = [row["loss"] for row in run.rows if "loss" in row and "name" not in row]  # of a training, step by step
        last = f"{losses[-1]:.4f}" if losses else "-"
        ended = next((row["failed"] for row in run.rows if "failed" in row), "-")
        where = (str(run.config.get("commit") or "-")[:8], run.config.get("cpu", "-"))
        table.add_row(run.id[:8], run.name, run.began[:16], *where, str(len(run.rows)), last, ended)
    console.print(table)
    if different := _different(runs):
        table = Table("setting", *(run.id[:8] for run in runs))
        for key, values in different.items():
            table.add_row(key, *values)
        console.print(table)
    points = [point | {"run": run} for run in runs for point in run.points]
    front = pareto([p for p in points if p[against] is not None], against)
    if points:
        table = Table("id", "variant", "accuracy %", "MB", "ms", f"on the front of {against}")
        for p in points:
            numbers = ["-" if p[axis] is None else f"{p[axis]:.1f}" for axis in AXES]
            table.add_row(p["run"].id[:8], p["name"], f"{100 * p['accuracy']:.1f}", *numbers, "yes" if p in front else "")
        console.print(table)
    if plot:
        _draw([p for p in points if p[against] is not None], front, against).savefig(plot, dpi=120)
        console.print(f"wrote {plot}", highlight=False)


def _different(runs: Sequence[Recorded]) -> dict[str, list[str]]:
    """Settings that two or more, and not too many runs to print side by side, do not share."""
    if not 2 <= len(runs) <= 6:
        return {}
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith("_") and key != "date")
    found = {key: [str(run.config.get(key, "-")) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _draw(points: Sequence[dict[str, Any]], front: Sequence[dict[str, Any]], against: str):  # -> matplotlib.figure.Figure
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([p[against] for p in points], [100 * p["accuracy"] for p in points], "o", color="gray", label="measured")
    ends = [p[against] for p in front], [100 * p["accuracy"] for p in front]
    axes.step(*ends, "ks-", where="post", markerfacecolor="white", label="Pareto front")
    for p in front:
        axes.annotate(p["name"], (p[against], 100 * p["accuracy"]), xytext=(4, -11), textcoords="offset points", fontsize=8)
    axes.set(xlabel=AXES[against], ylabel="accuracy (%)", xlim=(0, None))
    axes.legend(fontsize=8)
    return figure
