"""Peak memory and generation time of a process, and what an exported model costs, without PyTorch: where only a runtime is."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from mmrecipes.errors import UserError
from mmrecipes.inference.exported import load_exported, read_manifest
from mmrecipes.interrupt import temporary_directory
from mmrecipes.models.images import load_image


def peak_mb(pid: int | None = None) -> float:
    """Peak resident memory of this process, or of process `pid`, so far, in MB.
    On Linux VmHWM, which starts anew at exec (a child inherits `ru_maxrss`). Elsewhere, of another process its present size.
    >>> peak_mb() > 10
    True
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        if pid is not None or sys.platform == "win32":
            return psutil.Process(pid).memory_info().rss / 1e6
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run_fresh(code: str, what: str) -> dict[str, Any]:
    """The JSON object on the last line that Python `code` prints, in a fresh process that finds the same packages as this one.
    Raises UserError, with `what` was run and the last line of its stderr, where the process fails."""
    done = subprocess.run([sys.executable, "-c", code], env=same_packages(), capture_output=True, text=True)
    if done.returncode:
        why = last_line(done.stderr) or "out of memory?"
        raise UserError(f"{what}: the fresh process ended with {done.returncode}: {why}; try a smaller model or input")
    return json.loads(last_line(done.stdout))


def same_packages() -> dict[str, str]:
    """The environment of a child process that is to import what this one imports, wherever it runs."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def last_line(text: str) -> str:
    """The last line of `text` that is not blank, stripped; "" where there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def time_generation(prefill: Callable, step: Callable, new_tokens: int, forced: Sequence[int] | None = None) -> tuple:
    """Milliseconds of the prefill and of each of `new_tokens` decode steps (mean), and all logits; batch 1.
    `prefill()` and `step(token)` return the logits of the next token. Greedy, or along the token ids `forced`.
    >>> len(time_generation(lambda: torch.eye(3)[1], lambda token: torch.eye(3)[token], 2)[2])
    3
    """
    start = time.perf_counter()
    logits = [prefill()]
    first = time.perf_counter()
    for i in range(new_tokens):
        logits.append(step(forced[i] if forced else int(logits[-1].argmax())))
    return 1e3 * (first - start), 1e3 * (time.perf_counter() - first) / new_tokens, logits


def profile_exported(
    folder: str | Path, image: Image.Image | str | Path, question: str, tokens: int = 16, repeats: int = 3, threads: int = 2
) -> dict[str, float]:
    """{"load_s", "ttft_ms", "tokens_per_s", "peak_mb"} of the exported model in `folder`, asked `question` about `image`.
    In a fresh process; for ONNX Runtime and OpenVINO one in which PyTorch cannot be imported, because they need none. Times are
    medians of `repeats` runs after a warm-up, each with `tokens` decode steps. UserError where the process fails.
    >>> profile_exported(folder, rows[0]["image"], "What is there?")
    Traceback (most recent call last):
    mmrecipes.errors.UserError: there is no exported model in the folder
    """
    # ExecuTorch's Python API takes PyTorch's tensors
    manifest = read_manifest(Path(folder))
    if "kind" in manifest:
        raise UserError(f"{folder}: compares images with texts and does not answer questions; give an exported VLM")
    blocked = () if manifest["runtime"] == "executorch" else ("torch", "torchao")
    with temporary_directory() as aside:
        path = f"{aside}/image.png"
        load_image(image).save(path)
        job = (str(folder), path, question, tokens, repeats, threads)
        code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        return run_fresh(f"{code}from mmrecipes.measure.process import _profile\n_profile(*{job!r})", what=str(folder))


def _profile(folder: str, image: str, question: str, tokens: int, repeats: int, threads: int) -> None:
    """Runs in the fresh process, and prints what it found."""
    start = time.perf_counter()
    model = load_exported(folder, threads=threads)
    load_s = time.perf_counter() - start
    inputs = model.inputs(load_image(image), question)
    calls = (lambda: model.prefill(inputs), lambda token: model.graphs.step(np.array([[token]])))
    prefills, steps, _ = zip(*(time_generation(*calls, tokens) for _ in range(1 + repeats)), strict=True)
    ttft, step = statistics.median(prefills[1:]), statistics.median(steps[1:])  # the first run warms up
    print(json.dumps({"load_s": load_s, "ttft_ms": ttft, "tokens_per_s": 1e3 / step, "peak_mb": peak_mb()}))
