"""A vision-language model as a directory that another runtime answers from, checked against its source before it is kept.

Two graphs: `vision` (pixels to visual tokens, connector included) and `language` (words and visual tokens, after a KV cache, to
the logits of the next word). One graph does prefill and decode, so its weights are stored once. Batches of one: no padding, so
no mask, and the cache can stay in the runtime. `inference.load_exported` reads it back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mmrecipes.errors import ParityError, UserError, one_line
from mmrecipes.export.executorch import max_length, write_executorch
from mmrecipes.export.onnx.backend import write_onnx
from mmrecipes.export.openvino import write_openvino
from mmrecipes.export.wrappers import calibration_pixels, vision_wrapper
from mmrecipes.inference import exported
from mmrecipes.models import modules
from mmrecipes.models.saving import check_replaceable, take_place

if TYPE_CHECKING:
    from PIL import Image

PARTS = ("vision", "language")


# what each part can be: fp32; bf16, where the CPU has instructions for it; int8, weights and, but for OpenVINO, activations,
# rounded on the fly; static, as int8 with activations' ranges fixed on pictures; int4, weights in groups of 32; mixed, weights
# that were rounded to 4 bits before (quantize.apply_plan with groups of 32) in 4 bits as they are, the rest as in int8
PRECISIONS = {
    "onnx": {"vision": ("fp32", "int8", "static", "mixed"), "language": ("fp32", "int8", "int4", "mixed")},
    "openvino": {"vision": ("fp32", "bf16", "int8", "static", "mixed"), "language": ("fp32", "bf16", "int8", "int4", "mixed")},
    "executorch": {"vision": ("fp32", "int8", "mixed"), "language": ("fp32", "int8", "int4", "mixed")},
}


WRITERS = {"onnx": write_onnx, "openvino": write_openvino, "executorch": write_executorch}  # what writes both graphs
# relative error of the first words' logits that each precision may have; beyond it is broken, not lossy
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.25, "static": 0.25, "mixed": 0.25, "int4": 0.6}


# ---- export


def export(
    model: nn.Module,
    out: str | Path,
    runtime: str = "onnx",
    precision: str | Mapping[str, str] = "fp32",
    check: bool = True,
    pictures: Sequence[Image.Image | str | Path] = (),
) -> Path:
    """Write `model` (float32, as `models.load` gives it) to directory `out`, for "onnx" (ONNX Runtime), "openvino" or
    "executorch".

    Returns `out`. `precision` is one word for both parts or {"vision": ..., "language": ...}, of those in PRECISIONS; "static"
    fixes ranges on `pictures`, a dozen like those to come. All or nothing: `out` appears, or takes an older export's place, once
    the graphs answer as `model` does (`check`; ParityError).
    Raises UserError for an architecture, dtype or directory that it cannot take; ImportError where a package is missing.
    """
    if runtime not in PRECISIONS:
        raise UserError(f"export: runtime={runtime!r}; expected one of {', '.join(PRECISIONS)}")
    widths = _widths(runtime, precision)
    supported(model)
    if (widths["vision"] == "static") != bool(len(pictures)):
        raise UserError(
            f"export: {len(pictures)} pictures for vision in {widths['vision']}; precision 'static' takes some, others none"
        )
    out = Path(out).expanduser().resolve()
    check_replaceable(out)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    try:
        part.mkdir(parents=True)
        WRITERS[runtime](model, part, widths, calibration_pixels(model, pictures))
        _write_rest(model, part, runtime, widths)
        if check:
            parity(model, exported.load_exported(part), max(TOLERANCE[w] for w in widths.values()))
        take_place(part, out)
    except OSError as e:
        raise UserError(f"{out}: could not be written ({one_line(e)}); nothing was changed: give another directory") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _widths(runtime: str, precision: str | Mapping[str, str]) -> dict[str, str]:
    known = PRECISIONS[runtime]
    given = dict(precision) if isinstance(precision, Mapping) else dict.fromkeys(known, precision)
    if precision == "int4":
        given["vision"] = "int8"  # 4-bit weights do not pay where hundreds of patches share them
    for part, words in known.items():
        if given.get(part) not in words:
            raise UserError(f"precision of {part} for {runtime}: {given.get(part)!r}; expected one of {', '.join(words)}")
    return given


def supported(model: nn.Module) -> None:
    """UserError for a model that `export` has no recipe for, before any work is done."""
    found = modules.parts(model)
    if "head" not in found:
        raise UserError(f"export: {type(model).__name__} compares pictures with texts; give a model that answers")
    wrong = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if wrong:
        raise UserError(f"export: the weights are {wrong}; it starts from float32, so load the model with dtype=torch.float32")
    if not isinstance(getattr(model.config, "image_token_id", None), int):
        raise UserError(f"export: {type(model).__name__} has no image_token_id in its config; there is no recipe for it yet")
    vision_wrapper(model)
    if not getattr(getattr(model, "processor", None), "chat_template", None):
        raise UserError(f"export: {type(model).__name__} has no .processor with a chat template; load it with models.load")


# ---- check and write


def _write_rest(model: nn.Module, folder: Path, runtime: str, widths: Mapping[str, str]) -> None:
    files = [p for p in sorted(folder.iterdir()) if p.is_file()]
    model.processor.save_pretrained(folder)
    if type(model.config)._auto_class:  # code of the model's own (swapped.py), which the graphs do not need: nor shall a reader
        kept = {k: v for k, v in model.config.to_dict().items() if k != "auto_map"}
        kept["model_type"] = type(model.config).__base__.model_type
        (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    else:
        model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    longest = model.config.get_text_config().max_position_embeddings
    if runtime == "executorch":  # its cache has a fixed length
        longest = max_length(model)
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = model.config.get_text_config().eos_token_id
    manifest = {
        "format": exported.FORMAT,
        "runtime": runtime,
        "precision": dict(widths),
        "source": model.name_or_path or type(model).__name__,
        "class": type(model).__name__,
        "image_token_id": model.config.image_token_id,
        "stop": [stop] if isinstance(stop, int) else list(stop or ()),
        "longest": longest,
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", exported.PACKAGES[runtime])},
        "bytes": {p.name: p.stat().st_size for p in files},
        "sha256": {p.name: exported.sha256(p) for p in sorted(folder.iterdir()) if p.is_file()},
    }
    (folder / exported.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def parity(model: nn.Module, loaded: exported.Exported, tolerance: float) -> dict[str, float]:
    """Relative error of the logits of `loaded` to those of `model` on drawn pictures and on words alone.

    {"prefill": ..., "decode": ...}, the largest of each: after the prompt, and one word further, from the cache.
    Raises ParityError beyond `tolerance` or for logits that are not finite.
    """
    from mmrecipes.data import scenes

    found = {"prefill": 0.0, "decode": 0.0}
    for picture in (scenes.render(scenes.make_scene(1), 256), scenes.render(scenes.make_scene(2), 256), None):
        inputs = loaded.inputs(picture, "What is in this picture?")
        logits = loaded.prefill(inputs)
        token = int(logits.argmax())
        given = {k: torch.from_numpy(np.asarray(v)) for k, v in inputs.items()}
        with torch.inference_mode():
            _compare(found, "prefill", logits, model(**given).logits[0, -1].numpy())
            given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[token]])], 1)
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            _compare(found, "decode", loaded.graphs.step(np.array([[token]])), model(**given).logits[0, -1].numpy())
    worst = float(np.max(list(found.values())))
    if not worst <= tolerance:  # also where it is NaN
        raise ParityError(
            f"the exported model's logits are {worst:.2g} (relative) away from the source's, more than "
            f"{tolerance}: it is broken, and was not kept"
        )
    return found


def _compare(found: dict[str, float], stage: str, logits: np.ndarray, wanted: np.ndarray) -> None:
    found[stage] = float(np.maximum(found[stage], np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)))  # keeps a NaN
