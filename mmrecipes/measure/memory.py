"""Peak memory of a fresh process that generates (notebook 01)."""

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
    "load_mb" is the peak while the file is read, when packed int8 weights exist twice: the mark is reset after it, but where
    the kernel cannot ("includes_loading"). "gpu_mb" is the GPU's peak, None on a CPU. Raises UserError when the process dies.
    >>> peak_memory(model, inputs, 1)["model_mb"] > 0
    True
    """
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        file, modules = f"{folder}/model.pt", sorted({type(m).__module__ for m in model.modules()} - {"__main__"})
        try:
            torch.save((_picklable(model), cast(model, inputs)), file)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, OSError) as e:
            why = last_line(str(e))
            raise UserError(f"peak_memory: cannot write this model to a file ({why}); free disk or unhook it") from e
        job = (file, new_tokens, torch.get_num_threads(), modules)
        return run_fresh(f"from mmrecipes.measure.memory import _generate\n_generate(*{job!r})", what="peak_memory")


def _picklable(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, without processor and without the local functions that transformers hooks into a model
    at its first call, and again where they are missing."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    light = copy.deepcopy(model, shared | {id(getattr(model, "processor", None)): None})
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
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False} if model.can_generate() else {}
    with torch.no_grad():
        (model.generate if lengths else model)(**inputs, **lengths)
    row |= {"peak_mb": peak_mb(), "model_mb": peak_mb() - row["imports_mb"]}
    row["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6 if model.device.type == "cuda" else None
    print(json.dumps({k: v and round(v, 1) for k, v in row.items()} | {"includes_loading": not reset}))
