"""Executes notebooks in place and writes what each cost to results/notebooks.json: `python tools/run_notebooks.py [NOTEBOOK...]`.

Without arguments: all. Outputs and counts stay; of the metadata only tags and collapsed sources do. A notebook that fails
is left as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from mmrecipes.measure.process import peak_mb as process_peak_mb
from recipes import ROOT

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
RESULT = ROOT / "results" / "notebooks.json"


def tree_mb(pid: int) -> float:
    """Memory of a process and its children now, in MB: shared pages (libraries) of the children are not counted twice."""
    process = psutil.Process(pid)
    own = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            own += child.memory_full_info().uss
        except psutil.Error:  # gone, or a zombie
            continue
    return own / 1e6


class PeakMemory(threading.Thread):
    """Polls a process until `stop`: `kernel_mb` is its own peak, `peak_mb` that of it and its children together."""

    def __init__(self, pid: int, every: float = 0.1):
        super().__init__(daemon=True)
        self.pid, self.every, self.done = pid, every, threading.Event()
        self.kernel_mb = self.peak_mb = 0.0

    def run(self) -> None:
        while True:
            try:
                self.kernel_mb = max(self.kernel_mb, process_peak_mb(self.pid))
                self.peak_mb = max(self.peak_mb, self.kernel_mb, tree_mb(self.pid))
            except psutil.Error:  # the kernel has ended
                return
            if self.done.wait(self.every):
                return

    def stop(self) -> None:
        self.done.set()
        self.join()


def execute(path: Path) -> dict[str, float | str]:
    """Run the notebook at `path` in a fresh kernel and write it back; its name, seconds, peak_mb and kernel_mb.

    Raises CellExecutionError, with the file untouched, when a cell fails.
    """
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    began = time.perf_counter()
    with client.setup_kernel():
        memory = PeakMemory(client.km.provisioner.pid)
        memory.start()
        for i, cell in enumerate(nb.cells):
            client.execute_cell(cell, i)
        memory.stop()
    seconds = time.perf_counter() - began
    for cell in nb.cells:
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}
    aside = path.with_name(f".{path.stem}.part.ipynb")  # nb-clean looks at the ending
    try:
        nbformat.write(nb, aside)
        clean(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return {
        "name": path.stem,
        "seconds": round(seconds, 1),
        "peak_mb": round(memory.peak_mb),
        "kernel_mb": round(memory.kernel_mb),
    }


def clean(path: Path) -> None:
    """nb-clean, in place: outputs, counts, tags and collapsed sources stay, other metadata of cells goes."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata = {k: v for k, v in nb.metadata.items() if k in ("kernelspec", "language_info")}
    nbformat.write(nb, path)
    keep = [arg for field in ("tags", "jupyter") for arg in ("--preserve-cell-metadata-field", field)]
    command = [Path(sys.executable).with_name("nb-clean"), "clean", "--preserve-cell-outputs", "--preserve-execution-counts"]
    subprocess.run([*command, *keep, path], check=True)


def record(row: dict, environment: dict, path: Path = RESULT) -> None:
    """Put one notebook's row, with the environment it ran in, into the JSON file at `path`."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in rows if r["name"] != row["name"]] + [row | {"environment": environment}]
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps({"rows": sorted(rows, key=lambda r: r["name"])}, indent=1) + "\n")
    os.replace(aside, path)


def main(names: list[str]) -> int:
    for key, value in OFFLINE.items():
        os.environ.setdefault(key, value)
    paths = [Path(n).resolve() for n in names] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    from mmrecipes import measure

    environment, failed = measure.environment(), []  # asked before the first notebook is written back
    for path in paths:
        print(f"{path.name} ...", end=" ", flush=True)
        try:
            row = execute(path)
        except CellExecutionError as e:
            print(f"failed, left as it was\n{e}")
            failed.append(path.name)
            continue
        record(row, environment)
        print(f"{row['seconds']} s, {row['peak_mb']} MB", flush=True)
    if failed:
        print(f"{len(failed)} of {len(paths)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
