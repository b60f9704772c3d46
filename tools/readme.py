"""Fills the generated regions of README.md, results/README.md and the notebooks' first cells; --check says which are stale.

A region lies between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. README.md has `badges` and `notebooks` (a table from
results/notebooks.json). results/README.md has `results` (from results/tour.json), `quantization`, `pruning`, `distillation` and
`adapters` (what chapters 1 to 3 cost), `training`, `bench`, `parts`, `growth`,
`sizes`, `resampler`, `waterfall`, `together`, `vllm` and `gpu`. A notebook has `badges` and, if it likes, `cost`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bench_tables
import gpu_tables
import resampler_tables
import serve_tables
import together_tables
from recipes import ROOT, heading, repository

UNMEASURED = "Not measured yet: `make results`."
REGION = re.compile(r"<!-- begin:(\w+) -->\n?(.*?)\n?<!-- end:\1 -->", re.DOTALL)
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # key of a row, heading, how a value is printed
    ("name", "variant", str),
    (
        "accuracy",
        "accuracy, % [95% interval]",
        lambda a: f"{100 * a['value']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}] n={a['n']}",
    ),
    ("ttft_ms", "time to first token, ms", "{:.0f}".format),
    ("tokens_per_s", "tokens/s", "{:.0f}".format),
    ("peak_mb", "peak memory, MB", "{:.0f}".format),
    ("disk_mb", "on disk, MB", "{:.1f}".format),
)

QUANTIZATION = (  # file in results/, the variant's name in it, what README calls it
    (
        "int8.json",
        "ONNX Runtime dynamic, uint8, some kept",
        "int8 weights and activations, dynamic, four layers in fp32, ONNX Runtime",
    ),
    ("int8.json", "ONNX Runtime static, MinMax", "int8 weights and activations, calibrated, four layers in fp32, ONNX Runtime"),
    ("plan.json", "uniform 4 bits", "4 bits, GPTQ"),
    ("calibrated.json", "3 bits, a scale a channel: round to nearest", "3 bits, rounded to nearest, embeddings in 16 bits"),
    ("plan.json", "uniform 3 bits", "3 bits, GPTQ"),
    ("plan.json", "uniform 2 bits, groups of 32", "2 bits in groups of 32, GPTQ"),
    ("qat.json", "2 bits, teacher", "2 bits in groups of 32, GPTQ, then trained with a teacher, embeddings in 16 bits"),
    ("plan.json", "plan, bytes of 2 bits in groups of 32", "2 to 4 bits, planned module by module, GPTQ"),
)

PRUNING = (  # the same, and how much is gone
    ("pruned.json", "magnitude, 50%", "zeros: magnitude pruning, by layer", "50% of the weights"),
    ("pruned.json", "SparseGPT, 50%", "zeros: SparseGPT", "50% of the weights"),
    ("pruned.json", "SparseGPT, 2:4", "zeros: SparseGPT, 2:4", "50% of the weights"),
    ("structured.json", "cut", "FFN neurons cut out of vision encoder and language model", "{cut:.0%} of the parameters"),
    (
        "structured.json",
        "recovered with its parent",
        "the same, trained for {minutes:.0f} minutes",
        "{cut:.0%} of the parameters",
    ),
    ("tokens.json", "question, layer 2, keep 50%", "visual tokens dropped after two layers, by the question", "50% of them"),
    (
        "tokens.json",
        "question, layer 2, a quarter, but all to count",
        "the same, a quarter kept, but all for questions that count (a rule chosen on these very questions)",
        "{dropped:.0%} of them",
    ),
    ("tokens.json", "merge 50% in the tower", "visual tokens merged in the vision encoder", "50% of them, at its end"),
)

DISTILLATION = (  # the same, and of which answers the points are
    ("student.json", "taught", "a student of `mini-vlm`, distilled for {minutes:.0f} minutes", None),
    ("student.json", "labels alone", "the same, from labels alone, {minutes:.0f} minutes", None),
    ("student.json", "labels alone, from nothing", "the same, from labels alone and random weights, {minutes:.0f} minutes", None),
    (
        "swap.json",
        "ShuffleNetV2 1.0x: all",
        "`mini-vlm` with a ShuffleNetV2 as vision encoder, {minutes in all:.0f} minutes from scratch",
        None,
    ),
    ("swap.json", "MobileNetV2 0.5: all", "with a MobileNetV2, {minutes in all:.0f} minutes from `mini-cnn`", None),
    ("swap.json", "ViT, smaller: all", "with a smaller ViT, {minutes in all:.0f} minutes from its own", None),
    ("dual.json", "taught", "a smaller `mini-siglip`, distilled for {minutes:.0f} minutes: image to text", "text_r1"),
    ("dual.json", "pairs alone", "the same, contrastive loss only, {minutes:.0f} minutes", "text_r1"),
)

ADAPTERS = {  # of lora.json, how each way to learn is called
    "all weights, new only": "all weights, from new examples",
    "LoRA, new only": "LoRA, from new examples",
    "all weights, new and old": "all weights, with as many old examples",
    "LoRA, new and old": "LoRA, with as many old examples",
    "NF4 + LoRA": "the same on four bits (QLoRA)",
}


SETS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_vnni": "VNNI", "avx_vnni": "AVX-VNNI", "avx512_bf16": "bf16"}
SETS |= {"amx_int8": "AMX int8", "amx_bf16": "AMX bf16", "neon": "NEON", "i8mm": "i8mm", "bf16": "bf16", "sve": "SVE"}


def badges(url: str, notebook: str | None = None) -> str:
    """Binder and Colab badges for notebooks/`notebook`; without one, Binder opens the folder and Colab lists the repository."""
    slug = url.removeprefix("https://github.com/")
    binder = f"https://mybinder.org/v2/gh/{slug}/main?urlpath=lab/tree/notebooks" + (f"/{notebook}" if notebook else "")
    colab = f"https://colab.research.google.com/github/{slug}" + (f"/blob/main/notebooks/{notebook}" if notebook else "")
    return (
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})\n"
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    )


def table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A markdown table; the first `words` columns to the left, the others, numbers, to the right."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)


def minutes(seconds: float) -> str:
    return f"{max(seconds / 60, 0.1):.1f}"


def notebook_table(titles: dict[str, str], measured: list[dict[str, Any]]) -> str:
    """titles: file name -> title. A notebook without a measurement gets dashes."""
    found = {row["name"]: row for row in measured}
    rows = []
    for file, title in titles.items():
        row = found.get(file.removesuffix(".ipynb"))
        cost = [minutes(row["seconds"]), f"{row['peak_mb'] / 1000:.1f} GB"] if row else ["-", "-"]
        rows.append([f"[{file.removesuffix('.ipynb')}](notebooks/{file})", title, *cost])
    return table(["notebook", "question", "minutes", "peak memory"], rows, words=2)


def result_table(result: dict[str, Any]) -> str:
    """A row a variant, columns that no row has left out; then on what, when and at which commit that was measured."""
    rows = result["rows"]
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    cells = [["-" if row.get(key) is None else show(row[key]) for key, _, show in columns] for row in rows]
    lines = [table([c[1] for c in columns], cells), *result.get("notes", []), f"Measured on {where(result['environment'])}."]
    return "\n\n".join(lines)


def quantization_table(results: Path) -> str:
    """Bytes and points lost on all test questions, a row for each of QUANTIZATION that was measured."""
    rows, n = [], 0
    for file, name, called in QUANTIZATION:
        row = load(results / file).get("variants", {}).get(name)
        if row:
            c, n = row["change"], row["accuracy"]["n"]
            times = f"{row['times_smaller']:.1f}x" if "times_smaller" in row else "-"
            rows.append([called, times, f"{c['points']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]"])
    head = ["weights of `mini-vlm`", "smaller than fp32", f"points of accuracy, on {n} questions [95% interval]"]
    return table(head, rows) if rows else UNMEASURED


def pruning_table(results: Path) -> str:
    """What is gone and what it costs, a row for each of PRUNING that was measured; then what it gives in time."""
    rows, cut, speed = [], load(results / "structured.json"), load(results / "tokens-speed.json")
    for file, name, called, gone in PRUNING:
        row = load(results / file).get("variants", {}).get(name)
        if row:
            c, known = row["change"], {"dropped": 1 - row.get("keep", 1), "minutes": row.get("recovery", {}).get("minutes", 0)}
            known["cut"] = cut.get("share cut", {}).get("deeper cut" if "deeper" in name else "cut", 0)
            rows.append(
                [
                    called.format(**known),
                    gone.format(**known),
                    f"{c['points']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]",
                    str(c["n"]),
                ]
            )
    if not rows:
        return UNMEASURED
    notes = []
    if cut.get("times faster"):
        t = cut["times faster"]["cut"]
        notes.append(
            f"The cut model answers {t['a question, ONNX Runtime']:.2f} times as fast as the whole one in ONNX Runtime, and"
            f" {t['a question, PyTorch']:.2f} times in PyTorch, which spends more of its time in Python."
        )
    if speed.get("prefill"):
        quarter, merged = speed["prefill"]["keep 25%, attention, layer 2"]["faster"], speed["ttft"]["merge 50%"]["faster"]
        notes.append(
            "With the dimensions of SmolVLM-256M, random weights and an image of four tiles, dropping 75% of the visual tokens"
            f" makes the language prefill {quarter:.1f} times as fast, and merging 50% of the patches brings the first token"
            f" {merged:.1f} times as fast. Zeros alone make no dense kernel faster (notebook 20)."
        )
    shown = table(["less of `mini-vlm`", "gone", "points of accuracy [95% interval]", "questions"], rows, words=2)
    return "\n\n".join([shown, *[" ".join(notes)] * bool(notes)])


def distillation_table(results: Path) -> str:
    """Size, and points against the teacher, a row for each of DISTILLATION that was measured; then what they give in time."""
    rows, speed = [], load(results / "student.json").get("times faster", {})
    for file, name, called, what in DISTILLATION:
        content = load(results / file)
        if row := content.get("variants", {}).get(name):
            c = row["change"][what] if what else row["change"]
            points = f"{c['points']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]"
            rows.append([called.format(**row), f"{row.get('share', content.get('share')):.0%}", points, str(c["n"])])
    if not rows:
        return UNMEASURED
    shown = table(["a smaller model", "of the parameters", "points against its teacher [95% interval]", "n"], rows)
    faster = ", ".join(f"{v:.1f} times ({k.removeprefix('a question, ')})" for k, v in speed.items() if "ONNX" in k)
    said = [f"The distilled student answers a question faster than its teacher: {faster}."] if faster else []
    return "\n\n".join([shown, *said, *swapped_encoders(load(results / "swap.json"))])


def swapped_encoders(content: dict[str, Any]) -> list[str]:
    """In one sentence: ms an image of the ShuffleNetV2 and of the ViT, both in static int8; none if not measured."""
    told = content.get("runtime, OpenVINO", {})  # answers do not depend on threads
    wheres = {"OpenVINO, 1 thread": "OpenVINO, 1 thread", "runtime, OpenVINO": "OpenVINO", "runtime": "ONNX Runtime"}
    parts = []
    for key, name in wheres.items():
        rows = content.get(key, {})
        swapped, own = (rows.get(f"{eye}, static") for eye in ("ShuffleNetV2 1.0x", "teacher"))
        if swapped and own:
            points = (swapped if "change" in swapped else told["ShuffleNetV2 1.0x, static"])["change"]["points"]
            threads = "" if "thread" in key else f", {content['threads']} threads"
            ms = f"{swapped['ms']['median']:.1f} against {own['ms']['median']:.1f} ms"
            parts.append(f"{ms}, {points:+.1f} points ({name}{threads})")
    return [f"One image through the ShuffleNetV2 against the ViT, both in static int8: {'; '.join(parts)}."] if parts else []


def adapters_table(results: Path) -> str:
    """What each of ADAPTERS learned of the new things, and forgot of the old."""
    content, rows = load(results / "lora.json"), []
    for name, called in ADAPTERS.items():
        if row := content.get("variants", {}).get(name):
            new, old = row["new"]["accuracy"], row["change"]
            learned = f"{new['value']:.0%} [{100 * new['low']:.0f}, {100 * new['high']:.0f}]"
            rows.append([called, learned, f"{old['points']:+.1f} [{old['low']:+.1f}, {old['high']:+.1f}]", str(old["n"])])
    if not rows:
        return UNMEASURED
    first = content["variants"]["before"]["new"]["accuracy"]
    new = f"of {first['n']} new questions, {first['value']:.0%} before"
    return table(["two colours and two shapes, learned by", new, "points on old questions [95% interval]", "n, old"], rows)


def vllm_table(content: dict[str, Any]) -> str:
    """Each checkpoint's answers in vLLM beside those of the same file in PyTorch, and beside fp32, in points."""
    rows = []
    for name, row in content["variants"].items():
        found = (row["vllm"], row["ours"], row["same answers"])
        *shares, same = [f"{100 * a['value']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]" for a in found]
        gaps = [row[f"vllm against {other}"] for other in ("ours", "fp32")]
        points = [f"{g['points']:+.1f} [{g['low']:+.1f}, {g['high']:+.1f}]" for g in gaps]
        rows.append([name, f"{row['disk_mb']:.1f}", *shares, *points, same])
    head = [
        "checkpoint",
        "MB",
        "vLLM, % [95% interval]",
        "PyTorch, %",
        "vLLM against PyTorch, points",
        "vLLM against fp32, points",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in content["vllm"].items())
    return f"{table([*head, 'same answers, %'], rows)}\n\n{content['n']} questions. vLLM's environment: {versions}."


FRESH = {"load_s": "load s", "first_s": "load to first token s"}


def bench_table(content: dict[str, Any]) -> str:
    """The real-size twin in every runtime: each row beside PyTorch's fp32, the first. What a fresh process takes to load it
    and to its first token is there since November 2026."""
    first, body = content["rows"][0], []
    fresh = [key for key in ("load_s", "first_s") if key in first]
    for row in content["rows"]:
        spread = " [{:,.0f}, {:,.0f}]".format(*row["ttft_ms_range"]) if "ttft_ms_range" in row and content["rounds"] > 1 else ""
        times = [
            f"{row['ttft_ms']:,.0f}{spread} ({first['ttft_ms'] / row['ttft_ms']:.1f}x)",
            f"{row['tokens_per_s']:.1f} ({row['tokens_per_s'] / first['tokens_per_s']:.1f}x)",
            f"{row['peak_mb']:,.0f} ({row['peak_mb'] / first['peak_mb']:.2f}x)",
        ]
        error = f"{100 * row['error']:.1f}%" if row is not first else "-"
        body.append([row["name"], *times, f"{row['disk_mb']:,.0f}", *(f"{row[key]:.1f}" for key in fresh), error])
    head = ["variant", "TTFT ms", "tokens/s", "peak MB", "disk MB", *(FRESH[key] for key in fresh), "logit error"]
    notes = [f"{row['name']}: {row['note']}." for row in content["rows"] if "note" in row] + content.get("notes", [])
    rounds = "one fresh process" if content["rounds"] == 1 else f"the median of {content['rounds']} fresh processes"
    known = content["environment"] | ({"threads": content["threads"]} if "threads" in content else {})
    notes.append(f"Each row is {rounds}; PyTorch's disk MB are the bf16 checkpoint's. Measured on {where(known)}.")
    beside = [peers_table(content)] if any(row["name"].startswith("ours: ") for row in content["rows"]) else []
    return "\n\n".join([table(head, body), *beside, *notes])


def exports_table(content: dict[str, Any]) -> str:
    """What it took to write each model's files, in a process of its own."""
    names = [
        row["name"] for row in content["rows"] if row["name"] in content["exports"] and not row["name"].startswith("PyTorch")
    ]
    rows = [(name, content["exports"][name]) for name in names]
    body = [[name, f"{made['seconds']:,.0f}", f"{made['peak_mb'] / 1e3:,.1f}"] for name, made in rows]
    return table(["writing the files of", "seconds", "peak memory, GB"], body)


SHRUNK = {"ttft_ms": 0, "tokens_per_s": 1, "peak_mb": 0, "disk_mb": 0}  # column: digits


def stages_table(content: dict[str, Any]) -> str:
    """The stages of one `shrink`, and all of it."""
    body = [[one["stage"], f"{one['seconds']:,}"] for one in content["stages"]]
    body.append([f"all, with a peak of {content['peak_mb'] / 1e3:.2f} GB", f"{content['seconds']:,.0f}"])
    shown = [[row["name"], *(f"{row[key]:,.{digits}f}" for key, digits in SHRUNK.items())] for row in content["report"]["rows"]]
    made = table(["", "TTFT, ms", "tokens/s", "peak MB", "disk MB"], shown)
    return f"{table(['stage', 'seconds'], body)}\n\n{made}\n\n{content['report']['verdict']}"


MEASURES = {  # column: heading, whether more is better
    "ttft_ms": ("TTFT", False),
    "tokens_per_s": ("tokens/s", True),
    "peak_mb": ("peak memory", False),
    "disk_mb": ("disk", False),
    "first_s": ("load to first token", False),
}


def peers_table(content: dict[str, Any]) -> str:
    """Each of ours beside the best peer of each column whose logits are as close to fp32's, or nearly: how many times as good."""
    ours = [r for r in content["rows"] if r["name"].startswith("ours: ")]
    others = [r for r in content["rows"] if r not in ours and "prompt" not in r["name"] and "visual tokens" not in r["name"]]
    columns = [key for key in MEASURES if all(key in row for row in content["rows"])]
    body = []
    for row in ours:
        cells = []
        for key in columns:
            more = MEASURES[key][1]
            near = [r for r in others if r["error"] <= 1.1 * max(row["error"], 1e-5)]
            near = [r for r in near if key != "disk_mb" or not r["name"].startswith("PyTorch")] or near  # bf16, whatever runs
            best = (max if more else min)(near, key=lambda r, key=key: r[key])
            times = row[key] / best[key] if more else best[key] / row[key]
            cells.append(f"{times:.2f}x {best['name']}")
        body.append([row["name"].removeprefix("ours: "), *cells])
    head = ["ours, against the best peer whose logit error is at most 1.1 times ours", *(MEASURES[key][0] for key in columns)]
    said = "Above 1x ours is ahead; within a few percent neither is. Peers on other prompts are left out."
    return f"{table(head, body, words=len(head))}\n\n{said}"


def where(environment: dict[str, Any]) -> str:
    """Hardware, date and commit in one line, as far as they are known."""
    commit, _, dirty = (environment.get("commit") or "").partition("+")
    known = (
        ("{}", environment.get("cpu")),
        ("with {}", " ".join(SETS[c] for c in environment.get("capabilities", ()) if c in SETS)),
        ("{}", environment.get("gpu")),
        ("{} threads", environment.get("threads")),
        ("{} GB", environment.get("memory_gb")),
        ("torch {}", environment.get("torch")),
        ("{}", environment.get("date", "")[:10]),
        ("commit {}", commit[:10] + (" with changes" if dirty else "") if commit else None),
    )
    return ", ".join(text.format(value) for text, value in known if value)


def measured_on(results: Path, files: Iterable[str]) -> str:
    """On which machine, when and at which commit each of `files` in results/ was measured: a line for each that was."""
    lines = []
    for file in dict.fromkeys(files):
        environment = load(results / file).get("environment")
        if environment:
            lines.append(f"- [{file}]({file}): {where(environment)}")
    return "Measured on:\n\n" + "\n".join(lines) if lines else ""


def fill(text: str, regions: dict[str, str], where: str) -> str:
    """`text` with the inside of each of its regions replaced. ValueError for a region that is unknown or not closed."""
    opened = re.findall(r"<!-- (begin|end):(\w+) -->", text)
    closed = [name for name, _ in REGION.findall(text)]
    if opened != [(edge, name) for name in closed for edge in ("begin", "end")]:
        raise ValueError(f"{where}: regions do not pair up: {' '.join(f'{edge}:{name}' for edge, name in opened)}")
    if unknown := set(closed) - set(regions):
        raise ValueError(f"{where}: no region {', '.join(sorted(unknown))}; there are {', '.join(regions)}")
    return REGION.sub(lambda m: f"<!-- begin:{m[1]} -->\n{regions[m[1]]}\n<!-- end:{m[1]} -->", text)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "environment": {}}


def expected(root: Path = ROOT) -> dict[Path, str]:
    """README.md, results/README.md and every notebook -> the text each should have."""
    url = repository(root)
    measured = load(root / "results" / "notebooks.json")["rows"]
    cost = {
        row["name"]: f"About {minutes(row['seconds'])} minutes, {row['peak_mb'] / 1000:.1f} GB of memory." for row in measured
    }
    texts, titles = {}, {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        nb = json.loads(text)
        source = "".join(nb["cells"][0]["source"])
        titles[path.name] = heading(source)
        regions = {"badges": badges(url, path.name), "cost": cost.get(path.stem, "Not measured yet.")}
        new = fill(source, regions, path.name)
        if new != source:
            nb["cells"][0]["source"] = new.splitlines(keepends=True)
            text = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
        texts[path] = text
    texts[root / "README.md"] = filled(
        root / "README.md",
        {"badges": badges(url, next(iter(titles), None)), "notebooks": notebook_table(titles, measured)},
    )
    texts[root / "results" / "README.md"] = filled(root / "results" / "README.md", result_regions(root / "results"))
    return texts


def result_regions(results: Path) -> dict[str, str]:
    """The regions of results/README.md: each table, and on which machines its files were measured."""
    tour, bench = load(results / "tour.json"), load(results / "bench.json")
    tables = {
        "quantization": (quantization_table(results), [row[0] for row in QUANTIZATION]),
        "pruning": (pruning_table(results), [*(row[0] for row in PRUNING), "tokens-speed.json"]),
        "distillation": (distillation_table(results), [row[0] for row in DISTILLATION]),
        "adapters": (adapters_table(results), ["lora.json"]),
    }
    regions = {name: f"{shown}\n\n{measured_on(results, files)}".strip() for name, (shown, files) in tables.items()}
    regions["bench"] = bench_table(bench) if bench["rows"] else "Not measured yet: `make bench`."
    parts = load(results / "bench-parts.json")
    regions["parts"] = bench_table(parts) if parts["rows"] else "Not measured yet: `benchmarks/bench_parts.py`."
    larger = load(results / "bench-smolvlm2-500m.json")
    regions["larger"] = bench_table(larger) if larger["rows"] else UNMEASURED
    largest = load(results / "bench-qwen2.5-vl-3b.json")
    regions["largest"] = f"{bench_table(largest)}\n\n{exports_table(largest)}" if largest["rows"] else UNMEASURED
    shrunk = load(results / "shrink-real-size.json")
    regions["shrink"] = UNMEASURED
    if "stages" in shrunk:
        regions["shrink"] = f"{stages_table(shrunk)}\n\n{measured_on(results, ['shrink-real-size.json'])}"
    regions["results"] = result_table(tour) if tour["rows"] else UNMEASURED
    for name, made in (("growth", bench_tables.growth), ("sizes", bench_tables.sizes)):
        content = load(results / f"{name}.json")
        found = "variants" in content
        regions[name] = f"{made(content, table)}\n\n{measured_on(results, [f'{name}.json'])}" if found else UNMEASURED
    gpu, training = load(results / "gpu.json"), load(results / "training.json")
    regions["gpu"] = UNMEASURED
    if "generation" in gpu:
        regions["gpu"] = f"{gpu_tables.rows_of(gpu, table)}\n\n{measured_on(results, ['gpu.json'])}"
    resampler = load(results / "mini-resampler.json")
    regions["resampler"] = UNMEASURED
    if "sizes" in resampler:
        regions["resampler"] = f"{resampler_tables.sizes(resampler, table)}\n\n{measured_on(results, ['mini-resampler.json'])}"
    combined = load(results / "together.json")
    regions["together"] = "Not measured yet: `python benchmarks/results.py together`."
    if {"times", "real"} <= combined.keys():
        shown = [getattr(together_tables, name)(combined, table) for name in ("orders", "deployed", "real")]
        regions["together"] = "\n\n".join([*shown, measured_on(results, ["together.json"])])
    vllm = load(results / "vllm.json")
    regions["vllm"] = "Not measured yet: `make vllm`."
    if "variants" in vllm:
        regions["vllm"] = f"{vllm_table(vllm)}\n\n{measured_on(results, ['vllm.json'])}"
    fast, served = load(results / "serve-speed.json"), load(results / "serve.json")
    regions["serve"] = "Not measured yet: `make load`, `python benchmarks/serve_speed.py`."
    if fast["rows"] and "soak" in served:
        shown = [serve_tables.speed(fast, table), serve_tables.faults(served, table)]
        regions["serve"] = "\n\n".join([*shown, measured_on(results, ["serve-speed.json", "serve.json"])])
    waterfall, precision = load(results / "waterfall.json"), load(results / "training-precision.json")
    shown = [resampler_tables.waterfall(waterfall, table)] if "sliced" in waterfall else []
    shown += [resampler_tables.training(precision, table)] if "batch" in precision else []
    shown += [measured_on(results, ["waterfall.json", "training-precision.json"])]
    regions["waterfall"] = "\n\n".join(shown) if len(shown) > 1 else UNMEASURED
    regions["training"] = UNMEASURED
    if "groups" in training:
        regions["training"] = f"{gpu_tables.training(training, table)}\n\n{measured_on(results, ['training.json'])}"
    return regions


def filled(path: Path, regions: dict[str, str]) -> str:
    """The text of `path` with all its regions filled. ValueError where one is missing."""
    name = path.relative_to(path.parents[1] if path.parent.name == "results" else path.parent).as_posix()
    text = fill(path.read_text(encoding="utf-8"), regions, name)
    if missing := [region for region in sorted(regions) if f"<!-- begin:{region} -->" not in text]:
        raise ValueError(f"{name} has no region {', '.join(missing)}: add <!-- begin:NAME --> and <!-- end:NAME -->")
    return text


def stale(root: Path = ROOT) -> list[Path]:
    """The files whose generated regions are not what they should be."""
    return [path for path, text in expected(root).items() if path.read_text(encoding="utf-8") != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a file would change")
    check = parser.parse_args().check
    try:
        texts = expected()
    except (OSError, ValueError) as e:
        print(f"readme: {e}", file=sys.stderr)
        return 1
    old = stale()
    for path in old:
        if not check:
            path.write_text(texts[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'stale: run `make readme`' if check else 'written'}")
    return bool(old) and check


if __name__ == "__main__":
    sys.exit(main())
