"""A checkpoint that transformers loads by itself: 4-bit NormalFloat of bitsandbytes, the rest in bf16."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError, one_line, require
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure import machine
from mmrecipes.models import saving
from mmrecipes.models.modules import linears
from mmrecipes.models.processors import load_processor

BLOCK = 64  # weights that share a scale; the scales are packed to 8 bits themselves ("double quantization")
OUTPUTS = 32  # that bitsandbytes' kernel for CPUs with AVX512-BF16 takes at once ("N must be divisible by block_n")


def nf4_rounded(weight: Tensor) -> Tensor:
    """`weight` rounded to NF4 and back: QLoRA, arXiv:2305.14314."""
    from bitsandbytes import functional

    q, state = functional.quantize_4bit(weight.detach(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(q, state).to(weight.dtype)


def nf4_bytes(weight: Tensor) -> int:
    """Bytes of one weight in NF4: 4 bits, a scale of 8 bits a block, and what unpacking and the file's index need."""
    return -(-weight.numel() // 2) + -(-weight.numel() // BLOCK) + 2100


def write_nf4(model: nn.Module, four: set[str], folder: Path) -> None:
    """Save `model` to `folder`: linear layers in `four` as NF4, all else in bf16, its processor beside it. Raises UserError.
    Layers of `four` that are not in `can_nf4` stay in bf16, with a warning."""
    from transformers import BitsAndBytesConfig

    require("accelerate", "bitsandbytes")
    if odd := sorted(four - can_nf4(model)):
        cannot = f"no multiple of {BLOCK} inputs and {OUTPUTS} outputs, which the kernels need"
        warnings.warn(f"{len(odd)} layers stay in bf16, such as {odd[0]}: {cannot}", stacklevel=2)
    four = four - set(odd)
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in four]  # transformers skips no other
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped, **nf4)
    with temporary_directory(folder.parent) as aside:
        saving.save(model, model.processor, aside / "whole", torch.bfloat16)
        small = _from(aside / "whole", dtype=torch.bfloat16, **({"quantization_config": config} if four else {}))
        small.save_pretrained(folder)
    model.processor.save_pretrained(folder)


def load_nf4(folder: Path) -> nn.Module:
    """The checkpoint in `folder`, its processor attached; in float32 where the CPU has no instructions for bf16."""
    model = _from(folder, dtype="auto")
    if not any("bf16" in c for c in machine.environment()["capabilities"]):
        for p in filter(torch.is_floating_point, model.parameters()):  # from_pretrained(dtype=...) would only reach some
            p.data = p.data.float()
        for layer in model.modules():
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = torch.float32
    model.processor = load_processor(folder)
    return model.eval()


def to_nf4_(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replace the linear layers `names` by bitsandbytes' own in NF4, which compute in the dtype that their weights had."""
    require("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in names:
        layer = model.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        small = Linear4bit(layer.in_features, layer.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta")
        small.weight = Params4bit(weight.detach(), requires_grad=False, blocksize=BLOCK, quant_type="nf4")
        small.bias = bias
        model.set_submodule(name, small.to(weight.device).eval())  # moving it packs it
    return model


def can_nf4(model: nn.Module) -> set[str]:
    """Names of the linear layers whose inputs divide into NF4's blocks, and their outputs into the kernel's."""
    return {name for name, layer in linears(model) if takes_nf4(layer)}


def takes_nf4(layer: nn.Linear) -> bool:
    """Whether its inputs divide into NF4's blocks, and its outputs into the kernel's."""
    return layer.in_features % BLOCK == 0 and layer.out_features % OUTPUTS == 0


def _from(folder: Path, **options) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(folder, **options)
    except Exception as e:  # the libraries' own kinds, without a common parent
        raise UserError(f"{folder}: transformers and bitsandbytes cannot load it ({one_line(e)}); try --runtime onnx") from e
