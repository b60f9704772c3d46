"""`export.export` for dual encoders (CLIP, SigLIP, SigLIP 2): vision and language graphs that each end in a unit vector."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.exporters.utils import patch_attribute

from mmrecipes.errors import ParityError, UserError, require
from mmrecipes.export import openvino
from mmrecipes.export.onnx import backend, graphs
from mmrecipes.export.wrappers import check_float32
from mmrecipes.inference import dual
from mmrecipes.inference.backends import PARTS
from mmrecipes.models import modules

PRECISIONS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}  # of either encoder
TEXTS = ("a red circle", "two cats sleep on a sofa, beside a remote control", "x", "a blue star " * 50)


def is_dual(model: nn.Module) -> bool:
    """Whether `model` compares images with texts, by one vector each."""
    return all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


def supported(model: nn.Module, runtime: str) -> None:
    """UserError for a dual encoder that `export` has no recipe for."""
    name = type(model).__name__
    if runtime not in PRECISIONS:
        raise UserError(f"export: {name} compares images with texts, and {runtime} has no recipe for that; use onnx or openvino")
    check_float32(model)
    if getattr(model, "processor", None) is None:
        raise UserError(f"export: {name} has no .processor; load it with models.load")


class Encoder(nn.Module):
    """One encoder of `model`: its inputs, by name -> unit vectors (B, D)."""

    def __init__(self, model: nn.Module, part: str):
        super().__init__()
        found, self.model = modules.parts(model), copy.copy(model)
        other = found["language" if part == "vision" else "vision"]  # whose weights do not belong into this graph
        self.model._modules = {name: module for name, module in model._modules.items() if module is not other}
        self.embed = self.model.get_image_features if part == "vision" else self.model.get_text_features

    def forward(self, **inputs: Tensor) -> Tensor:
        out = self.embed(**inputs)
        return F.normalize(out if isinstance(out, Tensor) else out.pooler_output, dim=-1)


def write(runtime: str, model: nn.Module, folder: Path, precisions: Mapping[str, str], *_: object) -> None:
    """Write both graphs to `folder` for "onnx" or "openvino", each in its precision; the batch is free. Raises as `export`."""
    require(*(("openvino", "nncf") if runtime == "openvino" else ("onnx", "onnxscript", "onnxruntime")))
    for part, example in examples(model).items():
        free = {name: {0: torch.export.Dim.DYNAMIC} for name in example}
        if part == "language" and not fixed_length(model):
            free = {name: axes | {1: torch.export.Dim.DYNAMIC} for name, axes in free.items()}
        encoder = Encoder(model, part).eval()
        with _one_product(model):
            if runtime == "openvino":
                openvino.write_encoder(encoder, example, free, precisions[part], folder / f"{part}.xml")
                continue
            path = graphs.to_onnx(encoder, example, folder / f"{part}.onnx", free)
        backend.round_weights(path, precisions[part])
        graphs.strip_metadata(path)


def examples(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What each encoder reads of two images and two texts, as the model's processor makes it: {part: {name: tensor}}."""
    blank = [Image.new("RGB", size) for size in ((64, 64), (96, 64))]
    made = {"vision": dual.image_inputs(model.processor, blank)}
    made["language"] = dual.text_inputs(model.processor, TEXTS[:2], "max_length", longest(model))
    return {part: {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in made[part].items()} for part in PARTS}


def longest(model: nn.Module) -> int:
    """Tokens that the text encoder takes."""
    return model.config.text_config.max_position_embeddings


def fixed_length(model: nn.Module) -> bool:
    """Whether padding changes a text's vector: where its last place is read (SigLIP), or where padding comes first."""
    return model.config.model_type.startswith("siglip") or model.processor.tokenizer.padding_side == "left"


def facts(model: nn.Module) -> dict[str, object]:
    """What the manifest says of a dual encoder."""
    scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
    return {
        "kind": "dual",
        "inputs": {part: list(example) for part, example in examples(model).items()},
        "padding": "max_length" if fixed_length(model) else "longest",
        "max_length": longest(model),
        "logit_scale": float(scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
    }


def parity(model: nn.Module, loaded: dual.ExportedDual, tolerance: float, images: Sequence[Image.Image]) -> dict[str, float]:
    """Relative error of the vectors and logits of `loaded` to those of `model`, for `images`, alone and together, and TEXTS.
    {"images", "texts", "logits"}, the largest each. Raises ParityError beyond `tolerance` or where it is not finite.
    """
    options = {"padding": "max_length", "max_length": longest(model), "truncation": True, "return_tensors": "pt"}
    with torch.inference_mode():
        made = model(**model.processor(images=list(images), text=list(TEXTS), **options))
    pairs = {
        "images": (loaded.embed_images(list(images)), made.image_embeds),
        "one image": (loaded.embed_images(images[0]), made.image_embeds[:1]),
        "texts": (loaded.embed_texts(TEXTS), made.text_embeds),
        "one text": (loaded.embed_texts(TEXTS[0]), made.text_embeds[:1]),
        "logits": (loaded.similarity(list(images), TEXTS), made.logits_per_image),
    }
    norm = np.linalg.norm
    errors = {k: float((norm(a - b.numpy(), axis=1) / norm(b.numpy(), axis=1)).max()) for k, (a, b) in pairs.items()}
    largest = np.max(list(errors.values()))  # keeps a NaN
    if not largest <= tolerance:
        away = f"{largest:.2g} (relative) away from the source's, more than {tolerance}"
        raise ParityError(f"the exported model's embeddings are {away}: it is broken, and was not kept")
    return errors


@contextlib.contextmanager
def _one_product(model: nn.Module):
    """NaFlex resizes its positions image by image, which no graph can do: meanwhile, for all of a batch at once."""
    embeddings = getattr(modules.parts(model)["vision"], "embeddings", None)
    flexible = hasattr(embeddings, "resize_positional_embeddings")
    with patch_attribute(embeddings, "resize_positional_embeddings", lambda _: resized) if flexible else contextlib.nullcontext():
        yield


def resized(grid: Tensor, shapes: Tensor, max_length: int) -> Tensor:
    """Positions (B, L, D) of images of `shapes` (B, 2) patches, from a `grid` (H, W, D): bilinear, antialiased, as products."""
    place, weights = torch.arange(max_length, device=grid.device)[None], []
    for at, size, full in zip((place // shapes[:, 1:], place % shapes[:, 1:]), shapes.split(1, 1), grid.shape[:2], strict=True):
        scale = (full / size)[..., None]
        apart = torch.arange(full, device=grid.device) + 0.5 - scale * (at[..., None] + 0.5)
        near = (1 - apart.abs() / scale.clamp(min=1)).clamp(min=0)  # (B, L, full); zero throughout for padding
        weights.append(near / near.sum(-1, keepdim=True).clamp(min=1e-6))
    return (weights[0][..., :, None] * weights[1][..., None, :]).flatten(2) @ grid.flatten(0, 1)
