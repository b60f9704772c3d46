"""What `shrink` tells: the plan in the terminal, time and memory before and after, example.py, report.json and report.html."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import nn

from mmrecipes.evaluate import fidelity
from mmrecipes.measure import size as measure_size
from mmrecipes.models import modules, saving
from mmrecipes.quantize import mixed_precision
from mmrecipes.report import doctor, page
from mmrecipes.report.page import STYLE, html_table, html_wide
from mmrecipes.shrink.artifact import EXAMPLE, PICTURE

if TYPE_CHECKING:
    from mmrecipes.shrink.candidates import Candidate
    from mmrecipes.shrink.request import Evaluator, Request

SHOWN = 4  # pictures with the same answer, and as many with another one


PACKAGES = ("onnxruntime", "openvino", "nncf", "executorch", "bitsandbytes", "transformers", "torch")


# ---- in the terminal


def show_plan(console: Console, base: nn.Module, rungs: Sequence[Candidate], at: int, request: Request) -> None:
    """Print the plans that were looked at, and the one that is to be made, part by part."""
    home, whole = modules.part_of(base), 4 * sum(p.numel() for p in base.parameters())
    table = Table("plan", "predicted MB", "of float32", "sum of losses, nats", "lost when tried")
    for i, rung in enumerate(rungs):
        four = sum(b == 4 for b in rung.plan.values())
        name = f"{'> ' if i == at else '  '}4 bits in {four} of {len(rung.plan)} units"
        tried = "not tried" if rung.loss is None else str(rung.loss)
        table.add_row(name, f"{rung.bytes / 1e6:.2f}", f"{rung.bytes / whole:.3f}x", f"{rung.divergence:.4f}", tried)
    console.print(table)
    counts: dict[tuple[str, int], int] = {}
    for unit, bits in rungs[at].plan.items():
        key = home[f"{mixed_precision.units(base)[unit][0]}.weight"], bits
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


# ---- the report


def write(made: Path, base: nn.Module, judge: Evaluator, found: dict[str, Any]) -> None:
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
            "files": {p.name: p.stat().st_size for p in sorted(made.iterdir()) if p.suffix in measure_size.WEIGHT_FILES},
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
    saving.write_json(made / "report.json", content)
    (made / "report.html").write_text(_page(content, found), encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examples(made: Path, judge: Evaluator, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few rows, first those with another answer than the original's: picture, question, both answers."""
    from mmrecipes.evaluate import generation
    from mmrecipes.shrink.artifact import open_artifact

    given = found["answers"]
    differs = [a != b for a, b in zip(given, judge.said, strict=True)] if judge.right else [not all(same) for same in given]
    order = [i for i, d in enumerate(differs) if d][:SHOWN] + [i for i, d in enumerate(differs) if not d][:SHOWN]
    rows = judge.rows.select(order)
    if judge.right:
        now = [given[i] for i in order]
    else:
        small = open_artifact(made, found["request"].runtime)
        now = generation.answers(
            small, rows["image"][:], rows["question"][:], 1, max_new_tokens=fidelity.MAX_ANSWER_TOKENS, progress=False
        )
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
        f"<h2>What was asked</h2>{html_table(None, asked, 'words')}",
        *(f"<p><small>{e(note)}</small></p>" for note in found["notes"]),
        f"<h2>Before and after</h2>{found['table']._repr_html_()}<p>{e(meaning)} Intervals are 95%.</p>",
        f"<h2>What it says</h2>{_pictures(found['examples'])}",
        "<h2>The plan</h2><p>Each square is a unit: the weights of one attention, one MLP, or the words. It says how many bits "
        "the unit has now; the darker, the more the model changes when this unit alone has 4 bits.</p>",
        html_wide(page.png(_squares(found))),
        f"<h2>Plans that were looked at</h2>{_plans(found)}",
        f"<h2>What the doctor found</h2>{_findings(content)}",
        f"<h2>Where</h2><p>{e(page.hardware(env))}. The CPU has {e(', '.join(env['capabilities']) or 'no known extensions')}. "
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


def _pictures(examples: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for each in examples:
        lines = [html.escape(each["question"])]
        if "answer" in each:
            lines.append(f"right: <b>{html.escape(each['answer'])}</b>")
        differs = ' class="no"' if each["original"] != each["shrunk"] else ""
        lines.append(f"original: <b>{html.escape(each['original'])}</b>")
        lines.append(f"<span{differs}>shrunk: <b>{html.escape(each['shrunk'])}</b></span>")
        figures.append(f"<figure>{page.image_tag(each['image'])}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
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
    return html_table(("plan", "predicted MB", "lost when tried in PyTorch", ""), rows)


def _findings(content: Mapping[str, Any]) -> str:
    alike = doctor._alike(content["findings"])
    rows = [
        (t, where[0] + (f" and {len(where) - 1} more" if len(where) > 1 else ""), what, cure)
        for (t, what, cure), where in alike.items()
    ]
    text = html_table(("technique", "where", "what", "cure"), rows, "words") if rows else "<p>Nothing stands in the way.</p>"
    timed = [
        (v.technique, v.stage, "not timed" if v.faster is None else f"{v.faster:.2f}x", v.layer) for v in content["verdicts"]
    ]
    return (
        text
        + "<p>Eager PyTorch on this machine, the costliest layer of each stage against float32:</p>"
        + html_table(("technique", "stage", "speed", "layer"), timed)
    )
