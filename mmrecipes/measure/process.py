"""Peak memory and generation time of a process, without PyTorch: usable where only a runtime is installed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from mmrecipes.errors import UserError


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


def run_fresh(code: str) -> dict[str, Any]:
    """The JSON object on the last line that Python `code` prints, in a fresh process that finds the same packages as this one.
    Raises UserError, with the last line of its stderr, where the process fails."""
    done = subprocess.run([sys.executable, "-c", code], env=same_packages(), capture_output=True, text=True)
    if done.returncode:
        why = last_line(done.stderr) or "out of memory?"
        raise UserError(f"the fresh process ended with {done.returncode}: {why}; try a smaller model or input")
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
