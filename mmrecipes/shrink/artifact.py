"""What `shrink` writes: model, example, measurements."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.export import pipeline
from mmrecipes.inference import exported as inference_exported
from mmrecipes.measure import exported, machine, memory, size, timing
from mmrecipes.models import modules, prompts
from mmrecipes.quantize import mixed_precision, nf4
from mmrecipes.report import comparison
from mmrecipes.shrink.candidates import Candidate, mixed

if TYPE_CHECKING:
    from mmrecipes.inference.exported import Exported
    from mmrecipes.shrink.request import Evaluator

EXAMPLE = "example.py"


PICTURE = "example.png"


# ---- time and memory


def measured(base: nn.Module, made: Path, runtime: str, judge: Evaluator, found: Mapping[str, Any]) -> dict[str, Any]:
    """Put example.py and a picture into `made`, run it, and time original and result side by side.

    {"table": a Comparison of both, "times": milliseconds, "example": question and answer, "float_bytes": ...}
    """
    from mmrecipes.evaluate import statistics as evaluate_statistics

    pass  # MOVED
    from mmrecipes.shrink.sizes import float_bytes

    first = judge.rows[0]
    picture, question = first["image"].convert("RGB"), first["question"]
    picture.save(made / PICTURE)
    shutil.copyfile(Path(__file__).parent / "examples" / f"{runtime}.py", made / EXAMPLE)
    answer, peak = _run_example(made, question)
    if runtime != "torch":
        peak = exported.profile_exported(made, picture, question, 8, 1)["peak_mb"]
    small, more = open_artifact(made, runtime), 8
    inputs = prompts.chat(base, picture, question)
    given = small.inputs(picture, question) if not isinstance(small, nn.Module) else prompts.chat(small, picture, question)
    each = {"before": (base, inputs), "after": (small, given)}
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in each}
    for i in range(6):  # interleaved, so that the machine's mood hits both; the first round warms up
        for name in (*each,) if i % 2 else (*reversed(each),):
            drawn[name].append(_timed(*each[name], more))
    times = {name: {"ttft_ms": _median(t[1:], 0), "ms_a_token": _median(t[1:], 1)} for name, t in drawn.items()}
    notes = []
    try:
        whole_peak = memory.peak_memory(base, inputs)["peak_mb"]
    except UserError as e:
        whole_peak, note = None, f"The original's memory was not measured: {e}"
        notes.append(note)
    rows = [{"name": "original, float32"}, {"name": f"shrunk, {runtime}"}]
    loss = found["loss"]
    for row, name in zip(rows, each, strict=True):
        row |= {"ttft_ms": times[name]["ttft_ms"], "tokens_per_s": 1e3 / times[name]["ms_a_token"]}
    rows[0] |= {"peak_mb": whole_peak, "disk_mb": float_bytes(base) / 1e6}
    rows[1] |= {"peak_mb": peak, "disk_mb": found["bytes"] / 1e6, loss.measure: loss.share}
    if loss.paired:
        rows[0]["accuracy"] = evaluate_statistics.wilson(sum(judge.right), len(judge.right))
        rows[1]["change"] = loss.paired
    notes.append(f"TTFT: one picture, {inputs['input_ids'].shape[1]} tokens, after the processor; tokens/s: {more} further ones.")
    without = "" if runtime in ("torch", "executorch") else "; the shrunk model's does without PyTorch"
    notes.append(f"peak MB: a fresh process that loads the model and answers, its libraries included{without}.")
    table = comparison.Comparison(rows, machine.environment(), notes)
    example = {"question": question, "answer": answer}
    return {"table": table, "times": times, "example": example, "float_bytes": float_bytes(base)}


@torch.inference_mode()
def _timed(model: nn.Module | Exported, inputs: Mapping, more: int) -> tuple[float, float]:
    """Milliseconds to the first token of an answer, and for each of `more` further ones, whatever they are."""
    import numpy as np

    began = time.perf_counter()
    if isinstance(model, nn.Module):
        out = model(**timing.cast(model, inputs), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    else:
        token = int(model.prefill(inputs).argmax())
    first = time.perf_counter()
    for _ in range(more):
        if isinstance(model, nn.Module):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        else:
            token = int(model.graphs.step(np.array([[token]])).argmax())
    return 1e3 * (first - began), 1e3 * (time.perf_counter() - first) / more


def _median(drawn: Sequence[tuple[float, float]], column: int) -> float:
    return statistics.median(each[column] for each in drawn)


def _run_example(made: Path, question: str) -> tuple[str, float | None]:
    """What example.py says in a fresh process, and that process's peak memory in MB. UserError where it fails."""
    code = (
        "import runpy, sys\nsys.modules['mmrecipes'] = None\n"  # it must do without
        "path = sys.argv.pop(1)\nsys.argv[0] = path\nrunpy.run_path(path, run_name='__main__')\n"
        "from pathlib import Path\nstatus = Path('/proc/self/status')\n"
        "lines = status.read_text().splitlines() if status.exists() else []\n"
        "print('PEAK', next((int(s.split()[1]) * 1024 / 1e6 for s in lines if s.startswith('VmHWM')), 'none'))"
    )
    command = [sys.executable, "-c", code, str(made / EXAMPLE), str(made / PICTURE), question]
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as elsewhere:
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    answer, mark, peak = done.stdout.rpartition("PEAK ")
    if done.returncode or not mark:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{EXAMPLE} does not run ({last[:160]}), so the result was not kept; please report this")
    return answer.strip(), None if peak.strip() == "none" else float(peak)


def write_artifact(base: nn.Module, rounded: nn.Module, rung: Candidate, made: Path, runtime: str) -> int:
    """Write the model of a plan to directory `made`; its bytes."""
    shutil.rmtree(made, ignore_errors=True)
    width = mixed_precision.bits_by_module(base, rung.plan)
    if runtime == "torch":
        nf4.write_nf4(base, {n for n, b in width.items() if b == 4}, made)
    else:
        home, precision = modules.part_of(base), {"vision": "int8", "language": "int8"}
        for name, bits in width.items():
            if bits == 4:
                side = "vision" if home[f"{name}.weight"] in ("vision", "connector") else "language"
                precision[side] = "mixed"
        pipeline.export(mixed(base, rounded, rung.plan), made, runtime, precision)
    return size.disk_bytes(made)


def open_artifact(made: Path, runtime: str) -> nn.Module | Exported:
    """The written model, ready to answer."""
    return nf4.load_nf4(made) if runtime == "torch" else inference_exported.load_exported(made)
