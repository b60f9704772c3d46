"""Which runtime and precision run the vision encoder of an export fastest on this machine: measured, not assumed.

The language model stays as it is: on the CPUs measured so far (results/bench.json) ONNX Runtime decodes about twice as fast as
OpenVINO. Which is ahead in the vision encoder depends on the CPU, and so does whether activations' ranges pay to be fixed.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.export import pipeline, wrappers
from mmrecipes.inference.backends import GRAPHS, runtimes
from mmrecipes.inference.exported import read_manifest
from mmrecipes.interrupt import temporary_directory
from mmrecipes.measure import timing

CANDIDATES = (("onnx", "static"), ("openvino", "static"))
FASTER = 0.95  # of the time: what gains less than 5% is not worth a second runtime


def choose_vision_(model: nn.Module, folder: Path, images: Sequence[Image.Image], repeats: int = 9) -> list[dict[str, Any]]:
    """Put the fastest vision encoder into `folder`, an export of `model`: its own, or one of CANDIDATES, with activations' ranges
    fixed on `images`, a dozen. Returns what was tried, the export's own first: "runtime", "precision", "ms" (quartiles) and
    "error" (relative, of the visual tokens of the first image), and which is "kept"; a candidate that cannot be made is left
    out. Raises UserError without images, and for an ExecuTorch export, which takes no second runtime.
    """
    if not len(images):
        raise UserError("choose_vision_: no images; give a dozen like those to come")
    manifest, runs = read_manifest(folder), [run for image in images for run in wrappers.vision_inputs(model, [image])]
    by_part, precisions = runtimes(manifest["runtime"]), manifest["precision"]
    own = by_part["vision"], precisions["vision"]
    if "executorch" in by_part.values():
        raise UserError(f"choose_vision_: {folder} is for ExecuTorch; give an export for onnx or openvino")
    encoder = wrappers.vision_graph(model)[0]
    with torch.inference_mode():
        wanted = encoder(**{name: torch.from_numpy(np.asarray(x)) for name, x in runs[0].items()}).numpy().reshape(-1)
    with temporary_directory(folder.parent, "vision-") as aside:
        places = {own: folder}
        for runtime, precision in CANDIDATES:
            if (runtime, precision) != own:
                place = places[runtime, precision] = aside / f"{runtime}-{precision}"
                place.mkdir()
                try:
                    pipeline.BACKENDS[runtime].write(model, place, {"vision": precision}, runs, False)
                except Exception:  # no runtime, or what a new encoder makes quantizers raise: the export stays as it is
                    del places[runtime, precision]
        loaded = {how: GRAPHS[how[0]](place, {"vision": how[1]}, None) for how, place in places.items()}
        found = {how: graphs.encode(runs[0]).reshape(-1) for how, graphs in loaded.items()}
        errors = {how: float(np.linalg.norm(each - wanted) / np.linalg.norm(wanted)) for how, each in found.items()}
        times = timing.wall({how: partial(graphs.encode, runs[0]) for how, graphs in loaded.items()}, repeats)
        sound = [how for how in places if how == own or errors[how] <= pipeline.TOLERANCE[how[1]]]
        best = min(sound, key=lambda how: times[how]["median"])
        best = best if times[best]["median"] < FASTER * times[own]["median"] else own
        del loaded  # a graph that is loaded may hold its file
        if best != own:
            _replace(model, folder, places[best], {**by_part, "vision": best[0]}, {**precisions, "vision": best[1]})
    rows = [{"runtime": how[0], "precision": how[1], "ms": times[how], "error": errors[how]} for how in places]
    return [row | {"kept": (row["runtime"], row["precision"]) == best} for row in rows]


def _replace(model: nn.Module, folder: Path, place: Path, by_part: dict[str, str], precisions: dict[str, str]) -> None:
    """The vision graph of `place` instead of that in `folder`, and a manifest that says so."""
    batches = read_manifest(folder).get("batches", False)
    for file in folder.iterdir():
        if not file.name.startswith("language."):  # the manifest's files are written anew
            file.unlink()
    for file in place.iterdir():
        shutil.move(file, folder / file.name)
    pipeline.write_manifest(model, folder, by_part, precisions, batches)
