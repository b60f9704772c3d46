"""Where the time goes in the real-size twin's graphs, by kind of operator: vision encoder, prompt, one token. A minute or two.

ONNX Runtime's profiler and OpenVINO's counters, on one thread, so that the parts of an operator do not overlap; the median over
the runs counts for each operator. The exported models are those of bench.py, in runs/bench. Writes results/where.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import bench
import numpy as np
from bench_row import QUESTION, ROOT, WORK

RUNS, CACHED = 7, 256
VARIANTS = {
    "ONNX Runtime fp32": ("onnx", "fp32"),
    "ONNX Runtime int8": ("onnx", "int8"),
    "ONNX Runtime int4": ("onnx", "int4"),
    "OpenVINO static": ("openvino", "static"),
}


def onnx_kinds(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    """{kind of operator: ms of one run}"""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(1 + RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    times, kinds = defaultdict(list), {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1e3)
            kinds[event["name"]] = event["args"]["op_name"]
    found: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        found[kinds[name]] += statistics.median(spent[1:]) * max(1, len(spent) // (1 + RUNS))
    return dict(found)


def openvino_kinds(path: Path, feeds: list[np.ndarray]) -> dict[str, float]:
    import openvino as ov

    settings = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    times, kinds = defaultdict(list), {}
    for _ in range(1 + RUNS):
        request.infer(feeds)
        for each in request.profiling_info:
            times[each.node_name].append(each.real_time.total_seconds() * 1e3)
            kinds[each.node_name] = f"{each.node_type} {each.exec_type}"
    found: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        found[kinds[name]] += statistics.median(spent[1:])
    return {kind: ms for kind, ms in found.items() if ms}


def language_feeds(path: Path, tokens: int, cached: int) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {}
    for port in session.get_inputs():
        if port.name == "input_ids":
            feeds[port.name] = np.arange(100, 100 + tokens)[None]
        elif port.name == "past_length":
            feeds[port.name] = np.array([cached])
        elif port.name == "image_features":
            feeds[port.name] = np.zeros((1, port.shape[1]), np.float32)
        else:  # the cache
            feeds[port.name] = np.zeros((1, port.shape[1], cached, port.shape[3]), np.float32)
    return feeds


def main() -> None:
    from PIL import Image

    from mmrecipes import inference, measure, models

    image, found = Image.open(WORK / "picture.png"), {}
    for name, (runtime, how) in VARIANTS.items():
        place = bench.folder(runtime, how)
        loaded = inference.load_exported(place, threads=1)
        inputs = loaded.inputs(image, QUESTION)
        run = loaded.family.images(inputs, loaded.settings)[0]
        tokens = inputs["input_ids"].shape[1]
        del loaded
        if runtime == "openvino":
            found[name] = {"vision": openvino_kinds(place / "vision.xml", list(run.values()))}
            continue
        found[name] = {
            "vision": onnx_kinds(place / "vision.onnx", run),
            "prompt": onnx_kinds(place / "language.onnx", language_feeds(place / "language.onnx", tokens, 0)),
            "token": onnx_kinds(place / "language.onnx", language_feeds(place / "language.onnx", 1, CACHED)),
        }
    for name, parts in found.items():
        for part, kinds in parts.items():
            total = sum(kinds.values())
            largest = sorted(kinds.items(), key=lambda kind: -kind[1])[:6]
            print(f"{name:20s} {part:7s} {total:8.1f} ms", *(f"{kind} {ms / total:.0%}" for kind, ms in largest))
    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino")}
    content = {"environment": measure.environment() | versions, "runs": RUNS, "threads": 1, "cached": CACHED, "ms": found}
    models.write_json(ROOT / "results" / "where.json", content)


if __name__ == "__main__":
    sys.exit(main())
