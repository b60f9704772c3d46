"""What an exported model costs where it is deployed: a fresh process that has its runtime, and no PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mmrecipes.errors import UserError
from mmrecipes.models.images import load_image

if TYPE_CHECKING:
    from PIL import Image

_CHILD = """
import json, statistics, sys, time
if {alone}:
    sys.modules.update(torch=None, torchao=None)  # as where they are not installed
import numpy as np
from PIL import Image
from mmrecipes.inference import exported
from mmrecipes.measure.exported import peak_mb
start = time.perf_counter()
model = exported.load_exported({folder!r}, threads={threads})
load = time.perf_counter() - start
inputs = model.inputs(Image.open({picture!r}), {question!r})
firsts, rates = [], []
for _ in range({repeats} + 1):  # the first run warms up
    start = time.perf_counter()
    logits = model.prefill(inputs)
    first = time.perf_counter()
    for _ in range({tokens}):
        logits = model.graphs.step(np.array([[int(logits.argmax())]]))
    firsts.append(1e3 * (first - start))
    rates.append({tokens} / (time.perf_counter() - first))
found = dict(load_s=load, ttft_ms=statistics.median(firsts[1:]), tokens_per_s=statistics.median(rates[1:]), peak_mb=peak_mb())
print(json.dumps(found))
"""


def peak_mb() -> float:
    """Most memory that this process has had in RAM so far, in MB."""
    try:  # not ru_maxrss: on Linux a child inherits its parent's peak in it
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def profile_exported(
    folder: str | Path, picture: Image.Image | str | Path, question: str, tokens: int = 16, repeats: int = 3, threads: int = 2
) -> dict[str, float]:
    """{"load_s", "ttft_ms", "tokens_per_s", "peak_mb"} of the exported model in `folder`, asked `question` about `picture`.

    In a fresh process; for ONNX Runtime and OpenVINO one that acts as if PyTorch were not installed, because they need none.
    Times are medians of `repeats` runs after one more, each with `tokens` words found. UserError where the process fails.
    """
    from mmrecipes.inference.exported import read_manifest

    alone = read_manifest(Path(folder))["runtime"] != "executorch"  # whose Python API takes PyTorch's tensors
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as aside:
        path = f"{aside}/picture.png"
        load_image(picture).save(path)
        given = {"folder": str(folder), "picture": path, "question": question}
        code = _CHILD.format(**given, alone=alone, threads=threads, repeats=repeats, tokens=tokens)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # the same packages, ours too
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["out of memory?"])[-1]
        raise UserError(f"{folder}: the fresh process ended with {done.returncode}: {why}; try a smaller picture or model")
    return json.loads(done.stdout.strip().splitlines()[-1])
