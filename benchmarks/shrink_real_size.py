"""`mmrecipes shrink` of a model of real size, from the command to the finished directory: a quarter of an hour on two idle cores.

SmolVLM-256M's dimensions and random weights, whose answers 8-bit activations change often: so the loss allowed is all there is
(`--max-loss 100`), and what it loses says nothing. Seconds of each stage, and the peak memory of the process and its children.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata

import psutil
from bench_row import ROOT, THREADS

RUNTIME = "onnx"
WORK = ROOT / "runs" / "shrink-real-size"
STAGE = re.compile(r"^\s*\d+/\d+ (.*) (\d+) s\s*$", re.MULTILINE)


def watched(command: list[str], log) -> tuple[int, float, float]:
    """Exit code, seconds and peak MB, all processes of the tree together, each tenth of a second."""
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    began, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                together = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(p.memory_info().rss for p in together) / 1e6)
            except psutil.NoSuchProcess:
                pass  # it ended in between
            time.sleep(0.1)
    return process.returncode, time.perf_counter() - began, peak


def main() -> None:
    from mmrecipes import measure, models
    from mmrecipes.mini import model as mini_model

    WORK.mkdir(parents=True, exist_ok=True)
    checkpoint, out, log = WORK / "checkpoint", WORK / "out", WORK / "log.txt"
    if not checkpoint.exists():
        models.save(twin := mini_model.real_size(), twin.processor, checkpoint, "bfloat16")
        del twin
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "mmrecipes.cli", "shrink", str(checkpoint), "--runtime", RUNTIME, "--max-loss", "100"]
    with log.open("w") as file:
        code, seconds, peak = watched([*command, "--out", str(out)], file)
    said = log.read_text()
    print(said)
    if code:
        raise SystemExit(f"shrink ended with {code} after {seconds:.0f} s")
    report = json.loads((out / "report.json").read_text())
    stages = [{"stage": name, "seconds": int(took)} for name, took in STAGE.findall(said)]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    content = {"environment": measure.environment() | {"onnxruntime": metadata.version("onnxruntime")}, "threads": THREADS}
    content |= {"model": "smolvlm-256m", "runtime": RUNTIME, "seconds": seconds, "peak_mb": peak, "stages": stages}
    content |= {"bytes": size, "report": {key: report[key] for key in ("verdict", "rows", "data", "bytes") if key in report}}
    models.write_json(ROOT / "results" / "shrink-real-size.json", content)
    print(f"{seconds:.0f} s, peak {peak:,.0f} MB, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
