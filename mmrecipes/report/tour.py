"""The tour: load a vision-language model, see where its time goes, compress it four ways, and read what that cost."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from mmrecipes.data import datasets
from mmrecipes.errors import UserError, one_line
from mmrecipes.export import pipeline
from mmrecipes.inference.exported import load_exported
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure import flops, machine, size
from mmrecipes.models import images, loading, prompts
from mmrecipes.models.prompts import Rows
from mmrecipes.models.saving import written_aside
from mmrecipes.quantize import mixed_precision, rounding
from mmrecipes.report import page
from mmrecipes.report.comparison import Comparison, check_parity, compare

INT8, FOUR_BIT, TWO_BIT = "int8 dynamic", "4-bit exported", "2-bit simulated"
GPTQ_PARAMETERS = 20e6  # of more GPTQ would take minutes


def run(
    model_name: str = "mini-vlm",
    folder: Path | None = None,
    question: str | None = None,
    out: Path = Path("tour.html"),
    n: int = 600,
    console: Console | None = None,
) -> Comparison:
    """Print the tour to `console`, write it as a self-contained page to `out`, and return the comparison.
    With `folder`, a folder of images, `question` is asked of each, and agreement with the uncompressed model stands where
    accuracy stood. Raises UserError for anything that the user can mend, before any long work.
    """
    console = console or Console()
    _check_writable(out)
    rows = _rows(folder, question, n)
    console.print(f"[bold]1. Load {model_name}[/]")
    base = loading.load(model_name)
    counts: Counter[str] = Counter()
    for row in size.parameters(base):
        counts[row["part"]] += row["parameters"]
    parts = ", ".join(f"{part} {count / 1e6:.2f}" for part, count in counts.items())
    console.print(f"{counts.total() / 1e6:.1f} million parameters: {parts}")

    console.print("\n[bold]2. Where its time goes[/] (one image, one question)")
    probes = [prompts.chat(base, r["image"], r["question"]) for r in rows.select(range(min(7, len(rows))))]
    stages = flops.stage_budget(base, probes[0])
    console.print(_stage_table(stages))

    console.print("\n[bold]3. Compress it[/]")
    with temporary_directory() as aside, console.status("exporting, answering, timing ..."):
        gflop = sum(r["gflop"] for r in stages if r["stage"] != "decode")
        variants, refused, notes = _variants(base, probes, gflop, aside / "model")
        found = compare(rows, seconds=25, **variants)
        variants.clear()  # an open graph could keep its files from being removed
    found.rows.extend({"name": f"{name}: refused", "predictions": []} for name in refused)
    found.notes.extend([*notes, *(f"{name} refused: {why}" for name, why in refused.items())])
    console.print(_example_table(rows, found))
    console.print(found)
    console.print(f"\n{_conclusion(found)}", highlight=False)
    with written_aside(out) as part:
        part.write_text(_page(model_name, rows, stages, found), encoding="utf-8")
    console.print(f"\nImages, table and plot: [bold]{out}[/]. Next: `make lab`, notebook 00_start_here.")
    return found


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a directory; give --out the name of a file to write, such as {out / 'tour.html'}")
    try:  # a trial, not a look at the mode bits: those do not bind every user or file system
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(out.name + ".part")
        part.touch()
        part.unlink()
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror}; choose another place with --out") from e


def _rows(folder: Path | None, question: str | None, n: int) -> Rows:
    if folder is None:
        if question is not None:
            raise UserError("--question needs --images, the folder of your images to ask it about")
        return datasets.test_split(n)
    if not question:
        raise UserError(f"--images {folder} needs --question, what to ask about each image")
    return datasets.image_rows(images.load_images(folder), question)


def _variants(base: nn.Module, probes: list, gflop: float, aside: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The model in five precisions, {variant: why it is refused}, and notes; `gflop` is the work up to the first token, or NaN.
    A variant that cannot be made, fails on the inputs `probes` or is broken is refused, and the others stay."""
    variants, refused, notes, peak = {"fp32": base}, {}, [], machine.machine_peaks()["bf16"]
    ways = {"bf16": rounding.bf16, INT8: rounding.dynamic_int8, FOUR_BIT: lambda model: _exported(model, aside)}
    ways[TWO_BIT] = lambda model: rounding.simulate(model, 2, per="group")
    if gflop / peak >= 10:
        del ways["bf16"]
        notes.append(f"bf16 is left out: this CPU runs it at {peak:.1f} GFLOP/s, {gflop / peak:.0f} s an answer.")
    for name, way in ways.items():
        try:
            made = way(base)
            if name != FOUR_BIT:  # which its export compares with its source
                check_parity(made, rounding.simulate_dynamic_int8(base) if name == INT8 else made, probes)
            variants[name] = made
        except Exception as e:  # whatever the libraries raise
            refused[name] = one_line(e)
    if FOUR_BIT in variants:
        notes.append(f"{FOUR_BIT}: ONNX Runtime, in a process of its own without PyTorch.")
    notes.append(f"{TWO_BIT}: weights rounded but kept in floating point, so size and speed are those of fp32.")
    return variants, refused, notes


def _exported(base: nn.Module, aside: Path):  # -> Exported
    """`base` in ONNX Runtime, 4-bit weights in groups of 32 where they fit: by GPTQ, or for a large model by searched scales."""
    weights = {name: getattr(module, "weight", None) for name, module in base.named_modules()}
    fits = {name for name, w in weights.items() if w is not None and w.ndim == 2 and w.shape[1] % 32 == 0}
    plan = {unit: 4 for unit, names in mixed_precision.units(base).items() if fits.issuperset(names)}
    rows = datasets.calibration(32) if sum(p.numel() for p in base.parameters()) < GPTQ_PARAMETERS else None
    rounded = mixed_precision.apply_plan(base, plan, 32, rows)
    return load_exported(pipeline.export(rounded, aside, "onnx", "mixed"))


def _conclusion(found: Comparison) -> str:
    """One sentence on the exported model beside fp32, with no more than was measured."""
    rows = {row["name"]: row for row in found.rows}
    if FOUR_BIT not in rows:
        return "The table says what each precision costs on this machine."
    small, whole = rows[FOUR_BIT], rows["fp32"]
    text = f"{FOUR_BIT}: {whole['disk_mb'] / small['disk_mb']:.1f}x smaller than eager fp32 (PyTorch), time to first token "
    text += f"{whole['ttft_ms'] / small['ttft_ms']:.1f}x shorter, "
    if change := small.get("change"):
        lossless = change.low <= 0 <= change.high
        return text + (f"no measurable loss (n={change.n})." if lossless else f"{change.points:+.1f} points.")
    return text + f"{100 * small['agreement'].value:.0f}% of the answers as before."


def _stage_table(stages: list[dict]) -> Table:
    table = Table("stage", *("ms", "share", "GFLOP", "GFLOP/s"))
    for row in stages:
        work = (f"{row['gflop']:.2f}", f"{row['gflop'] / row['ms'] * 1000:.0f}")
        table.add_row(row["stage"], f"{row['ms']:.1f}", f"{row['share']:.0%}", *("-" if w == "nan" else w for w in work))
    return table


def _example_table(rows: Rows, found: Comparison, count: int = 6) -> Table:
    """Questions, and every variant's answers; "=" where it is the first one's, so that the table fits 80 columns."""
    answered = [r for r in found.rows if r["predictions"]]
    table = Table("question", *(r["name"].replace(" ", "\n") for r in answered), box=None, pad_edge=False)
    for i in range(min(count, len(rows))):
        first, *others = (_answer(r, i) for r in answered)
        table.add_row(rows[i]["question"], first, *("=" if answer == first else answer for answer in others))
    return table


def _answer(row: dict, i: int) -> str:
    return row["predictions"][i] if i < len(row["predictions"]) else "-"


def _page(model_name: str, rows: Rows, stages: list[dict], found: Comparison) -> str:
    examples = []
    for i, row in enumerate(rows.select(range(min(8, len(rows))))):
        truth = row.get("answer") or _answer(found.rows[0], i)
        lines = [(r["name"], _answer(r, i), _answer(r, i) != truth) for r in found.rows if r["predictions"]]
        examples.append({"image": row["image"], "question": row["question"], "lines": lines})
    shown = {"title": "mmrecipes tour", "model": model_name, "hardware": page.hardware(found.environment), "examples": examples}
    shown |= {"conclusion": _conclusion(found), "comparison": found._repr_html_(), "plots": [found.plot(), found.plot("disk_mb")]}
    return page.render("tour.html", stages=[(r["stage"], f"{r['ms']:.1f}", f"{r['share']:.0%}") for r in stages], **shown)
