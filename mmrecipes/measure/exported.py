"""What an exported model costs where it is deployed: a fresh process that has its runtime, and no PyTorch."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmrecipes.errors import UserError
from mmrecipes.inference.exported import load_exported, read_manifest
from mmrecipes.measure.process import peak_mb, run_fresh, time_generation
from mmrecipes.models.images import load_image


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
    blocked = () if read_manifest(Path(folder))["runtime"] == "executorch" else ("torch", "torchao")
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as aside:
        path = f"{aside}/image.png"
        load_image(image).save(path)
        job = (str(folder), path, question, tokens, repeats, threads)
        code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        try:
            return run_fresh(f"{code}from mmrecipes.measure.exported import _profile\n_profile(*{job!r})")
        except UserError as e:
            raise UserError(f"{folder}: {e}") from e


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
