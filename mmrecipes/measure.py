"""What a model weighs and how long it takes: bytes, peak memory, time by stage, and the most that a precision can give.

Explained in notebook 01. Times are milliseconds unless a name says otherwise.
"""

from __future__ import annotations

import copy
import datetime
import functools
import gc
import importlib.metadata
import inspect
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from mmrecipes import models as rooms
from mmrecipes.errors import UserError

STAGES = ("vision", "connector", "prefill", "decode")
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # a weight; scales left out, so that a bound stays a bound
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".onnx_data", ".data", ".ort", ".xml", ".pte", ".gguf", ".tflite"}
CAPABILITIES = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


# ---- the machine


def environment() -> dict:
    """What a number depends on besides the model: date, commit, CPU, threads, capabilities, memory, versions.

    No host name and no path. `commit` is None where this package does not lie in a git repository.
    """
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    first = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.split("\n\n")[0].splitlines())}  # a core's
    flags = (first.get("flags") or first.get("Features") or "").split()  # x86, ARM
    memory = psutil.virtual_memory().total
    for limit in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):  # a container's share
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": first.get("model name") or platform.processor() or platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "capabilities": ["neon" if c == "asimd" else c for c in CAPABILITIES if c in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    here = Path(__file__)
    git = functools.partial(subprocess.run, check=True, capture_output=True, text=True, cwd=here.parent)
    try:  # an installed copy may lie inside somebody else's repository: ours is the one that tracks this file
        git(["git", "ls-files", "--error-unmatch", here.name])
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        made = [f":(top,exclude){path}" for path in ("README.md", "results")]  # what measuring writes
        return commit + ("+dirty" if git(["git", "status", "--porcelain", "--", ":(top)", *made]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_peaks(seconds: float = 0.15, device: str = "cpu") -> dict:
    """Matrix peaks "fp32", "bf16", "int8" in GFLOP/s and memory "bandwidth" in GB/s, measured here in about a second.

    Each peak is the best of what fits into `seconds`: square matrices of 128, doubling up to 1,024 (8,192 on a GPU) while
    one size more fits, as bf16 without bf16 instructions is slow. "int8_kernel" names the faster of the int8 kernels that
    work here; "bandwidth" counts the bytes read by the sum of 256 MB of float32.
    """

    def best(make: Callable[[int], Callable]) -> float:
        n, begin, top = 128, time.perf_counter(), 0.0
        while True:
            run = make(n)
            run()  # warm-up: kernels are chosen and packed at first use
            took = min(_timed(run) for _ in range(3))
            top, left = max(top, 2 * n**3 / took / 1e9), seconds - (time.perf_counter() - begin)
            if n < (1024 if device == "cpu" else 8192) and 8 * 6 * took < left:
                n *= 2
            elif left < 3 * took:
                return round(top, 2)

    def floats(dtype: torch.dtype, n: int) -> Callable:
        return functools.partial(torch.matmul, *(torch.randn(n, n, device=device).to(dtype) for _ in range(2)))

    def bytes_(n: int, low: int = -127) -> Tensor:
        return torch.randint(low, 128, (n, n), dtype=torch.int8, device=device)

    def onednn(n: int) -> Callable:  # what a compiled int8 linear layer calls on a CPU
        weight = torch.ops.onednn.qlinear_prepack(bytes_(n), [n, n])
        rest = (weight, torch.ones(n), torch.zeros(n, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "")
        return functools.partial(torch.ops.onednn.qlinear_pointwise, bytes_(n, 0).to(torch.uint8), 1.0, 0, *rest)

    int8, kernels = (
        {},
        {"torch._int_mm": lambda n: functools.partial(torch._int_mm, bytes_(n), bytes_(n)), "onednn.qlinear": onednn},
    )
    for name, make in kernels.items():
        try:
            int8[name] = best(make)
        except (AttributeError, NotImplementedError, RuntimeError):  # not built for this machine
            continue
    # parts of a buffer larger than the cache, each read in about a millisecond: the best one was not interrupted
    slices = torch.ones(64 * 2**20, device=device).view(16 if device == "cpu" else 1, -1)
    return {
        "fp32": best(functools.partial(floats, torch.float32)),
        "bf16": best(functools.partial(floats, torch.bfloat16)),
        "int8": max(int8.values(), default=0.0),
        "int8_kernel": max(int8, key=int8.get, default=None),
        "bandwidth": round(slices[0].nbytes / min(_timed(part.sum) for _ in range(4) for part in slices) / 1e9, 2),
        "threads": torch.get_num_threads(),
        "device": device,
    }


# ---- bytes


def parameters(model: nn.Module) -> list[dict]:
    """Rows of part, dtype, parameters, bytes: what the model holds in memory, quantized modules and buffers included.

    Tied weights count once, where they are met first. Scales, zero points and code books count as bytes, not as parameters;
    buffers have rows of their own, with 0 parameters.
    """
    owner, seen, rows = {m: part for part, top in _placed(model) for m in top.modules()}, set(), {}
    for module in model.modules():
        for key, dtype, count, size in _own(module):
            if key not in seen:
                seen.add(key)
                row = rows.setdefault((owner.get(module, "other"), dtype), {"parameters": 0, "bytes": 0})
                row["parameters"] += count
                row["bytes"] += size
    order = [*rooms.parts(model), "connector", "other"]
    keys = sorted(rows, key=lambda k: (order.index(k[0]), k[1]))
    return [{"part": part, "dtype": dtype, **rows[part, dtype]} for part, dtype in keys]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers in memory."""
    return sum(row["bytes"] for row in parameters(model))


def disk_bytes(model_or_dir: nn.Module | str | Path) -> int:
    """Bytes that the weights take as files: of a directory its weight files, of a model what it really writes.

    A model is written to a temporary directory, as safetensors, or with torch.save where its state holds more than plain
    tensors. Raises UserError for a directory without weight files.
    """
    if not isinstance(model_or_dir, nn.Module):
        root = Path(model_or_dir)
        found = [f for f in root.rglob("*") if f.suffix in WEIGHT_FILES and f.is_file()]
        sizes = [f.stat().st_size for f in found if not any(p.startswith(".") for p in f.relative_to(root).parts)]
        if not sizes:
            raise UserError(
                f"disk_bytes: {root} holds no weight files ({', '.join(sorted(WEIGHT_FILES))}); give a model directory"
            )
        return sum(sizes)
    state = model_or_dir.state_dict()
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        file = Path(folder) / "weights"
        if all(type(v) in (Tensor, nn.Parameter) and not v.is_quantized for v in state.values()):
            from safetensors.torch import save_model

            save_model(model_or_dir, str(file))  # writes tied weights once
        else:
            torch.save(state, file)
        return file.stat().st_size


def _placed(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(part, module), largest first, so that the innermost wins: a Qwen-VL's connector lies inside its vision tower."""
    found = rooms.parts(model)
    within = (getattr(model, "model", model), found["vision"])
    helpers = [m for w in within for n in rooms.HELPERS if (m := getattr(w, n, None)) is not None]
    helpers = [m for h in helpers for m in (h if isinstance(h, nn.ModuleList) else [h])]  # a list is never called itself
    return sorted([*found.items(), *(("connector", h) for h in helpers)], key=lambda p: -len(list(p[1].modules())))


def _own(module: nn.Module) -> Iterator[tuple[object, str, int, int]]:
    """What `module` itself holds, its weight first: (identity, dtype, parameters, bytes)."""
    if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):  # torch.ao: not in parameters()
        bias = module.bias() if hasattr(module, "bias") else None
        yield from (((id(module), i), *_weigh(t)) for i, t in enumerate((module.weight(), bias)) if t is not None)
    yield from ((_identity(t), *_weigh(t)) for t in module._parameters.values() if t is not None)
    yield from ((_identity(t), f"{_dtype(t)} (buffer)", 0, t.nbytes) for t in module._buffers.values() if t is not None)


def _identity(tensor: Tensor) -> object:
    """Equal for two names of the same memory. Tensor subclasses and meta tensors have no memory to point at."""
    place = tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0
    return (place, tensor.storage_offset(), tensor.numel()) if place else id(tensor)


def _weigh(tensor: Tensor) -> tuple[str, int, int]:
    """(dtype, parameters, bytes) of a weight, with all that a quantized one carries along."""
    state, scales = getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)
    if state is not None:  # bitsandbytes 4-bit: two weights a byte, and a scale a block
        extra = sum(v.nbytes for v in state.as_dict().values() if isinstance(v, Tensor))
        return state.quant_type, state.shape.numel(), tensor.nbytes + extra
    if hasattr(tensor, "__tensor_flatten__"):  # torchao
        inner = _inner(tensor)
        largest = max(inner, key=lambda t: t.nbytes)
        bits = round(8 * largest.nbytes / max(tensor.numel(), 1))
        dtype = _dtype(largest) if largest.is_floating_point() else f"int{bits}"
        return dtype, tensor.numel(), sum(t.nbytes for t in inner)
    if tensor.is_quantized:
        per_tensor = tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        extra = 16 if per_tensor else tensor.q_per_channel_scales().nbytes + tensor.q_per_channel_zero_points().nbytes
        return _dtype(tensor), tensor.numel(), tensor.untyped_storage().nbytes() + extra
    return _dtype(tensor), tensor.numel(), tensor.nbytes + (scales.nbytes if scales is not None else 0)  # LLM.int8 has SCB


def _inner(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [t for name in tensor.__tensor_flatten__()[0] for t in _inner(getattr(tensor, name))]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.").removeprefix("q")


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
                f"peak_memory: cannot write this model to a file ({_last_line(str(e))}); free disk or unhook it"
            ) from e
        code = f"{inspect.getsource(_child)}\n_child({json.dumps(job)!r})"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}  # the same packages, ours too
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        why = _last_line(done.stderr) or "out of memory?"
        raise UserError(f"peak_memory: the fresh process ended with {done.returncode}: {why}; try a smaller model or input")
    return json.loads(_last_line(done.stdout))


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


def _last_line(text: str) -> str:
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


# ---- time


def wall(fns: dict[str, Callable], repeats: int = 7, warmup: int = 2) -> dict[str, dict]:
    """Milliseconds of each function: "median", "low" and "high" (the quartiles).

    Interleaved: each round calls every function once, in rotating order, so that a change in the machine's mood hits all.
    """
    runs = {name: lambda fn=fn: {"ms": 1e3 * _timed(fn)} for name, fn in fns.items()}
    return {name: row["ms"] for name, row in _interleaved(runs, repeats, warmup).items()}


def latency(
    models: dict[str, nn.Module], inputs: Mapping, new_tokens: int = 8, repeats: int = 7, warmup: int = 2
) -> dict[str, dict]:
    """Milliseconds of each stage of each variant: "median", "low" and "high" (the quartiles), interleaved as in `wall`.

    "vision" and "connector" are exclusive of each other; "prefill" is the rest of the first forward pass; "ttft" is all
    three (the image processor and tokenizer not included); "decode" is one further token with the KV cache, the mean of
    `new_tokens`. "tokens_per_s" is the rate of the decode stage, over the whole batch. Inputs are cast to each variant's dtype.
    """
    if not models or new_tokens < 1:
        raise UserError(f"latency: {len(models)} models, new_tokens={new_tokens}: give one model and one token or more")

    def once(model: nn.Module, own: dict) -> dict[str, float]:
        spent = _walk(model, own, new_tokens, _clock)
        decode = spent["decode"] / new_tokens
        ttft = sum(spent[stage] for stage in ("vision", "connector", "prefill"))
        return spent | {"decode": decode, "ttft": ttft, "tokens_per_s": 1e3 * len(own["input_ids"]) / decode}

    return _interleaved({name: functools.partial(once, m, cast(m, inputs)) for name, m in models.items()}, repeats, warmup)


def cast(model: nn.Module, inputs: Mapping) -> dict:
    """The inputs on the model's device, floating ones in the dtype of its first floating parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def to(v: object) -> object:
        return v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v

    return {k: to(v) for k, v in inputs.items()}


def _interleaved(runs: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int) -> dict[str, dict[str, dict]]:
    if repeats < 1 or warmup < 0:
        raise UserError(f"timing: repeats={repeats}, warmup={warmup}: give at least 1 repeat and 0 warm-ups")
    names, samples, was_on = list(runs), {name: [] for name in runs}, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            turn = i % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                samples[name].append(runs[name]())
    finally:
        if was_on:
            gc.enable()
    return {name: {key: _spread([s[key] for s in drawn[warmup:]]) for key in drawn[0]} for name, drawn in samples.items()}


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def _clock() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def _timed(fn: Callable) -> float:
    """Seconds."""
    begin = _clock()
    fn()
    return (_clock() - begin) / 1e3


def _walk(model: nn.Module, inputs: dict, new_tokens: int, read: Callable[[], float | np.ndarray]) -> dict:
    """Greedy generation by hand, at any batch size: how far `read()`, a clock or a counter, went on in each stage."""
    if not getattr(model, "can_generate", bool)():
        raise UserError(f"measure: {type(model).__name__} does not generate text; time its parts with measure.wall instead")
    stack, spent = ["prefill"], dict.fromkeys(STAGES, 0.0)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}  # as generate()

    def charge() -> None:
        nonlocal last
        now = read()
        spent[stack[-1]] += now - last
        last = now

    def enter(stage: str, *_: object) -> None:
        charge()
        stack.append(stage)

    def leave(*_: object) -> None:
        charge()
        stack.pop()

    inside = [(module, functools.partial(enter, part)) for part, module in _placed(model) if part in STAGES]
    hooks = [h for m, go in inside for h in (m.register_forward_pre_hook(go), m.register_forward_hook(leave))]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.all():  # a Qwen-VL makes of a mask the positions of all tokens, not of the new one
        mask = None
    try:
        with torch.no_grad():
            last = read()
            out = model(**inputs, use_cache=True, **keep)
            token = out.logits[:, -1:].argmax(-1)
            charge()
            stack[0] = "decode"
            for _ in range(new_tokens):
                mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            charge()
    finally:
        for hook in hooks:
            hook.remove()
    return spent


# ---- where time goes, and what a precision can give


def stage_budget(model: nn.Module, inputs: Mapping, new_tokens: int = 8) -> list[dict]:
    """Rows of stage, ms, share (of the total), calls, tokens, weight_bytes (read, all calls), gflop, gflop_per_s.

    Decode is the sum over `new_tokens` tokens. Vision's tokens are its output positions. Median of three runs.
    """
    own = cast(model, inputs)
    found = _interleaved({"": lambda: _walk(model, own, new_tokens, _clock)}, repeats=3, warmup=1)[""]
    ms, rows = {stage: t["median"] for stage, t in found.items()}, []
    for stage, (flop, _, size, calls, tokens) in _work(model, own, new_tokens).items():
        row = {"stage": stage, "ms": ms[stage], "share": ms[stage] / sum(ms.values()), "calls": int(calls), "tokens": int(tokens)}
        rows.append(row | {"weight_bytes": int(size), "gflop": flop / 1e9, "gflop_per_s": flop / ms[stage] / 1e6})
    return rows


def roofline(model: nn.Module, inputs: Mapping, peaks: dict) -> list[dict]:
    """For each stage and weight precision the least time it can take with the `peaks` of `machine_peaks`.

    Rows of stage (decode: one token), precision, gflop, weight_bytes, bound_ms = max(gflop / peak, bytes / bandwidth),
    bound_by ("compute" or "memory"), at_most (times faster than the fp32 bound). The roofline model of Williams,
    Waterman and Patterson, CACM 52(4), 2009. It counts weights only, neither activations nor the KV cache, and takes
    "int4" to compute at the best peak of all, weights unpacked on the way. Weights that stay in the cache can be read
    faster than `bandwidth` says: then a memory bound is not one.
    """
    rows, best = [], max(peaks[p] for p in ("fp32", "bf16", "int8"))
    for stage, (flop, weights, *_) in _work(model, cast(model, inputs), 1).items():
        fp32 = None
        for precision, each in BYTES.items():
            peak = peaks.get(precision, best)
            if not peak:  # no kernel for it here
                continue
            compute, memory = flop / peak / 1e6, each * weights / peaks["bandwidth"] / 1e6
            bound = max(compute, memory)
            fp32 = fp32 or bound
            row = {"stage": stage, "precision": precision, "gflop": flop / 1e9, "weight_bytes": int(each * weights)}
            rows.append(
                row | {"bound_ms": bound, "bound_by": "compute" if compute > memory else "memory", "at_most": fp32 / bound}
            )
    return rows


def _work(model: nn.Module, inputs: dict, new_tokens: int) -> dict[str, tuple]:
    """Of each stage that does any work: FLOP (two a multiply-add), weights read, their bytes, calls, tokens.

    torch's counter sees the operators of a float model. A quantized layer's are foreign to it, and count as the same layer's
    in float: so all precisions of a model have the same FLOP.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:  # torch has no entry for the CPU's kernel
        return sdpa_flop_count(q, (*q[:-2], *k[-2:]), (*q[:-2], *v[-2:]))

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter, counts, begun = FlopCounterMode(display=False, custom_mapping={kernel: attention}), np.zeros(5), {}
    towers = {module for part, module in _placed(model) if part in STAGES}
    held = {m: [(count, size) for _, _, count, size in _own(m)] for m in model.modules()}

    def before(module: nn.Module, args: tuple) -> None:
        begun[module] = counter.get_total_flops()

    def after(module: nn.Module, args: tuple, output: object) -> None:
        weights, size = np.sum(held[module] or [(0, 0)], axis=0)
        width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if width and weights and counter.get_total_flops() == begun[module]:
            counts[0] += 2 * held[module][0][0] * output.numel() / width
        # a look-up reads its rows only
        share = min(1, output.numel() / max(weights, 1)) if hasattr(module, "num_embeddings") else 1
        counts[1:3] += share * weights, share * size
        if module in towers:
            while not isinstance(output, Tensor):
                output = output[0]
            counts[3:] += 1, output.numel() / output.shape[-1]

    watched = [m for m in model.modules() if held[m] or m in towers]
    hooks = [h for m in watched for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        with counter:
            done = _walk(model, inputs, new_tokens, lambda: counts + np.array([counter.get_total_flops(), 0, 0, 0, 0]))
    finally:
        for hook in hooks:
            hook.remove()
    done["prefill"][3:] = 1, inputs["input_ids"].numel()
    done["decode"][3:] = new_tokens, new_tokens * len(inputs["input_ids"])
    return {stage: tuple(v.tolist()) for stage, v in done.items() if np.any(v)}
