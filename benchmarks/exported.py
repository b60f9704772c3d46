"""mini-vlm, exported: what each runtime and precision costs in answers, on the whole test split, and in bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmrecipes import data, evaluate, export, inference, models

WAYS = [(runtime, width) for runtime in ("onnx", "openvino", "executorch") for width in ("fp32", "int8", "int4")]

FEWER = 1050  # questions for ExecuTorch, whose exports take most of its time


def run() -> dict:
    """By runtime and precision: accuracy, the change against PyTorch (paired), error of the logits, and bytes."""
    model, found = models.load("mini-vlm"), {}
    base = evaluate.vqa(model, data.test_split())
    for runtime, width in WAYS:
        rows = data.test_split(FEWER if runtime == "executorch" else None)
        with tempfile.TemporaryDirectory() as folder:
            loaded = inference.load_exported(export.export(model, Path(folder) / "mini-vlm", runtime, width))
            result = evaluate.vqa(loaded, rows)
            found[f"{runtime}, {width}"] = {
                "accuracy": result.overall,
                "change": evaluate.paired(base.right[: len(rows)], result.right),
                "same answers": sum(a == b for a, b in zip(base.predictions, result.predictions, strict=False)),
                "relative error": export.parity(model, loaded, export.TOLERANCE[width]),
                "mb": sum(loaded.manifest["bytes"].values()) / 1e6,
            }
            print(runtime, width, result.overall, found[f"{runtime}, {width}"]["change"], flush=True)
    return {"fp32": base.overall, "variants": found}
