"""Peak memory of a fresh process that generates (notebook 01)."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.measure.process import last_line, peak_mb, run_fresh
from mmrecipes.measure.timing import cast


def peak_memory(model: nn.Module, inputs: Mapping, new_tokens: int = 8) -> dict:
    """Peak resident memory, in MB, of a fresh process that loads `model` and generates `new_tokens` tokens.

    "peak_mb" while it generates, "imports_mb" after its imports, "model_mb" the difference: weights, activations, kernels.
    "load_mb" is the peak while the file was read: packed int8 weights exist twice then, which is this file's doing, so the
    mark is reset in between; "includes_loading" is True where the kernel cannot do that, and "peak_mb" is the larger of
    the two. "gpu_mb" is the peak of the GPU's memory, None on a CPU. Raises UserError when the process dies.
    >>> peak_memory(model, inputs, 1)["model_mb"] > 0
    True
    """
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        job = {"file": str(Path(folder) / "model.pt"), "new_tokens": new_tokens, "threads": torch.get_num_threads()}
        job["modules"] = sorted({type(m).__module__ for m in model.modules()} - {"__main__"})
        try:
            torch.save((_picklable(model), cast(model, inputs)), job["file"])
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, OSError) as e:
            why = last_line(str(e))
            raise UserError(f"peak_memory: cannot write this model to a file ({why}); free disk or unhook it") from e
        try:
            return run_fresh(f"from mmrecipes.measure.memory import _generate\n_generate(**{job!r})")
        except UserError as e:
            raise UserError(f"peak_memory: {e}") from e


def _picklable(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, without processor and without the local functions that transformers hooks into a model
    at its first call, and again where they are missing."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if hasattr(model, "processor"):
        shared[id(model.processor)] = None
    light = copy.deepcopy(model, shared)
    for module in light.modules():
        own = {k: h for k, h in module._forward_hooks.items() if "output_capturing" not in (getattr(h, "__module__", "") or "")}
        module._forward_hooks = OrderedDict(own)
        vars(module).pop("_output_capturing_hooks_installed", None)
    return light


def _generate(file: str, new_tokens: int, threads: int, modules: list[str]) -> None:
    """Runs in the fresh process, and prints what it found."""
    torch.set_num_threads(threads)
    for name in modules:
        importlib.import_module(name)
    row = {"imports_mb": peak_mb()}
    # no mmap: every weight counts, also one that this run happens not to touch
    model, inputs = torch.load(file, weights_only=False)
    row["load_mb"] = peak_mb()
    with torch.device("meta"):  # transformers notes at construction which outputs a class can record; LLaVA needs that
        type(model)(model.config)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        reset = True
    except (OSError, AttributeError):
        reset = False
    with torch.no_grad():
        if model.can_generate():
            model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        else:
            model(**inputs)
    row |= {"peak_mb": peak_mb(), "model_mb": peak_mb() - row["imports_mb"]}
    row["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6 if model.device.type == "cuda" else None
    print(json.dumps({k: v and round(v, 1) for k, v in row.items()} | {"includes_loading": not reset}))
