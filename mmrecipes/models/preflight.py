"""What is looked at before a model is read or written: weight files, free memory, the place to write to."""

import contextlib
import json
import math
import re
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from mmrecipes.errors import UserError, one_line


def read_json(path: Path) -> dict:
    """The JSON object in a file; UserError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({one_line(e, 80)}); get a fresh copy") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(found).__name__}; get a fresh copy")
    return found


def weight_bytes(path: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the weights once loaded as `dtype` (None: as saved), from the files' headers; UserError if one is broken."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index}: names no weights; download it again")
        files = [path / str(f) for f in sorted(set(shards.values()))]
    elif not files[0].is_file():
        cure = "model.safetensors was expected: download it again"
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            cure = "convert the pickled weights on a machine that trusts them: from_pretrained(DIR).save_pretrained(NEW_DIR)"
        raise UserError(f"{path}: no *.safetensors weights; {cure}")
    bits = {"BOOL": 8} | {kind: 8 * dtype.itemsize for kind in ("F64", "F32", "F16", "BF16") if dtype}
    tensors = [t for file in files for t in _header(file)]
    # the other dtypes name their bits: I64, U8, F8_E4M3
    return sum(count * (bits.get(kind) or int(re.search(r"\d+", kind)[0])) // 8 for kind, count in tensors)


def _header(file: Path) -> list[tuple[str, int]]:
    """(dtype, elements) of each tensor of a safetensors file; UserError unless it holds exactly what its header promises."""
    if not file.is_file():
        raise UserError(f"{file}: missing, though the index names it; download it again")
    with file.open("rb") as f:
        if f.read(8) == b"version ":
            raise UserError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    try:
        with safe_open(file, "numpy") as f:
            tensors = [f.get_slice(name) for name in f.keys()]  # noqa: SIM118
            return [(t.get_dtype(), math.prod(t.get_shape())) for t in tensors]
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{file}: truncated or corrupted ({one_line(e, 80)}); download it again") from e


def free_memory(device: torch.device | str = "cpu", cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be taken on `device`; on a CPU the machine's or, if less, the container's (cgroup v1 or v2).
    >>> free_memory() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    old_names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    for limit, used, stat in (("memory.max", "memory.current", "memory.stat"), old_names):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
            # `used` counts the page cache, which the kernel gives back when asked
            cache = re.search(r"^inactive_file (\d+)", (cgroup / stat).read_text(), re.MULTILINE)
            free = min(free, left + int(cache[1] if cache else 0))
    return free


def check_memory(name: str | Path, weights: int, dtype: torch.dtype | str, device: torch.device) -> None:
    """UserError unless `weights` bytes fit into the free memory of `device`, and of the CPU, where they are read first."""
    need = 1.2 * weights  # a fifth more, for activations
    for place in {"cpu", str(device)}:
        free = free_memory(place)
        if need > free:
            what = f"about {need / 1e9:.1f} GB are needed in {str(dtype).removeprefix('torch.')}"
            cure = ("pass dtype='bfloat16', or " if dtype == torch.float32 else "") + "take a smaller model"
            raise UserError(f"{name}: {what}, and {free / 1e9:.1f} GB are free on {place}: {cure}")
