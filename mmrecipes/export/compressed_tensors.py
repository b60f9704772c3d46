"""A checkpoint in the compressed-tensors format, which vLLM serves and transformers loads, checked against our own rounding.

The linear layers of the language model are rounded: to 4 bits in groups of 32 ("w4a16"), to int8 a channel with activations
rounded token by token ("w8a8"), or what was rounded to 4 bits before in 4 bits and the rest in int8 ("mixed"). Vision encoder,
connector, embeddings and head stay in bf16: the config's `ignore` names them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmrecipes import quiet
from mmrecipes.errors import ParityError, UserError, require
from mmrecipes.models import loading, modules
from mmrecipes.models.prompts import chat
from mmrecipes.models.saving import directory_aside
from mmrecipes.quantize.groups import GROUP, fake_quantize, group_scales, grouped, on_grid

RUNTIME = "compressed-tensors"
PRECISIONS = ("w4a16", "w8a8", "mixed")
BITS = {"w4a16": 4, "w8a8": 8}
# relative error of the first token's logits, in float32 on both sides: W4A16 differs in the order of sums alone, but a last bit
# can put an activation of W8A8 on the next of its 255 levels
TOLERANCE = {"w4a16": 1e-4, "w8a8": 0.02, "mixed": 0.02}


def write(model: nn.Module, out: str | Path, precision: str, shown: Sequence[list[Image.Image]]) -> Path:
    """Write `model` (float32) to directory `out`, all or nothing, if transformers then answers `shown`, the images of one
    conversation each, as `rounded` does. Returns `out`. Weights that were rounded to 4 bits before (quantize.calibrate or
    apply_plan, in groups of 32) keep their levels; scales are stored in bf16. Raises UserError, ParityError, ImportError.
    """
    require("compressed_tensors", extra="vllm")
    schemes = layer_schemes(model, precision)
    with directory_aside(out) as aside, quiet.native_stderr():  # the library's progress bars cannot be switched off
        _save(model, schemes, aside)
        _check(rounded(model, schemes), loading.load(aside), shown, TOLERANCE[precision])
    return Path(out).expanduser().resolve()


def layer_schemes(model: nn.Module, precision: str) -> dict[str, str]:
    """{linear layer of the language model: "w4a16" or "w8a8"}. UserError for another precision or a model it does not fit."""
    name, part = type(model).__name__, modules.part_of(model)
    if precision not in PRECISIONS:
        raise UserError(f"precision for {RUNTIME}: {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if type(model).__module__.split(".")[0] != "transformers":
        raise UserError(f"export: {name} has code of its own, which {RUNTIME}'s readers lack; use onnx or openvino")
    layers = {n: layer for n, layer in modules.linears(model) if part[f"{n}.weight"] == "language"}
    four = {n: precision == "w4a16" or (precision == "mixed" and on_grid(layer.weight)) for n, layer in layers.items()}
    for n, layer in layers.items():
        if four[n] and layer.in_features % GROUP:
            why = f"{n} has {layer.in_features} inputs, which groups of {GROUP} do not divide"
            raise UserError(f"export: {why}; use precision='w8a8'")
    return {n: "w4a16" if four[n] else "w8a8" for n in layers}


def scales(weight: Tensor, scheme: str) -> Tensor:
    """The scale of each group or channel of `weight` (out, in): (out, groups), float32 that bf16 can hold. UserError where the
    weight is not finite."""
    rows = grouped(weight.detach())
    found = group_scales(weight, 4) if scheme == "w4a16" else rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return found.bfloat16().float()


def ignored(model: nn.Module) -> list[str]:
    """What the config says stays in bf16: a pattern for each part but the language model, whatever a reader calls its parents,
    and the name of each linear layer outside all parts.
    >>> ignored(model)
    ['re:.*vision_model.*', 're:.*connector.*', 're:.*lm_head.*']
    """
    names = {module: name for name, module in model.named_modules()}
    tops = [names[module] for part, module in modules.nested_parts(model) if part != "language"]
    outer = [n for n in tops if not any(n.startswith(f"{other}.") for other in tops)]
    patterns = [f"re:.*{re.escape(n.rpartition('.')[2])}.*" for n in dict.fromkeys(outer)]
    chosen = layer_schemes(model, "w8a8")
    rest = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen]
    return patterns + [n for n in rest if not any(re.match(p[3:], n) for p in patterns)]


def config_groups(schemes: dict[str, str]) -> dict[str, object]:
    """The config's groups of layers: all linear ones where there is one scheme, else by the end of their names, which readers
    that nest the language model in another way share."""
    from compressed_tensors.quantization import preset_name_to_scheme

    groups = {}
    for scheme in dict.fromkeys(schemes.values()):
        own = [n for n, s in schemes.items() if s == scheme]
        ends = [f"re:.*{re.escape(re.sub(r'^.*?(?=layers)', '', n))}$" for n in own]
        groups[scheme] = preset_name_to_scheme(scheme.upper(), ["Linear"] if len(own) == len(schemes) else ends)
        if scheme == "w4a16":
            groups[scheme].weights.group_size = GROUP
    return groups


@torch.no_grad()
def _save(model: nn.Module, schemes: dict[str, str], folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor, compress_module
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    small, ignore = modules.clone(model), ignored(model)
    config = QuantizationConfig(config_groups=config_groups(schemes), ignore=ignore, quantization_status="frozen")
    apply_quantization_config(small, config)
    for name, scheme in schemes.items():
        layer = small.get_submodule(name)
        layer.weight_scale.copy_(scales(layer.weight, scheme))
        compress_module(layer)
    compressor = ModelCompressor.from_pretrained_model(small)
    written = compressor.quantization_config
    written.ignore, written.quantization_status = ignore, QuantizationStatus.COMPRESSED
    small.to(torch.bfloat16).save_pretrained(folder)
    compressor.update_config(folder)
    model.processor.save_pretrained(folder)


@torch.no_grad()
def rounded(model: nn.Module, schemes: dict[str, str]) -> nn.Module:
    """What the checkpoint computes, in float32 and by our own rounding: a copy with all weights on the values that are stored,
    and with the inputs of "w8a8" layers rounded token by token.
    """
    small = modules.clone(model)
    for p in small.parameters():
        p.copy_(p.bfloat16())
    for name, scheme in schemes.items():
        layer, weight = small.get_submodule(name), model.get_submodule(name).weight
        scale = scales(weight, scheme)
        size = weight.shape[1] // scale.shape[1]
        layer.weight.copy_(fake_quantize(grouped(weight, size), scale.view(-1, 1), BITS[scheme]).view_as(weight))
        if scheme == "w8a8":
            layer.register_forward_pre_hook(_round_tokens)
    return small


def _round_tokens(_: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """int8, the scale such that the largest value of a token lies between the levels 127 and 128, as the library has it."""
    scale = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.5
    return (fake_quantize(args[0], scale, 8), *args[1:])


@torch.inference_mode()
def _check(expected: nn.Module, found: nn.Module, shown: Sequence[list[Image.Image]], tolerance: float) -> float:
    """The largest relative error of the first token's logits; ParityError beyond `tolerance` or where it is not finite."""
    errors = []
    for images in shown:
        try:
            inputs = chat(expected, images or None, "What is in this picture?")
        except UserError:  # some processors (PaliGemma's) take no text without an image
            if images:
                raise
            continue
        wanted, logits = (m(**inputs).logits[0, -1] for m in (expected, found))
        errors.append(((logits - wanted).norm() / wanted.norm()).item())
    if not all(error <= tolerance for error in errors):
        away = f"{max(errors):.2g} (relative) away from those of the same rounding in PyTorch, more than {tolerance}"
        raise ParityError(f"the checkpoint's logits are {away}: it is broken, and was not kept")
    return max(errors)
