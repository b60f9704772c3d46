"""What `shrink` writes: the model, an example that runs it, and both models' time and memory side by side."""

import inspect
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmrecipes import errors, families
from mmrecipes.errors import UserError
from mmrecipes.evaluate.statistics import wilson
from mmrecipes.export import pipeline
from mmrecipes.export.wrappers import family_of
from mmrecipes.inference.backends import PACKAGES, runtimes
from mmrecipes.inference.exported import MANIFEST, Exported, load_exported, read_manifest
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure import machine, memory, process, size, timing
from mmrecipes.models import processors, prompts
from mmrecipes.quantize import nf4
from mmrecipes.report import comparison
from mmrecipes.shrink.candidates import Candidate, mixed
from mmrecipes.shrink.fidelity import Evaluator
from mmrecipes.shrink.source import Source

EXAMPLE, FAMILY, IMAGE = "example.py", "model_family.py", "example.png"
NEW_TOKENS = 8


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


def ran_by(made: Path) -> str:
    """ "torch", one of the runtimes, or both of an export whose parts have two: "openvino_onnx"."""
    if not (made / MANIFEST).is_file():
        return "torch"
    return "_".join(dict.fromkeys(runtimes(read_manifest(made)["runtime"]).values()))


def example_code(runtime: str) -> str:
    """A script that asks the model beside it, with public libraries only; for an exported one `load` of its runtime is put in."""
    if runtime == "torch":
        return _example("torch")
    packages = ", ".join(PACKAGES[name] for name in runtime.split("_"))
    code = _example("exported").replace("RUNTIME", packages + (", torch" if runtime == "executorch" else ""))
    return code.replace("from mmrecipes.shrink.examples.onnx import load, np\n", _example(runtime))


def family_code(model: nn.Module) -> str:
    """What `example_code` imports from the file beside it: the model's family and the loader of its processor, cut out of this
    package with all that they need of it. Without PyTorch and, for images, without torchvision."""
    family = family_of(model)
    special = sys.modules[family.images.__module__]
    shared = {
        name: m for name, m in vars(special).items() if inspect.ismodule(m) and m.__name__.startswith("mmrecipes.families.")
    }
    sources = errors.UserError, errors.one_line, processors, families.family, *shared.values()
    code = "\n\n".join(inspect.getsource(source) for source in sources) + "\n\nimport sys\n"
    code += "".join(f"{name} = sys.modules[__name__]\n" for name in shared) + inspect.getsource(special)
    code = re.sub(r"^from mmrecipes\..*\n", "", code, flags=re.MULTILINE)
    table = "FAMILIES" if hasattr(special, "FAMILIES") else "(FAMILY,)"
    return f"{code}\nFAMILY = next(family for family in {table} if family.name == {family.name!r})\n"


def _example(name: str) -> str:
    return (Path(__file__).parent / "examples" / f"{name}.py").read_text(encoding="utf-8")


def measured(source: Source, made: Path, verify: Evaluator, found: Mapping[str, Any]) -> dict[str, Any]:
    """Put example.py and an image into `made`, run it, and time original and result side by side.
    {"table": a Comparison of both, "times": milliseconds, "example": question and answer}
    """
    base, runtime, loss = source.model, ran_by(made), found["loss"]
    image, question = verify.rows[0]["image"].convert("RGB"), verify.rows[0]["question"]
    image.save(made / IMAGE)
    (made / EXAMPLE).write_text(example_code(runtime), encoding="utf-8")
    if runtime != "torch":
        (made / FAMILY).write_text(family_code(base), encoding="utf-8")
    answer, peak = _run_example(made, question, runtime)
    if runtime != "torch":
        peak = process.profile_exported(made, image, question, NEW_TOKENS, 1)["peak_mb"]
    small, inputs, notes = open_artifact(made, runtime), prompts.chat(base, image, question), []
    given = prompts.chat(small, image, question) if isinstance(small, nn.Module) else small.inputs(image, question)
    if "vision" in found:
        notes.append(_vision_note(found["vision"]))
    # interleaved, so that other programs hit both
    times = timing.interleaved({"before": lambda: _timed(base, inputs), "after": lambda: _timed(small, given)}, 5, 1)
    times = {name: {stage: spread["median"] for stage, spread in spent.items()} for name, spent in times.items()}
    try:
        peak_before = memory.peak_memory(base, inputs)["peak_mb"]
    except UserError as e:
        peak_before = None
        notes.append(f"The original's memory was not measured: {e}")
    if source.own_bytes:
        notes.append(
            f"The source's own files take {source.own_bytes / 1e6:.2f} MB; disk MB of the original are those in float32."
        )
    before = {"name": "original, float32", "peak_mb": peak_before, "disk_mb": source.float_bytes / 1e6}
    after = {
        "name": f"shrunk, {runtime.replace('_', ' and ')}",
        "peak_mb": peak,
        "disk_mb": found["bytes"] / 1e6,
        loss.measure: loss.share,
    }
    for row, spent in zip((before, after), times.values(), strict=True):
        row |= {"ttft_ms": spent["ttft_ms"], "tokens_per_s": 1e3 / spent["ms_a_token"]}
    if loss.paired:
        before["accuracy"] = wilson(sum(verify.right), len(verify.right))
        after["change"] = loss.paired
    tokens = inputs["input_ids"].shape[1]
    notes.append(f"TTFT: one image, {tokens} tokens, after the processor; tokens/s: {NEW_TOKENS} further ones.")
    without = "" if runtime in ("torch", "executorch") else "; the shrunk model's does without PyTorch"
    notes.append(f"peak MB: a fresh process that loads the model and answers, its libraries included{without}.")
    table = comparison.Comparison([before, after], machine.environment(), notes)
    return {"table": table, "times": times, "example": {"question": question, "answer": answer}}


def _vision_note(tried: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"{row['runtime']} {row['precision']} {row['ms']['median']:.0f} ms{' (kept)' if row['kept'] else ''}" for row in tried
    ]
    return f"One image through the vision encoder on this machine: {', '.join(rows)}."


@torch.inference_mode()
def _timed(model: nn.Module | Exported, inputs: Mapping) -> dict[str, float]:
    """Milliseconds to the first token of an answer, and for each further one."""
    if isinstance(model, nn.Module):
        calls = timing.generation_steps(model, timing.cast(model, inputs))
    else:
        calls = (lambda: model.prefill(inputs), lambda token: model.graphs.step(np.array([[token]])))
    first, further, _ = process.time_generation(*calls, NEW_TOKENS)
    return {"ttft_ms": first, "ms_a_token": further}


def _run_example(made: Path, question: str, runtime: str) -> tuple[str, float]:
    """What example.py says in a fresh process without this package (and without PyTorch, where the `runtime` needs none), and
    that process's peak memory in MB. UserError where it fails."""
    blocked = () if runtime in ("torch", "executorch") else ("torch", "torchao", "torchvision")
    with temporary_directory() as elsewhere:
        code = (
            f"import contextlib, io, json, os, runpy, sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
            "from mmrecipes.measure.process import peak_mb\n"
            "sys.modules.update((name, None) for name in list(sys.modules) if name.startswith('mmrecipes'))\n"
            f"sys.argv = {[str(made / EXAMPLE), str(made / IMAGE), question]!r}\nos.chdir({str(elsewhere)!r})\n"
            f"sys.path.insert(0, {str(made)!r}); sys.dont_write_bytecode = True\n"  # as for any script
            "with contextlib.redirect_stdout(io.StringIO()) as said:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print(json.dumps({'answer': said.getvalue().strip(), 'peak_mb': peak_mb()}))"
        )
        try:
            done = process.run_fresh(code, "run alone")
        except UserError as e:
            raise UserError(f"{EXAMPLE} does not run ({e}), so the result was not kept; please report this") from e
    return done["answer"], done["peak_mb"]
