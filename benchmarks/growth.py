"""How time and memory grow with the prompt and with the context, for the real-size twin's decoder: about ten minutes.

Each point is a fresh process on two threads: a prompt of so many text tokens, then decode steps behind it. Beside each measured
time stands the least that the machine allows (`measure.machine_peaks`): the prompt's FLOP at the int8 peak, a step's weights and
KV cache at the memory's bandwidth. The exported models are those of bench.py in runs/bench, made where they are missing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "bench"
TOKENS, THREADS, ROUNDS, STEPS = (128, 256, 512, 1024, 2048, 4096), 2, 3, 12
VARIANTS = {"ONNX Runtime int8": ("onnx", "int8"), "ONNX Runtime int4": ("onnx", "int4"), "OpenVINO int4": ("openvino", "int4")}


def point(folder: str, tokens: int) -> dict[str, float]:
    """In this process: ms of a prompt of `tokens` text tokens and of one step behind it, medians, and peak MB."""
    sys.modules.update(torch=None, torchao=None)
    from mmrecipes import measure
    from mmrecipes.inference import load_exported

    graphs = load_exported(folder, threads=THREADS).graphs
    ids, prompts, steps = np.random.default_rng(0).integers(100, 400, (1, tokens)), [], []
    for _ in range(1 + ROUNDS):
        graphs.reset()
        begin = time.perf_counter()
        graphs.step(ids)
        prompts.append(1e3 * (time.perf_counter() - begin))
        for i in range(STEPS):
            begin = time.perf_counter()
            graphs.step(ids[:, i : i + 1])
            steps.append(1e3 * (time.perf_counter() - begin))
    # the first round warms up, and a buffer grows at the first step behind a prompt that filled it
    return {
        "prefill_ms": statistics.median(prompts[1:]),
        "decode_ms": statistics.median(steps[STEPS:]),
        "peak_mb": measure.peak_mb(),
    }


def bounds(config: dict, bits: int, tokens: int, peaks: dict) -> dict[str, float]:
    """The least ms of a prompt and of one step behind it: weights once, keys and values of all tokens in float32."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    layer = 2 * hidden * heads * width + 2 * hidden * shared * width + 3 * hidden * inner
    head = hidden * config["vocab_size"]
    products = 2 * tokens * layers * layer + 2 * head  # logits of the last token alone
    attention = 2 * layers * heads * width * tokens**2  # QK and PV, each half of the square; in float32
    cache = 2 * layers * shared * width * tokens * 4
    compute = products / peaks["int8"] / 1e6 + attention / peaks["fp32"] / 1e6
    return {"prefill_ms": compute, "decode_ms": ((layers * layer + head) * bits / 8 + cache) / peaks["bandwidth"] / 1e6}


def run() -> dict:
    """{"peaks", "variants": {name: [a row for each number of tokens]}}"""
    import bench

    from mmrecipes import measure

    peaks = measure.machine_peaks(2.0)
    for how in VARIANTS.values():
        if not (bench.folder(*how) / "mmrecipes_export.json").is_file():
            if not (bench.folder("torch", "") / "model.safetensors").is_file():
                WORK.mkdir(parents=True, exist_ok=True)
                bench.prepare("torch", "fp32")
            bench.prepare(*how)
    config = json.loads((bench.folder("torch", "") / "config.json").read_text())["text_config"]
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for tokens in TOKENS:
        for name, how in VARIANTS.items():
            command = [sys.executable, __file__, "point", str(bench.folder(*how)), str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            least = bounds(config, 4 if how[1] == "int4" else 8, tokens, peaks)
            found[name].append({"tokens": tokens, **row, "bound": least})
            print(name, found[name][-1], flush=True)
    return {"peaks": peaks, "variants": found}


def main() -> None:
    if sys.argv[1:2] == ["point"]:
        print("\n" + json.dumps(point(sys.argv[2], int(sys.argv[3]))))
        return
    from mmrecipes import measure, models

    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino")}
    settings = {"threads": THREADS, "rounds": ROUNDS, "steps": STEPS}
    content = {"environment": measure.environment() | versions, **settings, **run()}
    models.write_json(ROOT / "results" / "growth.json", content)


if __name__ == "__main__":
    main()
