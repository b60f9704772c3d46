"""What `shrink` tells: the plan in the terminal, time and memory before and after, example.py, report.json and report.html."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mmrecipes import doctor, fresh, measure, models, plan, report, shrink_data
from mmrecipes.errors import UserError

if TYPE_CHECKING:
    from mmrecipes.exported import Exported
    from mmrecipes.shrink import Judge, Request
    from mmrecipes.shrink_plan import Rung

EXAMPLE = "example.py"
PICTURE = "example.png"
SHOWN = 4  # pictures with the same answer, and as many with another one
PACKAGES = ("onnxruntime", "openvino", "nncf", "executorch", "bitsandbytes", "transformers", "torch")
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right;"
    "vertical-align:top}th:first-child,td:first-child{text-align:left}.words td,.words th{text-align:left}"
    "figure{display:inline-block;width:12.5rem;margin:0 .8rem 1rem 0;vertical-align:top}figure img{max-width:11rem;"
    "max-height:11rem;border:1px solid #ccc}figcaption{font-size:.85rem;overflow-wrap:anywhere}.no{color:#a00}"
    ".verdict{font-size:1.15rem;border-left:.3rem solid #2a6;padding:.4rem 1rem;background:#f3f8f5}.wide{max-width:100%}"
    "pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}small{color:#555}"
)


# ---- in the terminal


def show_plan(console: Console, base: nn.Module, rungs: Sequence[Rung], at: int, request: Request) -> None:
    """Print the plans that were looked at, and the one that is to be made, part by part."""
    home, whole = models.part_of(base), 4 * sum(p.numel() for p in base.parameters())
    table = Table("plan", "predicted MB", "of float32", "sum of losses, nats", "lost when tried")
    for i, rung in enumerate(rungs):
        four = sum(b == 4 for b in rung.plan.values())
        name = f"{'> ' if i == at else '  '}4 bits in {four} of {len(rung.plan)} units"
        tried = "not tried" if rung.loss is None else str(rung.loss)
        table.add_row(name, f"{rung.bytes / 1e6:.2f}", f"{rung.bytes / whole:.3f}x", f"{rung.divergence:.4f}", tried)
    console.print(table)
    counts: dict[tuple[str, int], int] = {}
    for unit, bits in rungs[at].plan.items():
        key = home[f"{plan.units(base)[unit][0]}.weight"], bits
        counts[key] = counts.get(key, 0) + 1
    words = ", ".join(f"{part} {bits} bits in {count} units" for (part, bits), count in sorted(counts.items()))
    console.print(f"The plan for {request.runtime}: {words}.", highlight=False)


def show(console: Console, found: Mapping[str, Any], out: Path) -> None:
    """Print the result."""
    console.print(found["table"])
    console.print(f"\n{verdict(found)}", highlight=False)
    question = json.dumps(found["example"]["question"], ensure_ascii=False)
    console.print(f"Look at [bold]{out / 'report.html'}[/]. Run: python {out / EXAMPLE} {out / PICTURE} {question}")


def verdict(found: Mapping[str, Any]) -> str:
    """The result in two or three sentences."""
    whole, size, loss = found["float_bytes"], found["bytes"], found["loss"]
    text = f"{size / 1e6:.1f} MB instead of {whole / 1e6:.1f} MB in float32 ({size / whole:.2f}x). "
    if loss.measure == "accuracy":
        text += f"It lost {loss.points:.1f} points of accuracy [{loss.low:.1f}, {loss.high:.1f}] on {loss.n} questions"
    else:
        text += f"It would choose {100 * loss.share.value:.1f}% of the original's words [{100 * loss.share.low:.1f}, "
        text += f"{100 * loss.share.high:.1f}], n={loss.n} tokens of {found['rows']['verified on']} answers"
    text += f"; {found['limit']:g} points were allowed."
    if loss.high > found["limit"]:
        text += " The interval reaches beyond that: more questions would tell more."
    return text


# ---- time and memory


def measured(base: nn.Module, made: Path, runtime: str, judge: Judge, found: Mapping[str, Any]) -> dict[str, Any]:
    """Put example.py and a picture into `made`, run it, and time original and result side by side.

    {"table": a Comparison of both, "times": milliseconds, "example": question and answer, "float_bytes": ...}
    """
    from mmrecipes import evaluate
    from mmrecipes.shrink import opened
    from mmrecipes.shrink_plan import float_bytes

    first = judge.rows[0]
    picture, question = first["image"].convert("RGB"), first["question"]
    picture.save(made / PICTURE)
    shutil.copyfile(Path(__file__).parent / "examples" / f"{runtime}.py", made / EXAMPLE)
    answer, peak = _run_example(made, question)
    if runtime != "torch":
        peak = fresh.run(made, picture, question, 8, 1)["peak_mb"]
    small, more = opened(made, runtime), 8
    inputs = models.chat(base, picture, question)
    given = small.inputs(picture, question) if not isinstance(small, nn.Module) else models.chat(small, picture, question)
    each = {"before": (base, inputs), "after": (small, given)}
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in each}
    for i in range(6):  # interleaved, so that the machine's mood hits both; the first round warms up
        for name in (*each,) if i % 2 else (*reversed(each),):
            drawn[name].append(_timed(*each[name], more))
    times = {name: {"ttft_ms": _median(t[1:], 0), "ms_a_token": _median(t[1:], 1)} for name, t in drawn.items()}
    notes = []
    try:
        whole_peak = measure.peak_memory(base, inputs)["peak_mb"]
    except UserError as e:
        whole_peak, note = None, f"The original's memory was not measured: {e}"
        notes.append(note)
    rows = [{"name": "original, float32"}, {"name": f"shrunk, {runtime}"}]
    loss = found["loss"]
    for row, name in zip(rows, each, strict=True):
        row |= {"ttft_ms": times[name]["ttft_ms"], "tokens_per_s": 1e3 / times[name]["ms_a_token"]}
    rows[0] |= {"peak_mb": whole_peak, "disk_mb": float_bytes(base) / 1e6}
    rows[1] |= {"peak_mb": peak, "disk_mb": found["bytes"] / 1e6, loss.measure: loss.share}
    if loss.paired:
        rows[0]["accuracy"] = evaluate.wilson(sum(judge.right), len(judge.right))
        rows[1]["change"] = loss.paired
    notes.append(f"TTFT: one picture, {inputs['input_ids'].shape[1]} tokens, after the processor; tokens/s: {more} further ones.")
    without = "" if runtime in ("torch", "executorch") else "; the shrunk model's does without PyTorch"
    notes.append(f"peak MB: a fresh process that loads the model and answers, its libraries included{without}.")
    table = report.Comparison(rows, measure.environment(), notes)
    example = {"question": question, "answer": answer}
    return {"table": table, "times": times, "example": example, "float_bytes": float_bytes(base)}


@torch.inference_mode()
def _timed(model: nn.Module | Exported, inputs: Mapping, more: int) -> tuple[float, float]:
    """Milliseconds to the first token of an answer, and for each of `more` further ones, whatever they are."""
    import numpy as np

    began = time.perf_counter()
    if isinstance(model, nn.Module):
        out = model(**measure.cast(model, inputs), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    else:
        token = int(model.prefill(inputs).argmax())
    first = time.perf_counter()
    for _ in range(more):
        if isinstance(model, nn.Module):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        else:
            token = int(model.graphs.step(np.array([[token]])).argmax())
    return 1e3 * (first - began), 1e3 * (time.perf_counter() - first) / more


def _median(drawn: Sequence[tuple[float, float]], column: int) -> float:
    return statistics.median(each[column] for each in drawn)


def _run_example(made: Path, question: str) -> tuple[str, float | None]:
    """What example.py says in a fresh process, and that process's peak memory in MB. UserError where it fails."""
    code = (
        "import runpy, sys\nsys.modules['mmrecipes'] = None\n"  # it must do without
        "path = sys.argv.pop(1)\nsys.argv[0] = path\nrunpy.run_path(path, run_name='__main__')\n"
        "from pathlib import Path\nstatus = Path('/proc/self/status')\n"
        "lines = status.read_text().splitlines() if status.exists() else []\n"
        "print('PEAK', next((int(s.split()[1]) * 1024 / 1e6 for s in lines if s.startswith('VmHWM')), 'none'))"
    )
    command = [sys.executable, "-c", code, str(made / EXAMPLE), str(made / PICTURE), question]
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as elsewhere:
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    answer, mark, peak = done.stdout.rpartition("PEAK ")
    if done.returncode or not mark:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{EXAMPLE} does not run ({last[:160]}), so the result was not kept; please report this")
    return answer.strip(), None if peak.strip() == "none" else float(peak)


# ---- the report


def write(made: Path, base: nn.Module, judge: Judge, found: dict[str, Any]) -> None:
    """Write report.json and report.html into `made`."""
    request, diagnosis, rungs = found["request"], found["diagnosis"], found["rungs"]
    found["examples"] = _examples(made, judge, found)
    found["versions"] = {n: v for n in PACKAGES if (v := _version(n))}
    content = {
        "environment": found["table"].environment | {"versions": found["versions"]},
        "request": {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(request).items()},
        "verdict": verdict(found),
        "measure": found["loss"].measure,
        "loss": found["loss"],
        "allowed_points": found["limit"],
        "bytes": {
            "float32": found["float_bytes"],
            "predicted": rungs[found["chosen"]].bytes,
            "files": {p.name: p.stat().st_size for p in sorted(made.iterdir()) if p.suffix in measure.WEIGHT_FILES},
            "all": found["bytes"],
        },
        "rows": found["table"].rows,
        "times_ms": found["times"],
        "data": found["rows"] | {"notes": found["notes"]},
        "plan": rungs[found["chosen"]].plan,
        "sensitivity": found["costs"],
        "tried": rungs,
        "findings": diagnosis.findings,
        "verdicts": diagnosis.verdicts,
        "answers": [{k: v for k, v in e.items() if k != "image"} for e in found["examples"]],
        "example": found["example"],
    }
    report.write_json(made / "report.json", content)
    (made / "report.html").write_text(_page(content, found), encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examples(made: Path, judge: Judge, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few rows, first those with another answer than the original's: picture, question, both answers."""
    from mmrecipes import evaluate
    from mmrecipes.shrink import opened

    given = found["answers"]
    differs = [a != b for a, b in zip(given, judge.said, strict=True)] if judge.right else [not all(same) for same in given]
    order = [i for i, d in enumerate(differs) if d][:SHOWN] + [i for i, d in enumerate(differs) if not d][:SHOWN]
    rows = judge.rows.select(order)
    if judge.right:
        now = [given[i] for i in order]
    else:
        small = opened(made, found["request"].runtime)
        now = evaluate.answers(small, rows["image"][:], rows["question"][:], 1, max_new_tokens=shrink_data.WORDS, progress=False)
    return [
        {"image": row["image"], "name": row["name"], "question": row["question"], "original": judge.said[i], "shrunk": said}
        | ({"answer": row["answer"]} if judge.right else {})
        for i, row, said in zip(order, rows, now, strict=True)
    ]


def _page(content: dict[str, Any], found: Mapping[str, Any]) -> str:
    e, request = html.escape, found["request"]
    name = Path(request.model).name if Path(request.model).exists() else request.model  # a page goes places: no local path
    asked = [("model", name), ("runtime", request.runtime), ("budget", request.budget or "none: as small as holds")]
    asked += [("may lose", f"{found['limit']:g} points of {found['loss'].measure}")]
    rows = found["rows"]
    asked += [("verified on", f"{rows['verified on']} questions about {rows['pictures']} pictures")]
    asked += [("calibrated on", f"{rows['calibrated on']} questions; plans compared on {rows['chosen on']} others")]
    meaning = (
        "Accuracy: the share of questions answered as the labels say. Points are differences on the same questions."
        if found["loss"].measure == "accuracy"
        else "Agreement: given the same words before, the share of the original's words that the small model would choose, too. "
        "There were no labels that the original knows, so this stands in for accuracy; a different word may be as good."
    )
    env = found["table"].environment
    parts = [
        f"<h1>{e(name)}, made smaller</h1><p class=verdict>{e(content['verdict'])}</p>",
        f"<h2>What was asked</h2>{_table(None, asked, 'words')}",
        *(f"<p><small>{e(note)}</small></p>" for note in found["notes"]),
        f"<h2>Before and after</h2>{found['table']._repr_html_()}<p>{e(meaning)} Intervals are 95%.</p>",
        f"<h2>What it says</h2>{_pictures(found['examples'])}",
        "<h2>The plan</h2><p>Each square is a unit: the weights of one attention, one MLP, or the words. It says how many bits "
        "the unit has now; the darker, the more the model changes when this unit alone has 4 bits.</p>",
        _wide(report.png(_squares(found))),
        f"<h2>Plans that were looked at</h2>{_plans(found)}",
        f"<h2>What the doctor found</h2>{_findings(content)}",
        f"<h2>Where</h2><p>{e(report.where(env))}. The CPU has {e(', '.join(env['capabilities']) or 'no known extensions')}. "
        f"Versions: {e(', '.join(f'{k} {v}' for k, v in found['versions'].items()))}.</p>",
        "<h2>How to run it</h2><p>This folder is complete: copy it to where you need it. <code>example.py</code> imports public "
        f"libraries only.</p><pre>python example.py {PICTURE} &quot;{e(found['example']['question'])}&quot;</pre>",
        "<p>From Python, with this package: <code>mmrecipes.load_exported(&quot;FOLDER&quot;).generate(picture, question)"
        "</code></p>"
        if request.runtime != "torch"
        else "",
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(name)}, made smaller</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[object]], kind: str = "") -> str:
    top = "" if head is None else "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">{top}{body}</table>'


def _wide(image: str) -> str:
    return image.replace("<img ", '<img class="wide" ', 1)


def _pictures(examples: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for each in examples:
        lines = [html.escape(each["question"])]
        if "answer" in each:
            lines.append(f"right: <b>{html.escape(each['answer'])}</b>")
        differs = ' class="no"' if each["original"] != each["shrunk"] else ""
        lines.append(f"original: <b>{html.escape(each['original'])}</b>")
        lines.append(f"<span{differs}>shrunk: <b>{html.escape(each['shrunk'])}</b></span>")
        figures.append(f"<figure>{report.picture(each['image'])}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
    return "".join(figures)


def _squares(found: Mapping[str, Any]):  # -> matplotlib.figure.Figure
    """Units by kind and depth: bits written in, shaded by what 4 bits cost there."""
    import numpy as np
    from matplotlib.figure import Figure

    bits = found["rungs"][found["chosen"]].plan
    lost = {c.unit: c.loss for c in found["costs"] if c.bits == 4}
    part = {c.unit: c.part for c in found["costs"]}
    kinds, depth = [], {}
    for unit in bits:
        number = re.search(r"\.(\d+)\.", unit)
        kind = f"{part.get(unit, '')} {unit.rpartition('.')[2]}".strip()
        depth[unit] = kind, int(number[1]) if number else 0
        if kind not in kinds:
            kinds.append(kind)
    width = 1 + max(d for _, d in depth.values())
    shade = np.full((len(kinds), width), np.nan)
    for unit, (kind, d) in depth.items():
        shade[kinds.index(kind), d] = np.log10(max(lost.get(unit, 1e-6), 1e-6))
    figure = Figure(figsize=(4.5 + 0.42 * width, 1.3 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shade, cmap="Greys", aspect="equal", vmin=np.nanmin(shade) - 0.5, vmax=max(np.nanmax(shade), -4) + 0.8)
    middle = (np.nanmin(shade) + max(np.nanmax(shade), -4) + 0.3) / 2
    for unit, (kind, d) in depth.items():
        row = kinds.index(kind)
        axes.text(d, row, str(bits[unit]), ha="center", va="center", color="white" if shade[row, d] > middle else "black")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, width, 1 + width // 20))
    figure.colorbar(image, ax=axes, label="loss alone in 4 bits\n(log10 nats a token)")
    return figure


def _plans(found: Mapping[str, Any]) -> str:
    rows = []
    for i, rung in enumerate(found["rungs"]):
        four = sum(b == 4 for b in rung.plan.values())
        tried = "not tried" if rung.loss is None else str(rung.loss)
        kept = "kept" if i == found["chosen"] else ""
        rows.append((f"4 bits in {four} of {len(rung.plan)} units", f"{rung.bytes / 1e6:.2f}", tried, kept))
    return _table(("plan", "predicted MB", "lost when tried in PyTorch", ""), rows)


def _findings(content: Mapping[str, Any]) -> str:
    alike = doctor._alike(content["findings"])
    rows = [
        (t, where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else ""), what, cure)
        for (t, what, cure), where in alike.items()
    ]
    text = _table(("technique", "where", "what", "cure"), rows, "words") if rows else "<p>Nothing stands in the way.</p>"
    timed = [
        (v.technique, v.stage, "not timed" if v.faster is None else f"{v.faster:.2f}x", v.layer) for v in content["verdicts"]
    ]
    return (
        text
        + "<p>Eager PyTorch on this machine, the costliest layer of each stage against float32:</p>"
        + _table(("technique", "stage", "speed", "layer"), timed)
    )
