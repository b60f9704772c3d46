"""Runs each family of vision-language models through each technique and runtime, and writes results/compat.json and .md.

Tiny random models with real processors (tests/families.py), so what is told is whether it works and is exact, not how well.
Each family runs in a process of its own; one that dies or hangs costs the cell that it was in. About an hour: `make compat`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT = 900  # seconds a cell may take
RESULTS = ROOT / "results"
WORDS = {"works": "yes", "refused": "refused", "fails": "**fails**"}


def run_family(name: str, columns: list[str]) -> dict[str, dict]:
    """The cells of one family. A process that ends before its last cell is started again behind the cell that ended it."""
    done: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cells.json"
        while left := [c for c in columns if c not in done]:
            out.write_text("{}")
            command = [sys.executable, str(ROOT / "tools" / "compat_cells.py"), name, ",".join(left), str(out)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            why = _wait(process, out)
            done |= json.loads(out.read_text())
            if why and (lost := [c for c in left if c not in done]):
                done[lost[0]] = {"result": "fails", "error": None, "sentence": why}
    return {c: done[c] for c in columns}


def _wait(process: subprocess.Popen, out: Path) -> str | None:
    """Wait for the process while it keeps finishing cells; why it did not end well, or None."""
    while process.poll() is None:
        if time.time() - out.stat().st_mtime > LIMIT:
            process.kill()
            process.wait()
            return f"no answer within {LIMIT} seconds"
        time.sleep(0.5)
    return None if process.returncode == 0 else f"the process ended with code {process.returncode}"


def page(found: dict) -> str:
    """The table as Markdown: families in rows, techniques and runtimes in columns, and below it what each refusal says."""
    columns, e = found["columns"], found["environment"]
    lines = ["# Which families of models work with what", "", *INTRODUCTION, ""]
    lines += ["| family | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    notes: dict[str, int] = {}
    for family, cells in found["families"].items():
        row = []
        for column in columns:
            if column not in cells:
                row.append("-")
                continue
            cell = cells[column]
            word = WORDS[cell["result"]]
            if cell["sentence"]:
                word += f" [{notes.setdefault(cell['sentence'], len(notes) + 1)}]"
            elif cell["error"] is not None:
                word += f" {cell['error']:.0e}"
            row.append(word)
        lines.append(f"| {family} | " + " | ".join(row) + " |")
    lines += ["", *(f"{i}. {sentence}" for sentence, i in notes.items()), ""]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    flags = " ".join(e["capabilities"])
    lines += [f"Run on {e['cpu']} with {flags}, {e['threads']} threads, {versions}, {e['date'][:10]}, commit {e['commit']}."]
    return "\n".join(lines) + "\n"


INTRODUCTION = [
    "Tiny random models in the hub's format, with processors and chat templates as published ones have, through every technique",
    "and runtime (`make compat`). They tell whether something works and is exact, not how good a real model is after it.",
    "",
    "*yes*: for an export, its 12 greedy tokens are those of PyTorch on five image shapes, two images, none and two turns;",
    "for a technique, the changed model answers with finite logits. The number is the largest relative error of the logits.",
    "*refused*: it ends in one line that says why. *fails*: anything else. -: not run.",
]


def main() -> None:
    import families
    from compat_cells import COLUMNS, versions
    from mmrecipes.measure.machine import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(families.FAMILIES), help="of tests/families.py, comma-separated")
    parser.add_argument("--columns", default=",".join(COLUMNS), help=f"of {', '.join(COLUMNS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "compat.json", help="what is there already is kept and updated")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    found = json.loads(given.out.read_text()) if given.out.is_file() else {"families": {}}
    for name in given.families.split(","):
        cells = run_family(name, given.columns.split(","))
        print(name, {c: cell["result"] for c, cell in cells.items()}, flush=True)
        cells = found["families"].get(name, {}) | cells
        found["families"][name] = {c: cells[c] for c in COLUMNS if c in cells}
        found = {"environment": environment(), "versions": versions(), "columns": list(COLUMNS), "families": found["families"]}
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
