"""A vision-language model as a directory that another runtime answers from, checked against its source before it is kept.

Two graphs: `vision` (pixels to visual tokens, connector included) and `language` (tokens and visual tokens, after a KV cache, to
the logits of the next token). One graph does prefill and decode, so its weights are stored once. `load_exported` reads it back.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmrecipes.data import scenes
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate.generation import eos_token_ids
from mmrecipes.export import compressed_tensors, dual, genai
from mmrecipes.export.executorch import max_length, obstacle, write_executorch
from mmrecipes.export.onnx.backend import write_onnx
from mmrecipes.export.openvino import write_openvino
from mmrecipes.export.wrappers import check_float32, family_of, vision_inputs
from mmrecipes.inference import exported
from mmrecipes.inference.backends import PACKAGES, PARTS, runtimes
from mmrecipes.inference.dual import ExportedDual
from mmrecipes.inference.genai import NAME as GENAI
from mmrecipes.models import modules
from mmrecipes.models.saving import directory_aside
from mmrecipes.quantize.groups import GROUP, packed_values


@dataclass(frozen=True)
class Backend:
    """What writes both graphs for one runtime, and what each part can be there."""

    name: str
    write: Callable[[nn.Module, Path, Mapping[str, str], Sequence[Mapping[str, np.ndarray]], bool], None]
    vision: tuple[str, ...]
    language: tuple[str, ...]


# fp32; bf16, where the CPU has instructions for it; int8, weights and, but for OpenVINO, activations, rounded on the fly; static,
# as int8 with activations' ranges fixed on images; int4, weights in groups of 32; mixed, weights that were rounded to 4 bits
# before (quantize.apply_plan with groups of 32) in 4 bits as they are, the rest as in int8
_LANGUAGE = ("fp32", "int8", "int4", "mixed")
BACKENDS = {
    "onnx": Backend("onnx", write_onnx, ("fp32", "int8", "static", "mixed"), _LANGUAGE),
    "openvino": Backend("openvino", write_openvino, ("fp32", "bf16", "int8", "static", "mixed"), ("bf16", *_LANGUAGE)),
    "executorch": Backend("executorch", write_executorch, ("fp32", "int8", "mixed"), _LANGUAGE),
    GENAI: Backend(GENAI, genai.write_genai, ("fp32", "int8"), ("fp32", "int8", "int4")),
}
DUALS = {name: Backend(name, functools.partial(dual.write, name), *2 * (dual.PRECISIONS[name],)) for name in dual.PRECISIONS}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
# relative error of the first tokens' logits that each precision may have, in every runtime; beyond it is broken, not lossy, but
# for int4, where it may be the model that does not hold 4 bits (`_check`)
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.25, "static": 0.25, "mixed": 0.25, "int4": 0.6}


def export(
    model: nn.Module,
    out: str | Path,
    runtime: str | Mapping[str, str] = "onnx",
    precision: str | Mapping[str, str] = "fp32",
    images: Sequence[Image.Image | str | Path] = (),
    batches: bool = False,
) -> Path:
    """Write `model` (float32, as `models.load` gives it) to directory `out`, for a `runtime` of BACKENDS. Returns `out`.
    `runtime` and `precision` are one for both parts or {"vision": ..., "language": ...}, a precision one of those that its
    backend has; "static" fixes ranges on `images`, a dozen like those to come. With `batches` it also answers several
    conversations together (`generate_batch`); one may take a little longer. A dual encoder (CLIP, SigLIP) becomes two
    graphs that end in unit vectors, in fp32, int8 or bf16 (OpenVINO), of batches always. All or nothing: `out` appears, or takes
    an older export's place, once the graphs answer as `model` does (`parity`; ParityError), with weights of 4 bits as `rounded`.
    The runtime "openvino-genai" puts many requests together (`inference.load_genai`); its pipeline is asked before it is kept.
    The runtime "compressed-tensors" is for vLLM: a checkpoint with a language model in "w4a16", "w8a8" or "mixed", which
    `models.load` reads, too (`compressed_tensors.write`).
    Raises UserError for an architecture, dtype or directory that it cannot take; ImportError where a package is missing.
    """
    if runtime == compressed_tensors.RUNTIME:
        if dual.is_dual(model) or len(images) or batches:
            given = f"{type(model).__name__}, {len(images)} images, batches={batches}"
            raise UserError(f"export: {given}; {runtime} is for models that answer, without images to calibrate on or batches")
        supported(model)
        return compressed_tensors.write(model, out, precision, shown())
    with written(model, out, runtime, precision, images, batches) as (aside, precisions):
        loaded = exported.load_exported(aside)
        _check(model, loaded, runtimes(runtime)["language"], precisions)
        if runtime == GENAI:
            genai.check_pipeline(aside, loaded, shown())
    return Path(out).expanduser().resolve()


@contextlib.contextmanager
def written(
    model: nn.Module,
    out: str | Path,
    runtime: str | Mapping[str, str],
    precision: str | Mapping[str, str],
    images: Sequence,
    batches: bool,
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory beside `out` with the graphs and the manifest, and the precision of each part; it becomes `out` in the end.
    Without `parity`: for timings of random weights, whose rounded logits prove nothing."""
    by_part = runtimes(runtime)
    for name in dict.fromkeys(by_part.values()):
        if name not in BACKENDS:
            raise UserError(f"export: runtime={name!r}; expected one of {', '.join(BACKENDS)}, or {compressed_tensors.RUNTIME}")
        supported(model, name)
    if len(set(by_part.values())) > 1 and (dual.is_dual(model) or not set(by_part.values()) <= {"onnx", "openvino"}):
        raise UserError(f"export: runtime={by_part}; two runtimes are for models that answer, and onnx and openvino")
    backends = DUALS if dual.is_dual(model) else BACKENDS
    precisions = dict(precision) if isinstance(precision, Mapping) else dict.fromkeys(PARTS, precision)
    if precision == "int4":
        precisions["vision"] = "int8"  # 4-bit weights do not pay where hundreds of patches share them
    for part, name in by_part.items():
        known = getattr(backends[name], part)
        if precisions.get(part) not in known:
            raise UserError(f"precision of {part} for {name}: {precisions.get(part)!r}; expected one of {', '.join(known)}")
    if batches and "executorch" in by_part.values():
        raise UserError("export: batches in executorch, whose cache holds one conversation; use onnx or openvino")
    if batches and GENAI in by_part.values():
        raise UserError(f"export: batches for {GENAI}, which puts requests together by itself; leave them out")
    if (precisions["vision"] == "static") != bool(len(images)):
        raise UserError(f"export: {len(images)} images for vision in {precisions['vision']}; 'static' takes some, others none")
    check_apart(model.name_or_path, out)
    with directory_aside(out) as aside:
        runs = [run for image in images for run in vision_inputs(model, [image])]
        for name in dict.fromkeys(by_part.values()):
            own = {part: precisions[part] for part in PARTS if by_part[part] == name}
            backends[name].write(model, aside, own, runs, batches)
        write_manifest(model, aside, runtime, precisions, batches)
        yield aside, precisions


def check_apart(source: str, out: str | Path) -> None:
    """UserError where writing to `out` would replace the checkpoint in directory `source`; other names and "" pass.
    >>> check_apart("mini-vlm", folder / "small")
    """
    own, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    if source and own.is_dir() and own.is_relative_to(out):
        raise UserError(f"{out}: is or holds the checkpoint {own}, which is only read; give another directory")


def supported(model: nn.Module, runtime: str = "onnx") -> None:
    """UserError for a model that `export` has no recipe for in this `runtime`, before any work is done."""
    name, found = type(model).__name__, modules.parts(model)
    if dual.is_dual(model):
        dual.supported(model, runtime)
        return
    if "head" not in found:
        raise UserError(f"export: {name} has no head, and no two encoders that compare; there is no recipe for it yet")
    check_float32(model)
    if not isinstance(getattr(model.config, "image_token_id", None), int):
        raise UserError(f"export: {name} has no image_token_id in its config; there is no recipe for it yet")
    family = family_of(model)
    if runtime == "executorch" and (why := obstacle(model, family)):
        raise UserError(f"export: {name} ({family.name}) cannot be exported for executorch: {why}; use onnx or openvino")
    if runtime == GENAI and (why := genai.obstacle(model, family)):
        raise UserError(f"export: {name} ({family.name}) cannot be exported for {GENAI}: {why}; use openvino")
    if not getattr(getattr(model, "processor", None), "chat_template", None):
        raise UserError(f"export: {name} has no .processor with a chat template; load it with models.load")


def write_manifest(
    model: nn.Module, folder: Path, runtime: str | Mapping[str, str], precisions: Mapping[str, str], batches: bool = False
) -> None:
    """Write to `folder`, which holds the graphs, what else an answer needs: processor, configs, manifest."""
    graphs, by_part = [p for p in sorted(folder.iterdir()) if p.is_file()], runtimes(runtime)
    same = len(set(by_part.values())) == 1
    model.processor.save_pretrained(folder)
    if not dual.is_dual(model):
        model.generation_config.save_pretrained(folder)
    if by_part["language"] == GENAI:
        genai.write_configs(model, folder)
    elif type(model.config)._auto_class:  # code of the model's own (swapped.py), which the graphs do not need: nor shall a reader
        config = {k: v for k, v in model.config.to_dict().items() if k != "auto_map"}
        config["model_type"] = type(model.config).__base__.model_type or model.config.model_type
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        model.config.save_pretrained(folder)
    if not dual.is_dual(model) and by_part["language"] != GENAI:
        _save_image_token(model, folder)
    manifest = {
        "format": 3 if same else exported.FORMAT,  # so that yesterday's readers take what they can
        "runtime": by_part["language"] if same else by_part,
        "precision": dict(precisions),
        "source": model.name_or_path or type(model).__name__,
        "class": type(model).__name__,
        **(dual.facts(model) if dual.is_dual(model) else {"batches": batches} | facts(model, by_part["language"])),
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", *(PACKAGES[r] for r in by_part.values()))},
        "bytes": {p.name: p.stat().st_size for p in graphs},
        "sha256": {p.name: exported.sha256(p) for p in sorted(folder.iterdir()) if p.is_file()},
    }
    (folder / exported.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _save_image_token(model: nn.Module, folder: Path) -> None:
    """What the image token is where no image is given, unless it lies outside the vocabulary."""
    if 0 <= model.config.image_token_id < model.get_input_embeddings().weight.shape[0]:
        with torch.no_grad():
            row = model.get_input_embeddings()(torch.tensor([model.config.image_token_id]))
        np.save(folder / exported.IMAGE_TOKEN, row.numpy())


def facts(model: nn.Module, runtime: str) -> dict[str, object]:
    """What the manifest says of a model that answers."""
    longest = model.config.get_text_config().max_position_embeddings
    return {
        "family": family_of(model).name,
        "settings": family_of(model).settings(model),
        "generation": exported.generation_rules(model.generation_config),
        "image_token_id": model.config.image_token_id,
        "eos_token_ids": sorted(eos_token_ids(model)),
        "max_length": max_length(model) if runtime == "executorch" else longest,
    }


def parity(model: nn.Module, loaded: exported.Exported | ExportedDual, tolerance: float) -> dict[str, float]:
    """Relative error of the logits of `loaded` to those of `model`: the largest on drawn images of several shapes, on two images
    and on text alone.
    {"prefill": after the prompt, "decode": one token further}. Of a dual encoder, as `dual.parity`.
    Raises ParityError beyond `tolerance` or where it is not finite.
    """
    if dual.is_dual(model):
        return dual.parity(model, loaded, tolerance, [image for images in shown()[:3] for image in images])
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    for images in shown():
        try:
            inputs = loaded.inputs(images, "What is in this picture?")
        except UserError:  # some processors (PaliGemma's) take no text without an image
            if images:
                raise
            continue
        given = {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
        with torch.inference_mode():  # two tokens, as the library itself generates them
            made = model.generate(**given, **GREEDY, min_new_tokens=2, max_new_tokens=2)
        token = made.sequences[0, given["input_ids"].shape[1]].numpy()
        found = loaded.prefill(inputs), loaded.graphs.step(token.reshape(1, 1))
        for stage, logits, wanted in zip(errors, found, made.logits, strict=True):
            errors[stage].append(float(np.linalg.norm(logits - wanted[0].numpy()) / np.linalg.norm(wanted[0].numpy())))
    largest = np.max(list(errors.values()))  # keeps a NaN
    if not largest <= tolerance:
        away = f"{largest:.2g} (relative) away from the source's, more than {tolerance}"
        raise ParityError(f"the exported model's logits are {away}: it is broken, and was not kept")
    return {stage: max(values) for stage, values in errors.items()}


def _check(model: nn.Module, loaded: exported.Exported | ExportedDual, runtime: str, precisions: Mapping[str, str]) -> None:
    """ParityError for an export that is broken. How far 4 bits move the logits depends on the model, so where they move far, the
    export must answer as the model does with the same rounding in PyTorch; a model that loses too much is refused for that."""
    if precisions["language"] != "int4":
        parity(model, loaded, max(TOLERANCE[p] for p in precisions.values()))
        return
    moved = max(parity(model, loaded, np.inf).values())
    if moved > TOLERANCE["mixed"]:
        parity(rounded(model, runtime), loaded, TOLERANCE["mixed"])
    if moved > TOLERANCE["int4"]:
        why = f"rounding to 4 bits moves this model's logits by {moved:.2g} (relative), in PyTorch, too: it loses too much"
        raise ParityError(f"{why}, and was not kept; use int8, or `mmrecipes shrink`, which gives 4 bits where they fit")


@torch.no_grad()
def rounded(model: nn.Module, runtime: str) -> nn.Module:
    """A copy whose decoder has, in float, the values that "int4" stores for this `runtime`."""
    small, embeddings = modules.clone(model), () if runtime == "executorch" else (nn.Embedding,)
    signs = (1,) if runtime == "executorch" else (1, -1)  # XNNPACK's scales are positive
    for part, top in modules.parts(small).items():
        for layer in top.modules() if part in ("language", "head") else ():
            if isinstance(layer, (nn.Linear, *embeddings)) and (runtime == "onnx" or layer.weight.shape[1] % GROUP == 0):
                layer.weight = nn.Parameter(packed_values(layer.weight, 4, signs))
    return small


def shown() -> list[list[Image.Image]]:
    """Images of one conversation each: square, wide, tall, two of two shapes, none."""
    square, wide, tall = (scenes.render(scenes.make_scene(seed), 256) for seed in (1, 2, 3))
    wide, tall = wide.resize((512, 224)), tall.resize((160, 480))
    return [[square], [wide], [tall], [wide, square], []]
