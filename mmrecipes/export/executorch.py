"""`export.export` for ExecuTorch (XNNPACK): vision.pte and language.pte, for phones and other small devices.

A program plans all its memory ahead, so the KV cache lives inside it and has a fixed length, at most MAX_LENGTH tokens.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mmrecipes import quiet
from mmrecipes.errors import require
from mmrecipes.export import wrappers
from mmrecipes.families.family import Family
from mmrecipes.models import modules
from mmrecipes.quantize import groups

ATTENTION = "mmrecipes_executorch"  # its name among the attentions of transformers
MAX_LENGTH = 2048  # tokens that the cache has room for, unless the model takes fewer


def max_length(model: nn.Module) -> int:
    """Tokens of one conversation, images' included, that an exported `model` takes."""
    return min(MAX_LENGTH, model.config.get_text_config().max_position_embeddings)


def obstacle(model: nn.Module, family: Family) -> str:
    """Why the programs would answer otherwise than `model`, silently: `attend` looks back on all tokens, and knows no mask, no
    window and no further positions; a program takes images of one shape. "" where nothing stands in the way."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if family.free:
        return "its images have any shape, and a program takes one"
    if family.positions:
        return "its tokens have positions in several directions, and a program counts them in one"
    if family.masks:
        return "its image tokens see each other, and ExecuTorch's attention only looks back"
    for window in filter(None, windows):
        if window < max_length(model) and (kinds or not getattr(config, "layer_types", None)):
            return f"its layers look back only {window} tokens, and ExecuTorch's attention knows no windows"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps scores, and ExecuTorch's does not"
    return ""


class ExecutorchLanguage(wrappers.LanguageWithCache):
    """As `LanguageWithCache`, the cache inside: input_ids (1, T), image_features (N, D), cache_length (1,) -> logits (1, 1, V).
    `cache_length` says how many tokens of the cache to keep; what follows them is overwritten.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.config, self.length = model.config.get_text_config(), max_length(model)
        shape = (1, self.length, self.config.num_key_value_heads, modules.head_dim(model, "language"))  # as the kernels take it
        for name in (f"{kind}_{i}" for i in range(self.config.num_hidden_layers) for kind in ("keys", "values")):
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, input_ids: Tensor, image_features: Tensor, cache_length: Tensor) -> Tensor:
        return super().forward(input_ids, image_features, StaticCache(self, cache_length.item(), input_ids.shape[1]))["logits"]


class StaticCache:
    """The cache of an `ExecutorchLanguage`, as its decoder asks for it: whole, while `attend` reads only what is filled."""

    def __init__(self, holder: ExecutorchLanguage, cache_length: int, new: int):
        torch._check(cache_length >= 0)
        torch._check(cache_length + new <= holder.length)
        self.holder, self.cache_length = holder, cache_length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache_length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Put keys and values of the new tokens, (1, heads, T, head_dim), into their places, and give all places."""
        held = tuple(getattr(self.holder, f"{kind}_{layer_idx}") for kind in ("keys", "values"))
        for new, all_places in zip((keys, values), held, strict=True):
            torch.ops.llama.update_cache(new.transpose(1, 2).contiguous(), all_places, self.cache_length)
        return held


def attend(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """ExecuTorch's own attention kernel: query (1, H, T, W), keys and values (1, L, KV heads, W) -> (1, T, H, W)."""
    cache_length = kwargs["position_ids"][0, 0].item()
    torch._check(cache_length >= 0)
    torch._check(cache_length + query.shape[2] <= keys.shape[1])
    query = query.transpose(1, 2).contiguous()
    return torch.ops.llama.custom_sdpa(query, keys, values, cache_length, None, 0.0, True, scaling), None


def write_executorch(model: nn.Module, folder: Path, precisions: Mapping[str, str], runs: Sequence = (), batches=False) -> None:
    """Write both programs to `folder`, each in its precision, of which none looks at `runs`. Raises as `export.export`."""
    require("executorch")
    from torch.export import Dim

    with quiet.native_stderr(), _attention(model):  # its import reports on the CPU of a phone that it does not find
        if any(p != "fp32" for p in precisions.values()):
            model = modules.clone(model)
            for name, part in modules.parts(model).items():
                _quantize(part, precisions["language" if name in ("language", "head") else "vision"])
        encoder, image, _ = wrappers.vision_graph(model)
        _write(encoder, image, dict.fromkeys(image), folder / "vision.pte")
        decoder = ExecutorchLanguage(model)
        some = decoder.length // 4  # the exporter plans memory for four times the example, at most
        ids, features = torch.full((1, some), decoder.image_token_id), torch.randn(some + 1, decoder.config.hidden_size)
        example = {"input_ids": ids, "image_features": features, "cache_length": torch.zeros(1, dtype=torch.int64)}
        tokens, rows = Dim("tokens", min=1, max=decoder.length - 1), Dim("features", min=1, max=decoder.length)
        axes = {"input_ids": {1: tokens}, "image_features": {0: rows}, "cache_length": None}
        _write(decoder, example, axes, folder / "language.pte")


@contextlib.contextmanager
def _attention(model: nn.Module) -> Iterator[None]:
    """`model`'s decoder attends by `attend`, meanwhile."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - registers torch.ops.llama

    AttentionInterface.register(ATTENTION, attend)
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _write(module: nn.Module, example: dict[str, Tensor], axes: dict[str, object], path: Path) -> None:
    """Write `module` as a program, whose inputs come in the order of `example`, without names."""
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    module.eval().requires_grad_(False)
    with quiet.library_logs():
        config = ExecutorchConfig(dynamic_shapes=axes, prefer_deferred_runtime_asserts_over_guards=True)
        ExecutorchExporter.save_program(ExecutorchExporter().export(module, example, config).program, path)


def _quantize(module: nn.Module, precision: str) -> None:
    """`module`'s linear layers in place: weights of 8 bits, a scale a channel, or 4, in groups of 32; activations on the fly."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor
    from torchao.utils import unwrap_tensor_subclass

    for layer in (m for m in module.modules() if precision != "fp32" and isinstance(m, nn.Linear)):
        weight = layer.weight.detach()
        options = {"target_dtype": torch.int8, "block_size": (1, weight.shape[1])}
        four_bits = precision == "int4" or (precision == "mixed" and groups.on_grid(weight))
        if four_bits and weight.shape[1] % groups.GROUP == 0:
            scale = groups.group_scales(weight, 4, signs=(1,))  # XNNPACK's scales are positive
            options = {"target_dtype": torch.int4, "block_size": (1, groups.GROUP), "intx_choose_qparams_algorithm": None}
            options |= {"custom_scale": scale, "custom_zero_point": torch.zeros_like(scale, dtype=torch.int8)}
        small = IntxUnpackedToInt8Tensor.from_hp(weight, **options, activation_quantization="int8_asym_per_token")
        layer.weight = nn.Parameter(small, requires_grad=False)
    unwrap_tensor_subclass(module)
