"""Each part of the real-size twin in the runtime that runs it fastest, beside the closest rivals of the bench: ten minutes.

The same measurement as bench.py, interleaved, of few rows; writes results/bench-parts.json.
"""

from __future__ import annotations

from importlib import metadata

import bench

NAMES = (
    "OpenVINO bf16",
    "OpenVINO int8, NNCF",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
    "ours: ONNX Runtime int8",
    "ours: ONNX Runtime int4",
    "ours: OpenVINO int4, vision static",
    "ours: vision static in OpenVINO, ONNX Runtime int8",
    "ours: vision static in OpenVINO, ONNX Runtime int4",
)


def main() -> None:
    from mmrecipes import measure, models

    bench.VARIANTS = {name: how for name, how in bench.VARIANTS.items() if name in ("PyTorch fp32, eager", *NAMES)}
    found = bench.everything([])
    versions = {name: metadata.version(name) for name in ("onnxruntime", "openvino", "nncf")}
    content = {"environment": measure.environment() | versions, "tokens": bench.TOKENS, "threads": bench.THREADS}
    models.write_json(bench.ROOT / "results" / "bench-parts.json", content | {"rounds": bench.ROUNDS, **found})
    bench.show(found["rows"])


if __name__ == "__main__":
    main()
