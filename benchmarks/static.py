"""Static int8 of mini-cnn on 1,000 test pictures: observers, calibration sets, PT2E, ONNX Runtime QDQ, and their times.

`run()` returns what results/static.json says. About five minutes on two cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmrecipes import data, evaluate, measure, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import one_line
from mmrecipes.export import onnx
from mmrecipes.mini import cnn
from mmrecipes.mini.clevr import sort_of_clevr

PICTURES = 1000
CALIBRATION = 64


def calibration_sets() -> dict[str, Tensor]:
    """Pixels (N, 3, 128, 128): the right pictures, too few of them, and wrong ones."""
    real, processor = cnn.images("calibration", CALIBRATION), cnn.make_image_processor()
    clevr = [sort_of_clevr(seed)[0] for seed in range(CALIBRATION)]
    return {
        "real scenes": real,
        "two scenes": real[:2],
        "one scene": real[:1],
        "uniform noise": torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "Sort-of-CLEVR": processor(clevr, return_tensors="pt")["pixel_values"],
        "dark scenes": (real + 1) * 0.15 - 1,
        "grey pictures": real.mean((1, 2, 3), keepdim=True).expand_as(real).contiguous(),
    }


def run(n: int = PICTURES) -> dict:
    """Accuracy of every variant against fp32 on the same objects, its bytes where it is a file, and milliseconds a picture."""
    from transformers import AutoModelForSemanticSegmentation

    path = models.data_dir() / "models" / "mini-cnn"
    tower = AutoModelForSemanticSegmentation.from_pretrained(path, dtype=torch.float32).eval()
    drawn, sets = [scenes.make_scene(s) for s in data.SPLITS["test"][:n]], calibration_sets()
    real, rows, base = sets["real scenes"], [], []

    def score(variant: str, calibration: str, run: Callable[[Tensor], Tensor], **more) -> None:
        right = cnn.named(run, drawn)
        base[:] = base or right
        row = {"variant": variant, "calibration": calibration, "accuracy": evaluate.wilson(sum(right), len(right)), **more}
        rows.append(row | {"change": evaluate.paired(base, right)})
        print(f"{variant:34s} {calibration:16s} {rows[-1]['accuracy']}  {rows[-1]['change']}", flush=True)

    folded = quantize.fold_batch_norms(tower, real[:2])
    score("fp32", "-", partial(quantize.vision_output, tower))
    seen = {name: quantize.histograms(folded, part) for name, part in sets.items()}
    for observer in quantize.OBSERVERS:  # by hand, simulated
        small = quantize.simulate_static(folded, quantize.ranges(seen["real scenes"], observer))
        score(f"simulated, {observer}", "real scenes", partial(quantize.vision_output, small))
    chosen = quantize.ranges(seen["real scenes"], "MSE")
    for name, small in {
        "simulated, MSE, weights per tensor": quantize.simulate_static(folded, chosen, "tensor"),
        "simulated, MSE, symmetric": quantize.simulate_static(folded, chosen, symmetric=True),
    }.items():
        score(name, "real scenes", partial(quantize.vision_output, small))
    for name in list(sets)[1:]:
        small = quantize.simulate_static(folded, quantize.ranges(seen[name], "MSE"))
        score("simulated, MSE", name, partial(quantize.vision_output, small))
    for name in ("real scenes", "one scene", "uniform noise"):
        score("PT2E", name, quantize.pt2e(tower, sets[name]))
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        floats = onnx.vision_to_onnx(folded, real, Path(folder, "float.onnx"))
        score("ONNX Runtime fp32", "-", onnx.tensor_session(floats), bytes=floats.stat().st_size)
        files = {}
        for explicit, kind in ((True, "explicit int8"), (False, "uint8, CPU")):
            for method in ("MinMax", "Percentile", "Entropy"):
                for name in sets if method == "MinMax" else ("real scenes",):
                    out = Path(folder, f"{kind} {method} {name}.onnx")
                    config = onnx.StaticConfig(method, "all", explicit)
                    files[kind, method, name] = onnx.static_int8(floats, sets[name].split(32), out, config)
                    score(f"ONNX Runtime {kind}, {method}", name, onnx.tensor_session(out), bytes=out.stat().st_size)
        as_written = onnx.tensor_session(files["explicit int8", "MinMax", "real scenes"], as_written=True)
        score("the same explicit file, as written", "real scenes", as_written)
        checked = onnx.check_explicit_int8(files["explicit int8", "MinMax", "real scenes"])
        timed = times(tower, folded, real, floats, files)
    return {"objects": len(base), "pictures": n, "rows": rows, "explicit_int8": checked, "ms": timed}


def times(tower: torch.nn.Module, folded: torch.nn.Module, real: Tensor, floats: Path, files: dict) -> dict:
    """Milliseconds for one picture and for 16, interleaved: what `measure.wall` gives of each variant, and its error to fp32.

    A variant that does not compile on this machine has no times; "failed" says why.
    """
    from torch._inductor import config

    runs = {
        "torch fp32": partial(quantize.vision_output, tower),
        "torch fp32, folded": partial(quantize.vision_output, folded),
        "torch fp32, compiled": torch.compile(partial(quantize.vision_output, folded)),
        "PT2E int8, compiled": torch.compile(quantize.pt2e(tower, real)),
        "ONNX Runtime fp32": onnx.tensor_session(floats),
        "ONNX Runtime explicit int8": onnx.tensor_session(files["explicit int8", "MinMax", "real scenes"]),
        "ONNX Runtime uint8, CPU": onnx.tensor_session(files["uint8, CPU", "MinMax", "real scenes"]),
    }
    found, failed = {}, {}
    for size in (1, 16):
        part = real[:size].contiguous()
        with torch.no_grad(), config.patch(freezing=True):  # weights become constants, so that int8 kernels can be chosen
            wanted, errors = runs["torch fp32"](part), {}
            for name in list(runs):
                try:
                    errors[name] = ((runs[name](part) - wanted).norm() / wanted.norm()).item()
                except Exception as e:
                    failed[name] = one_line(e)
                    del runs[name]
            ms = measure.wall({k: partial(f, part) for k, f in runs.items()}, repeats=15)
        found[f"{size} pictures"] = {k: {**ms[k], "relative error": errors[k]} for k in ms}
    return found | {"failed": failed}
