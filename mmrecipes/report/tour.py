"""The tour: meet a vision-language model, see where its time goes, shrink it three ways, and read what that cost."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mmrecipes.data import datasets
from mmrecipes.errors import UserError
from mmrecipes.measure import flops, machine, size
from mmrecipes.models import images as models_images
from mmrecipes.models import loading, prompts
from mmrecipes.quantize import rounding
from mmrecipes.report import comparison
from mmrecipes.report import page as report_page

if TYPE_CHECKING:
    from datasets import Dataset

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right}"
    "th:first-child,td:first-child{text-align:left}figure{display:inline-block;width:11rem;margin:0 .8rem 1rem 0;"
    "vertical-align:top}figure img{width:128px;border:1px solid #ccc}figcaption{font-size:.85rem}.no{color:#a00}"
)


def run(
    model_name: str = "mini-vlm",
    images: Path | None = None,
    question: str | None = None,
    out: Path = Path("tour.html"),
    n: int = 600,
    console: Console | None = None,
) -> comparison.Comparison:
    """Print the tour to `console`, write it as a self-contained page to `out`, and return the comparison.

    With `images`, a folder of pictures, `question` is asked of each, and agreement with the uncompressed model stands
    where accuracy stood. Raises UserError for anything that the user can mend, before any long work.
    """
    console = console or Console()
    _check_writable(out)
    rows = _rows(images, question, n)
    console.print(f"[bold]1. Meet {model_name}[/]")
    base = loading.load(model_name)
    parts = size.parameters(base)
    console.print(f"{sum(r['parameters'] for r in parts) / 1e6:.1f} million parameters: {_by_part(parts)}")

    console.print("\n[bold]2. Where its time goes[/] (one picture, one question)")
    inputs = prompts.chat(base, rows[0]["image"], rows[0]["question"])
    budget = flops.stage_budget(base, inputs)
    console.print(_budget(budget))

    console.print("\n[bold]3. Shrink it[/]")
    variants, notes = _variants(base, sum(r["gflop"] for r in budget if r["stage"] != "decode"))
    with console.status("answering, timing, weighing ..."):
        simulated = {"int8 dynamic": rounding.simulate_dynamic_int8(base)}
        found = comparison.compare(rows, seconds=25, simulated=simulated, **variants)
    found.notes.extend(notes)
    console.print(_examples(rows, found))
    console.print(found)
    page = _page(model_name, rows, budget, found)
    aside = out.with_name(out.name + ".part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, out)
    console.print(f"\nPictures, table and plot: [bold]{out}[/]. Next: `make lab`, notebook 00_start_here.")
    return found


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a folder; give --out the name of a file to write, such as {out / 'tour.html'}")
    try:  # a trial, not a look at the mode bits: those do not bind every user or file system
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(out.name + ".part")
        aside.touch()
        aside.unlink()
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror}; choose another place with --out") from e


def _rows(images: Path | None, question: str | None, n: int) -> Dataset:
    if images is None:
        if question is not None:
            raise UserError("--question needs --images, the folder of your pictures to ask it about")
        return datasets.test_split(n)
    if not question:
        raise UserError(f"--images {images} needs --question, what to ask about each picture")
    return datasets.image_rows(models_images.load_images(images), question)


def _variants(base, gflop: float) -> tuple[dict[str, Any], list[str]]:
    """Three ways down, and a note on what is left out: bf16 on a CPU that would need minutes for one answer."""
    variants = {"fp32": base, "bf16": rounding.bf16(base), "int8 dynamic": rounding.dynamic_int8(base)}
    variants["2-bit rounded (simulated)"] = rounding.simulate(base, 2, per="group")
    peak = machine.machine_peaks()["bf16"]
    if gflop / peak < 10:
        return variants, []
    del variants["bf16"]
    return variants, [f"bf16 is left out: this CPU runs it at {peak:.1f} GFLOP/s, {gflop / peak:.0f} s an answer."]


def _by_part(parts: list[dict]) -> str:
    sums: dict[str, int] = {}
    for row in parts:
        sums[row["part"]] = sums.get(row["part"], 0) + row["parameters"]
    return ", ".join(f"{part} {count / 1e6:.2f}" for part, count in sums.items())


def _budget(budget: list[dict]) -> Table:
    table = Table("stage", *("ms", "share", "GFLOP", "GFLOP/s"))
    for row in budget:
        rate = f"{row['gflop'] / row['ms'] * 1000:.0f}"
        table.add_row(row["stage"], f"{row['ms']:.1f}", f"{row['share']:.0%}", f"{row['gflop']:.2f}", rate)
    return table


def _examples(rows: Dataset, found: comparison.Comparison, count: int = 6) -> Table:
    names = [r["name"] for r in found.rows]
    wanted = "answer" in rows.column_names
    table = Table("picture", "question", *(["truth"] if wanted else []), *names)
    for i in range(min(count, len(rows))):
        truth = [rows[i]["answer"]] if wanted else []
        table.add_row(f"{i}", rows[i]["question"], *truth, *(_said(r, i) for r in found.rows))
    return table


def _said(row: dict, i: int) -> str:
    return row["predictions"][i] if i < len(row["predictions"]) else "-"


def _page(model_name: str, rows: Dataset, budget: Sequence[dict], found: comparison.Comparison) -> str:
    figures = []
    for i in range(min(8, len(rows))):
        row = rows[i]
        truth = row.get("answer")
        lines = [html.escape(row["question"])]
        for r in found.rows:
            said = html.escape(_said(r, i))
            wrong = ' class="no"' if _said(r, i) != (truth or _said(found.rows[0], i)) else ""
            lines.append(f"<span{wrong}>{html.escape(r['name'])}: <b>{said}</b></span>")
        figures.append(f"<figure>{report_page.image_tag(row['image'])}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
    stages = "".join(f"<tr><td>{r['stage']}</td><td>{r['ms']:.1f}</td><td>{r['share']:.0%}</td></tr>" for r in budget)
    env = found.environment
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mmrecipes tour</title><style>{STYLE}</style>'
        f"<h1>{html.escape(model_name)}, shrunk</h1><p>{html.escape(report_page.hardware(env))}</p>"
        f"<h2>What it sees</h2>{''.join(figures)}"
        f"<h2>Where its time goes</h2><table><tr><th>stage</th><th>ms</th><th>share</th></tr>{stages}</table>"
        f"<h2>What shrinking costs</h2>{found._repr_html_()}"
        f"{report_page.png(found.plot())}{report_page.png(found.plot('disk_mb'))}"
        "<p>Every number was measured on this machine, by this run. Intervals are 95%. <i>simulated</i>: weights are rounded "
        "but kept in floating point, so its size and speed are those of fp32.</p></html>\n"
    )
