"""What `shrink` writes: the model, an example that runs it, and both models' time and memory side by side."""

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.evaluate.statistics import wilson
from mmrecipes.export import pipeline
from mmrecipes.inference.exported import Exported, load_exported
from mmrecipes.measure import machine, memory, process, size, timing
from mmrecipes.models import prompts
from mmrecipes.quantize import nf4
from mmrecipes.report import comparison
from mmrecipes.shrink.candidates import Candidate, mixed
from mmrecipes.shrink.request import Evaluator
from mmrecipes.shrink.source import Source

EXAMPLE, IMAGE = "example.py", "example.png"
NEW_TOKENS, ROUNDS = 8, 6


def write_artifact(source: Source, rounded: nn.Module, candidate: Candidate, made: Path) -> int:
    """Write the model of a plan to directory `made`; its bytes."""
    shutil.rmtree(made, ignore_errors=True)
    four = {unit for unit, bits in candidate.plan.items() if bits == 4}
    if source.runtime == "torch":
        nf4.write_nf4(source.model, {name for unit in four for name in source.units[unit]}, made)
        return size.disk_bytes(made)
    precision = {"vision": "int8", "language": "int8"}
    for unit in four:
        precision["vision" if source.part[unit] in ("vision", "connector") else "language"] = "mixed"
    pipeline.export(mixed(source, rounded, candidate.plan), made, source.runtime, precision)
    return size.disk_bytes(made)


def open_artifact(made: Path, runtime: str) -> nn.Module | Exported:
    """The written model, ready to answer."""
    return nf4.load_nf4(made) if runtime == "torch" else load_exported(made)


def measured(source: Source, made: Path, verify: Evaluator, found: Mapping[str, Any]) -> dict[str, Any]:
    """Put example.py and an image into `made`, run it, and time original and result side by side.

    {"table": a Comparison of both, "times": milliseconds, "example": question and answer}
    """
    base, runtime = source.model, source.runtime
    image, question = verify.rows[0]["image"].convert("RGB"), verify.rows[0]["question"]
    image.save(made / IMAGE)
    shutil.copyfile(Path(__file__).parent / "examples" / f"{runtime}.py", made / EXAMPLE)
    answer, peak = _run_example(made, question)
    if runtime != "torch":
        peak = process.profile_exported(made, image, question, NEW_TOKENS, 1)["peak_mb"]
    small, inputs, notes = open_artifact(made, runtime), prompts.chat(base, image, question), []
    given = prompts.chat(small, image, question) if isinstance(small, nn.Module) else small.inputs(image, question)
    times = _side_by_side({"before": (base, inputs), "after": (small, given)})
    try:
        peak_before = memory.peak_memory(base, inputs)["peak_mb"]
    except UserError as e:
        peak_before = None
        notes.append(f"The original's memory was not measured: {e}")
    rows = [{"name": "original, float32", "peak_mb": peak_before, "disk_mb": source.float_bytes / 1e6}]
    rows.append({"name": f"shrunk, {runtime}", "peak_mb": peak, "disk_mb": found["bytes"] / 1e6})
    for row, spent in zip(rows, times.values(), strict=True):
        row |= {"ttft_ms": spent["ttft_ms"], "tokens_per_s": 1e3 / spent["ms_a_token"]}
    loss = found["loss"]
    rows[1][loss.measure] = loss.share
    if loss.paired:
        rows[0]["accuracy"] = wilson(sum(verify.right), len(verify.right))
        rows[1]["change"] = loss.paired
    tokens = inputs["input_ids"].shape[1]
    notes.append(f"TTFT: one image, {tokens} tokens, after the processor; tokens/s: {NEW_TOKENS} further ones.")
    without = "" if runtime in ("torch", "executorch") else "; the shrunk model's does without PyTorch"
    notes.append(f"peak MB: a fresh process that loads the model and answers, its libraries included{without}.")
    table = comparison.Comparison(rows, machine.environment(), notes)
    return {"table": table, "times": times, "example": {"question": question, "answer": answer}}


def _side_by_side(variants: Mapping[str, tuple[nn.Module | Exported, Mapping]]) -> dict[str, dict[str, float]]:
    """Medians of {"ttft_ms", "ms_a_token"}; interleaved, so that other programs hit both, after a first round that warms up."""
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for i in range(ROUNDS):
        for name in sorted(variants, reverse=i % 2 == 1):
            drawn[name].append(_timed(*variants[name]))
    columns = {name: zip(*times[1:], strict=True) for name, times in drawn.items()}
    return {n: dict(zip(("ttft_ms", "ms_a_token"), map(statistics.median, c), strict=True)) for n, c in columns.items()}


@torch.inference_mode()
def _timed(model: nn.Module | Exported, inputs: Mapping) -> tuple[float, float]:
    """Milliseconds to the first token of an answer, and for each further one."""
    if isinstance(model, nn.Module):
        prefill, step = timing.generation_steps(model, timing.cast(model, inputs))
        return process.time_generation(prefill, step, NEW_TOKENS)[:2]
    return process.time_generation(lambda: model.prefill(inputs), lambda t: model.graphs.step(np.array([[t]])), NEW_TOKENS)[:2]


def _run_example(made: Path, question: str) -> tuple[str, float]:
    """What example.py says in a fresh process, and that process's peak memory in MB. UserError where it fails."""
    code = (
        "import runpy, sys\nfrom mmrecipes.measure.process import peak_mb\n"
        "sys.modules.update((n, None) for n in list(sys.modules) if n.startswith('mmrecipes'))\n"  # it must do without
        "path = sys.argv.pop(1)\nsys.argv[0] = path\nrunpy.run_path(path, run_name='__main__')\nprint('PEAK', peak_mb())"
    )
    command = [sys.executable, "-c", code, str(made / EXAMPLE), str(made / IMAGE), question]
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as elsewhere:
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=process.same_packages())
    answer, mark, peak = done.stdout.rpartition("PEAK ")
    if done.returncode or not mark:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{EXAMPLE} does not run ({last[:160]}), so the result was not kept; please report this")
    return answer.strip(), float(peak)
