"""`export.export` for ExecuTorch (XNNPACK): vision.pte and language.pte, for phones and other small devices.

A program of ExecuTorch plans all its memory ahead. So the KV cache has a fixed length and lives inside the program, and the text
may have at most `LONGEST` tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes import export, exported, models, packed, runtime

LONGEST = 2048  # tokens that the cache has room for, unless the model takes fewer


def longest(model: nn.Module) -> int:
    """Tokens of one conversation, pictures' included, that an exported `model` takes."""
    return min(LONGEST, model.config.get_text_config().max_position_embeddings)


class Language(export.Language):
    """As `export.Language`, with the cache inside: input_ids (1, T), image_features (N, D), before (1,) -> logits (1, 1, V).

    `before` says how many tokens of the cache to keep; what follows them is overwritten.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.config, self.length = model.config.get_text_config(), longest(model)
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        shape = (1, self.config.num_key_value_heads, self.length, width)
        for i in range(self.config.num_hidden_layers):
            self.register_buffer(f"keys_{i}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{i}", torch.zeros(shape), persistent=False)

    def forward(self, input_ids: Tensor, image_features: Tensor, before: Tensor) -> Tensor:
        from transformers import StaticCache

        cache = StaticCache(config=self.config, max_cache_len=self.length)
        for i, layer in enumerate(cache.layers):  # each on this module's own memory, where the program finds it next time
            keys, values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, before[0].clone()
        return super().forward(input_ids, image_features, cache)["logits"]


def write(model: nn.Module, folder: Path, widths: Mapping[str, str], pixels: Sequence[np.ndarray] = ()) -> None:
    """Write both programs to `folder`, each in its precision, of which none looks at `pixels`. Raises as `export.export`."""
    runtime.needs("executorch")
    with exported.hushed():  # its import reports on the CPU of a phone that it does not find
        _both(model, folder, widths)


def _both(model: nn.Module, folder: Path, widths: Mapping[str, str]) -> None:
    from torch.export import Dim

    if any(w != "fp32" for w in widths.values()):
        model = copy.deepcopy(model)
        for name, part in models.parts(model).items():
            _round(part, widths["language" if name in ("language", "head") else "vision"])
    tower, picture = export.vision(model)
    # named, because a program's inputs have no names and come in this order
    _write(tower, {"pixel_values": picture}, {"pixel_values": None}, folder / "vision.pte")
    decoder = Language(model)
    ids, pieces = torch.full((1, 3), decoder.image), torch.randn(4, decoder.config.hidden_size)
    example = {"input_ids": ids, "image_features": pieces, "before": torch.zeros(1, dtype=torch.int64)}
    words, features = Dim("words", min=1, max=decoder.length - 1), Dim("features", min=1, max=decoder.length)
    axes = {"input_ids": {1: words}, "image_features": {0: features}, "before": None}
    _write(decoder, example, axes, folder / "language.pte")


def _write(module: nn.Module, example: dict[str, Tensor], axes: dict[str, object], path: Path) -> None:
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    module.eval().requires_grad_(False)
    with runtime.quiet():
        config = ExecutorchConfig(dynamic_shapes=axes, prefer_deferred_runtime_asserts_over_guards=True)
        ExecutorchExporter.save_program(ExecutorchExporter().export(module, example, config).program, path)


def _round(module: nn.Module, width: str) -> None:
    """Linear layers of `module` itself with weights of 8 bits, a scale a channel, or 4, in groups of 32; activations on the fly.

    Embeddings stay as they are.
    """
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor
    from torchao.utils import unwrap_tensor_subclass

    for layer in module.modules():
        if width == "fp32" or not isinstance(layer, nn.Linear):
            continue
        weight, four = layer.weight.detach(), {"target_dtype": torch.int4, "block_size": (1, packed.GROUP)}
        eight = {"target_dtype": torch.int8, "block_size": (1, weight.shape[1])}
        fits = weight.shape[1] % packed.GROUP == 0 and (width == "int4" or (width == "mixed" and packed.on_grid(weight)))
        if fits:  # XNNPACK's scales are positive
            scale = packed.scales(weight, 4, signs=(1,))
            four |= {"custom_scale": scale, "custom_zero_point": torch.zeros_like(scale, dtype=torch.int8)}
            four |= {"intx_choose_qparams_algorithm": None}
        small = IntxUnpackedToInt8Tensor.from_hp(
            weight, **(four if fits else eight), activation_quantization="int8_asym_per_token"
        )
        layer.weight = nn.Parameter(small, requires_grad=False)
    unwrap_tensor_subclass(module)
