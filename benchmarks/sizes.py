"""How time to first token grows with the image, for the real-size twin: 256 to 2,048 px, 1 to 17 tiles. About ten minutes.

The processor cuts an image larger than 512 px into tiles and adds an overview, as SmolVLM's does. Each point is a fresh process
on two threads; beside the time stands the least that the machine allows, the FLOP at its int8 peak (fp32 for PyTorch). PyTorch
also encodes the tiles of an image one by one and all at once. The exported models are those of bench.py, in runs/bench.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata

from bench_row import CHECKPOINT, QUESTION, ROOT, THREADS, WORK

SIDES, ROUNDS = (256, 512, 768, 1024, 2048), 2
LONG_MS = 8_000  # what takes longer is timed once, without a warm-up
TILE = 512  # px a side
VARIANTS = {
    "PyTorch fp32": ("torch", "fp32"),
    "ONNX Runtime fp32": ("onnx", "fp32"),
    "ONNX Runtime int8": ("onnx", "int8"),
    "ONNX Runtime int4": ("onnx", "int4"),
    "OpenVINO int4": ("openvino", "int4"),
}


def image_of(side: int):  # -> PIL.Image
    from mmrecipes.data import scenes

    drawn = scenes.render(scenes.make_scene(5), min(side, scenes.LARGEST))
    return drawn.resize((side, side))


def split_larger(processor, side: int) -> None:
    """Let it cut images of `side` px into tiles, instead of making them smaller."""
    processor.image_processor.size = {"longest_edge": max(TILE, side)}


def point(runtime: str, how: str, side: int) -> dict:
    """In this process: tiles, tokens of the prompt, medians of ms, and peak MB."""
    import bench

    from mmrecipes import measure

    if runtime == "torch":
        return _torch_point(side) | {"peak_mb": measure.peak_mb()}
    sys.modules.update(torch=None, torchao=None)
    import numpy as np

    from mmrecipes.inference import load_exported

    model = load_exported(bench.folder(runtime, how), threads=THREADS)
    split_larger(model.processor, side)
    inputs = model.inputs(image_of(side), QUESTION)
    runs = {"vision_ms": lambda: model.encode_images(inputs), "ttft_ms": lambda: model.prefill(inputs)}
    found = _medians(runs)
    row = {"tiles": int(np.prod(inputs["pixel_values"].shape[:2])), "prompt_tokens": inputs["input_ids"].shape[1]}
    return row | found | {"peak_mb": measure.peak_mb()}


def _medians(runs: dict) -> dict[str, dict[str, float]]:
    """Interleaved; {"median", "low", "high"} of each."""
    import numpy as np

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + ROUNDS):
        for name, run in runs.items():
            if times[name] and times[name][0] > LONG_MS:
                continue
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    quartiles = {name: np.quantile(t[1:] or t, (0.5, 0.25, 0.75)).tolist() for name, t in times.items()}
    return {name: dict(zip(("median", "low", "high"), q, strict=True)) for name, q in quartiles.items()}


def _torch_point(side: int) -> dict:
    import torch

    from mmrecipes import models
    from mmrecipes.models.modules import VisionWithConnector

    torch.set_num_threads(THREADS)
    model = models.load(CHECKPOINT, dtype="float32")
    split_larger(model.processor, side)
    inputs = models.chat(model, image_of(side), QUESTION)
    tiles, encoder = inputs["pixel_values"][0], VisionWithConnector(model)
    with torch.inference_mode():
        runs = {"vision_ms": lambda: encoder(tiles), "vision one by one ms": lambda: [encoder(tile[None]) for tile in tiles]}
        runs["ttft_ms"] = lambda: model(**inputs, logits_to_keep=1)
        found = _medians(runs)
    return {"tiles": len(tiles), "prompt_tokens": inputs["input_ids"].shape[1]} | found


def least_ms(config: dict, tiles: int, tokens: int, peak: float) -> float:
    """Of the matrix products of vision encoder and language model, attention included, at `peak` GFLOP/s."""
    vision, text = config["vision_config"], config["text_config"]
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (TILE // vision["patch_size"]) ** 2
    flop = 2 * tiles * vision["num_hidden_layers"] * patches * (4 * hidden**2 + 2 * hidden * inner + 2 * patches * hidden)
    hidden, inner, heads, shared = (
        text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    layer = 2 * hidden**2 + 2 * hidden * hidden // heads * shared + 3 * hidden * inner
    flop += 2 * text["num_hidden_layers"] * tokens * (layer + tokens * hidden)
    return flop / peak / 1e6


def main() -> None:
    if sys.argv[1:2] == ["point"]:
        print("\n" + json.dumps(point(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
        return
    import bench

    from mmrecipes import measure, models

    peaks = measure.machine_peaks(2.0)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    for how in VARIANTS.values():
        if not bench.ready(bench.folder(*how)):
            WORK.mkdir(parents=True, exist_ok=True)
            bench.prepare(*how)
    kept = WORK / "sizes.json"  # a killed run goes on there
    found: dict[str, list[dict]] = json.loads(kept.read_text()) if kept.exists() else {name: [] for name in VARIANTS}
    for side in SIDES:
        for name, how in VARIANTS.items():
            if any(row["side"] == side for row in found[name]):
                continue
            command = [sys.executable, __file__, "point", *how, str(side)]
            env = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            peak = peaks["fp32" if how[1] == "fp32" else "int8"]
            found[name].append({"side": side, **row, "least_ms": least_ms(config, row["tiles"], row["prompt_tokens"], peak)})
            kept.write_text(json.dumps(found))
            print(name, found[name][-1], flush=True)
    kept.unlink()
    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino")}
    content = {"environment": measure.environment() | versions, "threads": THREADS, "rounds": ROUNDS, "peaks": peaks}
    models.write_json(ROOT / "results" / "sizes.json", content | {"variants": found})


if __name__ == "__main__":
    main()
