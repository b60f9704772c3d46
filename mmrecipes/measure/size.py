"""Bytes: what a model holds in memory, and what its weights take as files."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.interrupt import temporary_directory
from mmrecipes.models import modules

WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".onnx", ".onnx_data", ".data", ".ort", ".xml", ".pte", ".gguf", ".tflite"}


def parameters(model: nn.Module) -> list[dict]:
    """Rows of part, dtype, parameters, bytes: what the model holds in memory, quantized modules and buffers included.
    Tied weights count once, where they are met first. Scales, zero points and code books count as bytes, not as parameters;
    buffers have rows of their own, with 0 parameters.
    >>> [row["part"] for row in parameters(model) if row["parameters"]]
    ['vision', 'connector', 'language']
    """
    owner, seen, rows = modules.owners(model), set(), {}
    for module in model.modules():
        for key, dtype, count, size in held_tensors(module):
            if key not in seen:
                seen.add(key)
                row = rows.setdefault((owner.get(module, "other"), dtype), Counter(parameters=0, bytes=0))
                row.update(parameters=count, bytes=size)
    order = [*modules.parts(model), "connector", "other"]
    keys = sorted(rows, key=lambda k: (order.index(k[0]), k[1]))
    return [{"part": part, "dtype": dtype, **rows[part, dtype]} for part, dtype in keys]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers in memory.
    >>> model_bytes(mmr.quantize.bf16(model)) < 0.6 * model_bytes(model)
    True
    """
    return sum(row["bytes"] for row in parameters(model))


def disk_bytes(model_or_dir: nn.Module | str | Path) -> int:
    """Bytes that the weights take as files: of a directory its weight files, of a model what it really writes.
    A model is written to a temporary directory, as safetensors, or with torch.save where its state holds more than plain
    tensors. Raises UserError for a directory without weight files.
    >>> disk_bytes(data_dir() / "models" / "mini-vlm") < 1e8
    True
    """
    if not isinstance(model_or_dir, nn.Module):
        root = Path(model_or_dir)
        found = [f for f in root.rglob("*") if f.suffix in WEIGHT_FILES and f.is_file()]
        sizes = [f.stat().st_size for f in found if not any(p.startswith(".") for p in f.relative_to(root).parts)]
        if not sizes:
            kinds = ", ".join(sorted(WEIGHT_FILES))
            raise UserError(f"disk_bytes: {root} holds no weight files ({kinds}); give a model directory")
        return sum(sizes)
    state = model_or_dir.state_dict()
    with temporary_directory() as folder:
        file = folder / "weights"
        if all(type(v) in (Tensor, nn.Parameter) and not v.is_quantized for v in state.values()):
            save_model(model_or_dir, str(file))  # writes tied weights once
        else:
            torch.save(state, file)
        return file.stat().st_size


def held_tensors(module: nn.Module) -> Iterator[tuple[object, str, int, int]]:
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
