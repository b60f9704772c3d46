"""What `shrink` tells: the plan and the result in the terminal, report.json and report.html."""

import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmrecipes import track
from mmrecipes.measure.size import WEIGHT_FILES
from mmrecipes.models import saving
from mmrecipes.report import doctor, page
from mmrecipes.shrink import fidelity
from mmrecipes.shrink.artifact import EXAMPLE, IMAGE, open_artifact
from mmrecipes.shrink.candidates import Candidate
from mmrecipes.shrink.fidelity import Evaluator
from mmrecipes.shrink.source import Source

SHOWN = 4  # images with the same answer, and as many with another one
PACKAGES = ("onnxruntime", "openvino", "nncf", "executorch", "bitsandbytes", "transformers", "torch")
MEANING = {
    "accuracy": "Accuracy: the share of questions answered as the labels say. Points are differences on the same questions.",
    "agreement": "Agreement: given the same tokens before, the share of the original's tokens that the small model would choose, "
    "too. There were no labels that the original knows, so this stands in for accuracy; another token may be as good.",
}


def show_plan(console: Console, source: Source, candidates: Sequence[Candidate], chosen: int) -> None:
    """Print the plans that were tried, and the one that is to be made, part by part."""
    table = Table("plan", "predicted MB", "of float32", "sum of losses, nats", "lost when tried")
    for i, candidate in enumerate(candidates):
        name, megabytes, tried = _row(candidate)
        share = f"{candidate.bytes / source.float_bytes:.3f}x"
        table.add_row(f"{'> ' if i == chosen else '  '}{name}", megabytes, share, f"{candidate.divergence:.4f}", tried)
    console.print(table)
    counts = Counter((source.part[unit], bits) for unit, bits in candidates[chosen].plan.items())
    text = ", ".join(f"{part} {bits} bits in {count} units" for (part, bits), count in sorted(counts.items()))
    console.print(f"The plan for {source.runtime}: {text}. {kept_text(source.kept)}", highlight=False)
    if source.own_bytes:
        console.print(f"The source's own files take {source.own_bytes / 1e6:.2f} MB.", highlight=False)


def kept_text(kept: Mapping[str, int]) -> str:
    """What no plan reaches, in words."""
    largest = sorted(kept.items(), key=lambda item: -item[1])[:SHOWN]
    named = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in largest)
    more = f", and {len(kept) - SHOWN} smaller ones" if len(kept) > SHOWN else ""
    return f"Kept in float: {named}{more} (in all {sum(kept.values()) / 1e6:.2f} MB)."


def _row(candidate: Candidate) -> tuple[str, str, str]:
    """A candidate in words: its plan, predicted megabytes, what it lost when tried."""
    four = sum(bits == 4 for bits in candidate.plan.values())
    tried = "not tried" if candidate.loss is None else str(candidate.loss)
    return f"4 bits in {four} of {len(candidate.plan)} units", f"{candidate.bytes / 1e6:.2f}", tried


def show(console: Console, found: Mapping[str, Any], out: Path) -> None:
    """Print the result."""
    console.print(found["table"])
    console.print(f"\n{verdict(found)}", highlight=False)
    question = json.dumps(found["example"]["question"], ensure_ascii=False)
    console.print(f"Look at [bold]{out / 'report.html'}[/]. Run: python {out / EXAMPLE} {out / IMAGE} {question}")


def verdict(found: Mapping[str, Any]) -> str:
    """The result in two or three sentences."""
    whole, size, own, loss = found["float_bytes"], found["bytes"], found["own_bytes"], found["loss"]
    text = f"{size / 1e6:.1f} MB instead of {whole / 1e6:.1f} MB in float32 ({size / whole:.2f}x)"
    text += f", and of {own / 1e6:.1f} MB of the source's own files ({size / own:.2f}x). " if own else ". "
    if loss.measure == "accuracy":
        text += f"It lost {loss.points:.1f} points of accuracy [{loss.low:.1f}, {loss.high:.1f}] on {loss.n} questions"
    else:
        text += f"It would choose {100 * loss.share.value:.1f}% of the original's tokens [{100 * loss.share.low:.1f}, "
        text += f"{100 * loss.share.high:.1f}], n={loss.n} tokens of {found['rows']['verified on']} answers"
    text += f"; {found['limit']:g} points were allowed."
    return text + (" The interval reaches beyond that: more questions would tell more." if loss.high > found["limit"] else "")


def write(made: Path, verify: Evaluator, found: dict[str, Any]) -> None:
    """Write report.json and report.html into `made`."""
    found["examples"] = _examples(made, verify, found)
    found["versions"] = {name: version for name in PACKAGES if (version := _version(name))}
    candidates, chosen = found["candidates"], found["chosen"]
    request = {k: v if isinstance(v, int | float | None) else str(v) for k, v in vars(found["request"]).items()}
    files = {p.name: p.stat().st_size for p in sorted(made.iterdir()) if p.suffix in WEIGHT_FILES}
    sizes = {"float32": found["float_bytes"], "predicted": candidates[chosen].bytes, "files": files, "all": found["bytes"]}
    sizes["source_files"] = found["own_bytes"]
    content = {"environment": found["table"].environment | {"versions": found["versions"]}, "request": request}
    content |= {"verdict": verdict(found), "measure": found["loss"].measure, "loss": found["loss"]}
    content |= {"allowed_points": found["limit"], "bytes": sizes, "rows": found["table"].rows, "times_ms": found["times"]}
    content |= {"data": found["rows"] | {"notes": found["notes"]}, "plan": candidates[chosen].plan, "sensitivity": found["costs"]}
    content["kept_in_float"] = found["kept"]
    content |= {"vision": found["vision"]} if "vision" in found else {}
    content |= {"tried": candidates, "findings": found["diagnosis"].findings, "verdicts": found["diagnosis"].verdicts}
    content |= {"answers": [{k: v for k, v in e.items() if k != "image"} for e in found["examples"]], "example": found["example"]}
    saving.write_json(made / "report.json", content)
    other = {
        f"{e['question']} {e['original']} -> {e['shrunk']}": e["image"] for e in found["examples"] if e["original"] != e["shrunk"]
    }
    track.log({"name": "other answers", "examples": len(other)}, images=other)
    (made / "report.html").write_text(_page(found), encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examples(made: Path, verify: Evaluator, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few rows, first those with another answer than the original's: image, question, both answers."""
    given, labelled = found["answers"], verify.right is not None
    pairs = zip(given, verify.answers, strict=True)
    differs = [a != b for a, b in pairs] if labelled else [not all(same) for same in given]
    order = sorted(range(len(differs)), key=lambda i: not differs[i])
    order = [i for i in order if differs[i]][:SHOWN] + [i for i in order if not differs[i]][:SHOWN]
    rows = verify.rows.select(order)
    now = [given[i] for i in order] if labelled else fidelity.answers(open_artifact(made, found["request"].runtime), rows)
    keys = ("image", "name", "question", *(("answer",) if labelled else ()))
    return [
        {k: row[k] for k in keys} | {"original": verify.answers[i], "shrunk": answer}
        for i, row, answer in zip(order, rows, now, strict=True)
    ]


def _page(found: Mapping[str, Any]) -> str:
    request, rows, env, diagnosis = found["request"], found["rows"], found["table"].environment, found["diagnosis"]
    name = Path(request.model).name if Path(request.model).exists() else request.model  # a page goes places: no local path
    measure = found["loss"].measure
    asked = [("model", name), ("runtime", request.runtime), ("budget", request.budget or "none: as small as holds")]
    asked.append(("may lose", f"{found['limit']:g} points of {measure}"))
    asked.append(("verified on", f"{rows['verified on']} questions about {rows['images']} images"))
    asked.append(("calibrated on", f"{rows['calibrated on']} questions; plans compared on {rows['chosen on']} others"))
    shown = {"title": f"{name}, made smaller", "model": name, "verdict": verdict(found), "asked": asked, "notes": found["notes"]}
    shown |= {"comparison": found["table"]._repr_html_(), "meaning": MEANING[measure], "examples": found["examples"]}
    shown |= {"squares": _squares(found), "findings": doctor.finding_rows(diagnosis.findings), "hardware": page.hardware(env)}
    shown["tried"] = [(*_row(c), "kept" if i == found["chosen"] else "") for i, c in enumerate(found["candidates"])]
    shown["timed"] = [(v.technique, v.stage, f"{v.faster:.2f}x", v.layer) for v in diagnosis.verdicts]
    shown |= {"capabilities": env["capabilities"], "versions": found["versions"], "image_name": IMAGE}
    shown["kept"] = kept_text(found["kept"])
    return page.render("shrink.html", question=found["example"]["question"], runtime=request.runtime, **shown)


def _squares(found: Mapping[str, Any]):  # -> matplotlib.figure.Figure
    """Units by kind and depth: bits written in, shaded by what 4 bits cost there."""
    import numpy as np
    from matplotlib.figure import Figure

    bits, part = found["candidates"][found["chosen"]].plan, found["part"]
    lost = {c.unit: c.loss for c in found["costs"] if c.bits == 4}
    place = {}  # unit -> (kind, depth)
    for unit in bits:
        number = re.search(r"\.(\d+)\.", unit)
        place[unit] = f"{part[unit]} {unit.rpartition('.')[2]}", int(number[1]) if number else 0
    kinds = list(dict.fromkeys(kind for kind, _ in place.values()))
    depth = 1 + max(d for _, d in place.values())
    shade = np.full((len(kinds), depth), np.nan)
    for unit, (kind, d) in place.items():
        shade[kinds.index(kind), d] = np.log10(max(lost.get(unit, 1e-6), 1e-6))
    low, high = np.nanmin(shade), max(np.nanmax(shade), -4)
    figure = Figure(figsize=(4.5 + 0.42 * depth, 1.3 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shade, cmap="Greys", aspect="equal", vmin=low - 0.5, vmax=high + 0.8)
    for unit, (kind, d) in place.items():
        row = kinds.index(kind)
        colour = "white" if shade[row, d] > (low + high + 0.3) / 2 else "black"
        axes.text(d, row, str(bits[unit]), ha="center", va="center", color=colour)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, depth, 1 + depth // 20))
    figure.colorbar(image, ax=axes, label="loss alone in 4 bits\n(log10 nats a token)")
    return figure
