"""The tables of results/README.md whose figures come from a GPU: results/gpu.json and results/training.json."""

from __future__ import annotations

from typing import Any

STARTS = {
    "recovery": {"scored": "neurons with the largest weights", "random": "random neurons", "scratch": "new random weights"},
    "budget": {"inherited": "cut from the teacher", "random": "new random weights"},
}
WAYS = {
    "staged": "four stages",
    "naive": "questions alone, all at once",
    "helpers": "questions and auxiliary losses, all at once",
}
LABELS = {"100": "104 labels (8 images)", "1000": "1,001 labels (77 images)", "10000": "10,010 labels (770 images)"}
TEACHING = {
    "labels": "",
    "teacher": ", with the teacher",
    "teacher + unlabelled": ", teacher, new images",
}


def spread(found: dict[str, float]) -> str:
    return f"{found['median']:.0f} [{found['low']:.0f}, {found['high']:.0f}]"


def rows_of(content: dict[str, Any], table) -> str:
    """Generation, 2:4 and training steps, a table each. `table(head, rows, words)` writes one."""
    head = ["random weights, one image and a question", "", "TTFT ms [quartiles]", "tokens/s [quartiles]", "peak MB"]
    made = [
        [r["model"], r["variant"], *(spread(r[key]) for key in ("ttft_ms", "tokens_per_s")), f"{r['peak_mb']:,.0f}"]
        for r in sorted(content["generation"], key=lambda r: r["model"], reverse=True)
        if "ttft_ms" in r
    ]
    parts = [table(head, made, 2)]
    layers, counts = (list(dict.fromkeys(r[key] for r in content["two_of_four"])) for key in ("layer", "rows"))
    ratio = {(r["layer"], r["rows"]): r["ratio"] for r in content["two_of_four"]}
    head = ["2:4 in bf16: times as fast as dense, of tokens at once", *(f"{n:,}" for n in counts)]
    shapes = {r["layer"]: f"{r['layer']} ({r['in']} x {r['out']})" for r in content["two_of_four"]}
    parts.append(table(head, [[shapes[layer], *(f"{ratio[layer, n]:.2f}x" for n in counts)] for layer in layers]))
    head = ["a training step", "gradient checkpointing", "ms", "images/s", "peak MB"]
    parts.append(
        table(
            head,
            [
                [
                    f"{r['model']}, {r['precision']}, {r['rows']} images",
                    "yes" if r["gradient checkpointing"] else "no",
                    *(f"{r['step_ms']['median']:.0f}", f"{r['images_per_s']:.0f}", f"{r['peak_mb']:,.0f}"),
                ]
                for r in content["training"]
            ],
            2,
        )
    )
    return "\n\n".join(parts)


def training(content: dict[str, Any], table) -> str:
    """Training in stages or at once, recovery, and what a number of labels brings: the runs that came to their end."""
    rows = []
    for run in content["groups"]["stages"]["runs"]:
        if "accuracy" in run:
            rows.append(["`mini-vlm`, a third of its training", "new random weights", WAYS[run["way"]], *_figures(run)])
    for group, what in (("recovery", "`mini-vlm`, 42% of its parameters cut"), ("budget", "a student of 27% of the parameters")):
        for run in content["groups"][group]["runs"]:
            if "accuracy" in run:
                labels = LABELS.get(run.get("labels"), "unlimited labels")
                taught = TEACHING[run.get("from", run.get("how"))]
                rows.append([what, STARTS[group][run["start"]], labels + taught, *_figures(run)])
    head = ["what is trained", "from", "on", "steps", "TFLOP", "accuracy, % [95% interval], n=4200"]
    where = "; ".join(f"{name} on {group['measured']['gpu']}" for name, group in content["groups"].items())
    return f"{table(head, rows, 3)}\n\nGroups: {where}."


def _figures(run: dict[str, Any]) -> list[str]:
    a = run["accuracy"]
    shown = f"{100 * a['value']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"
    return [str(run["steps"]), f"{run['tflop']:.0f}", shown]
