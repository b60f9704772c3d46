"""One row of the bench, measured in this process: by bench.py, and by peers.py, which has no PyTorch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np  # here, so that the clock counts it for none

ROOT = Path(__file__).resolve().parent.parent
MODEL = os.environ.get("BENCH_MODEL", "smolvlm-256m")  # one of mmrecipes.mini.model.REAL_SIZES
END = "" if MODEL == "smolvlm-256m" else f"-{MODEL}"  # of the folder and the results file
WORK = ROOT / "runs" / f"bench{END}"
CHECKPOINT = WORK / "checkpoint"
RUNS, TOKENS, THREADS = 1, 32, 2
QUESTION = "What is in this picture? Name each of the objects, say what colour it has, how large it is, and where it is."


def measured(load: Callable[[], Any], calls: Callable[[Any], tuple], folder: Path, forced: list[int] | None) -> dict:
    """Median ms to the first token, tokens a second, peak memory and bytes; and the logits, for the error.

    `load()` returns a model that is ready, and has to import its runtime: `load_s` counts that, too. `calls(model)` prepares
    the prompt and returns the functions that `measure.time_generation` takes. `first_s` is loading and the first of all prefills.
    """
    start = time.perf_counter()
    model = load()
    load_s = time.perf_counter() - start
    from mmrecipes import measure

    prefill, step = calls(model)
    # the first run warms up: kernels are chosen, pages touched
    warm_up, *runs = [measure.time_generation(prefill, step, TOKENS - 1, forced) for _ in range(1 + RUNS)]
    logits = runs[-1][2]
    files = [p for p in folder.iterdir() if p.name.startswith(("model", "vision", "language"))]
    ttft, step_ms = (statistics.median(run[i] for run in runs) for i in (0, 1))
    row = {"ttft_ms": ttft, "tokens_per_s": 1e3 / step_ms, "peak_mb": measure.peak_mb()}
    row |= {"load_s": load_s, "first_s": load_s + warm_up[0] / 1e3, "disk_mb": sum(p.stat().st_size for p in files) / 1e6}
    row["tokens"] = list(forced or (int(each.argmax()) for each in logits[:-1]))
    return row | {"logits": [np.asarray(each, np.float32).tolist() for each in logits]}
