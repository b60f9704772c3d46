"""Peak memory of a fresh process (notebook 01)."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.measure.timing import cast

# ---- memory of a fresh process


def peak_memory(model: nn.Module, inputs: Mapping, new_tokens: int = 8) -> dict:
    """Peak resident memory, in MB, of a fresh process that loads `model` and generates `new_tokens` tokens.

    "peak_mb" while it generates, "imports_mb" after its imports, "model_mb" the difference: weights, activations, kernels.
    "load_mb" is the peak while the file was read: packed int8 weights exist twice then, which is this file's doing, so the
    mark is reset in between; "includes_loading" is True where the kernel cannot do that, and "peak_mb" is the larger of
    the two. "gpu_mb" is the peak of the GPU's memory, None on a CPU. Raises UserError when the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        job = {"file": str(Path(folder) / "model.pt"), "new_tokens": new_tokens, "threads": torch.get_num_threads()}
        job["modules"] = sorted({type(m).__module__ for m in model.modules()} - {"__main__"})
        try:
            torch.save((_light(model), cast(model, inputs)), job["file"])
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, OSError) as e:
            raise UserError(
                f"peak_memory: cannot write this model to a file ({last_line(str(e))}); free disk or unhook it"
            ) from e
        code = f"{inspect.getsource(_child)}\n_child({json.dumps(job)!r})"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # the same packages, ours too
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        why = last_line(done.stderr) or "out of memory?"
        raise UserError(f"peak_memory: the fresh process ended with {done.returncode}: {why}; try a smaller model or input")
    return json.loads(last_line(done.stdout))


def _light(model: nn.Module) -> nn.Module:
    """A copy that shares the weights and pickles: no processor, and none of the local functions that transformers hooks into
    a model at its first call, and again where they are missing."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if hasattr(model, "processor"):
        shared[id(model.processor)] = None
    light = copy.deepcopy(model, shared)
    for module in light.modules():
        own = {k: h for k, h in module._forward_hooks.items() if "output_capturing" not in (getattr(h, "__module__", "") or "")}
        module._forward_hooks = OrderedDict(own)
        vars(module).pop("_output_capturing_hooks_installed", None)
    return light


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _child(job):
    """Runs alone in a fresh interpreter, from its source: it can use nothing of this file."""
    import ctypes
    import gc
    import importlib
    import json
    import sys

    import torch

    def peak():
        try:  # not ru_maxrss: on Linux a child inherits its parent's peak in it; VmHWM starts anew at exec
            with open("/proc/self/status") as f:
                return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

    job = json.loads(job)
    torch.set_num_threads(job["threads"])
    for name in job["modules"]:
        importlib.import_module(name)
    row = {"imports_mb": peak()}
    # no mmap: every weight counts, also one that this run happens not to touch
    model, inputs = torch.load(job["file"], weights_only=False)
    row["load_mb"] = peak()
    with torch.device("meta"):  # transformers notes at construction which outputs a class can record; LLaVA needs that
        type(model)(model.config)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        reset = True
    except (OSError, AttributeError):
        reset = False
    with torch.no_grad():
        if model.can_generate():
            model.generate(**inputs, max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"], do_sample=False)
        else:
            model(**inputs)
    row |= {"peak_mb": peak(), "model_mb": peak() - row["imports_mb"]}
    row["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6 if model.device.type == "cuda" else None
    print(json.dumps({k: v and round(v, 1) for k, v in row.items()} | {"includes_loading": not reset}))
