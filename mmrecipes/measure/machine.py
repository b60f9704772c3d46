"""What a number depends on besides the model: CPU, instruction sets, threads, versions; and this machine's peaks."""

import contextlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from mmrecipes.measure.timing import timed

CAPABILITIES = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def environment() -> dict:
    """What a number depends on besides the model: date, commit, CPU, threads, capabilities, memory, versions.
    No host name and no path. `commit` is None where this package does not lie in a git repository.
    >>> environment()["threads"] == torch.get_num_threads()
    True
    """
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    first = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.split("\n\n")[0].splitlines())}  # a core's
    flags = (first.get("flags") or first.get("Features") or "").split()  # x86, ARM
    memory = psutil.virtual_memory().total
    for limit in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):  # a container's share
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    found["cpu"] = first.get("model name") or platform.processor() or platform.machine()
    found |= {"physical_cores": psutil.cpu_count(logical=False), "logical_cores": psutil.cpu_count()}
    found["threads"] = torch.get_num_threads()
    found["capabilities"] = ["neon" if c == "asimd" else c for c in CAPABILITIES if c in flags]
    found |= {"torch_capability": torch.backends.cpu.get_cpu_capability(), "memory_gb": round(memory / 1e9, 1)}
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    found["transformers"] = importlib.metadata.version("transformers")
    return found | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def commit() -> str | None:
    """The commit of the repository that tracks this file, "+dirty" after it where files differ; None where there is none."""
    here = Path(__file__)
    git = partial(subprocess.run, check=True, capture_output=True, text=True, cwd=here.parent)
    try:  # an installed copy may lie inside somebody else's repository: ours is the one that tracks this file
        git(["git", "ls-files", "--error-unmatch", here.name])
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        made = [f":(top,exclude){path}" for path in ("README.md", "results")]  # what measuring writes
        return commit + ("+dirty" if git(["git", "status", "--porcelain", "--", ":(top)", *made]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.random.fork_rng(devices=[])  # how many matrices fit into the time differs, and what others draw later must not
def machine_peaks(seconds: float = 0.15, device: str = "cpu") -> dict:
    """Matrix peaks "fp32", "bf16", "int8" in GFLOP/s and memory "bandwidth" in GB/s, measured here in about a second.
    Each peak is the best of what fits into `seconds`: square matrices of 128, doubling up to 1,024 (8,192 on a GPU) while one
    size more fits. "int8_kernel" names the fastest int8 kernel here; "bandwidth" counts bytes read by the sum of 256 MB.
    >>> machine_peaks(0.01)["fp32"] > 0
    True
    """

    def best(make: Callable[[int], Callable]) -> float:
        n, begin, top = 128, time.perf_counter(), 0.0
        while True:
            run = make(n)
            run()  # warm-up: kernels are chosen and packed at first use
            took = min(timed(run) for _ in range(3))
            top, left = max(top, 2 * n**3 / took / 1e9), seconds - (time.perf_counter() - begin)
            if n < (1024 if device == "cpu" else 8192) and 8 * 6 * took < left:
                n *= 2
            elif left < 3 * took:
                return round(top, 2)

    def floats(dtype: torch.dtype, n: int) -> Callable:
        return partial(torch.matmul, *(torch.randn(n, n, device=device).to(dtype) for _ in range(2)))

    def bytes_(n: int, low: int = -127) -> Tensor:
        return torch.randint(low, 128, (n, n), dtype=torch.int8, device=device)

    def onednn(n: int) -> Callable:  # what a compiled int8 linear layer calls on a CPU
        weight = torch.ops.onednn.qlinear_prepack(bytes_(n), [n, n])
        rest = (weight, torch.ones(n), torch.zeros(n, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "")
        return partial(torch.ops.onednn.qlinear_pointwise, bytes_(n, 0).to(torch.uint8), 1.0, 0, *rest)

    int8, kernels = {}, {"torch._int_mm": lambda n: partial(torch._int_mm, bytes_(n), bytes_(n)), "onednn.qlinear": onednn}
    for name, make in kernels.items():
        with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # not built for this machine
            int8[name] = best(make)
    # parts of a buffer larger than the cache, each read in about a millisecond: the best one was not interrupted
    slices = torch.ones(64 * 2**20, device=device).view(16 if device == "cpu" else 1, -1)
    bandwidth = slices[0].nbytes / min(timed(part.sum) for _ in range(4) for part in slices) / 1e9
    peaks = {name: best(partial(floats, dtype)) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    peaks |= {"int8": max(int8.values(), default=0.0), "int8_kernel": max(int8, key=int8.get, default=None)}
    return peaks | {"bandwidth": round(bandwidth, 2), "threads": torch.get_num_threads(), "device": device}
