"""Several replicas of one model behind Ray Serve: throughput, autoscaling, a killed replica: `python benchmarks/scale_out.py`.

Ray lives in an environment of its own (`make ray`); scale_out_ray.py runs there. Here the exported model is made, and what it
answers alone, which every replica has to answer, too. Writes results/scale_out.json.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from mmrecipes import data, export, inference, measure, models

ROOT = Path(__file__).resolve().parent.parent
RAY = ROOT / ".venv-ray" / "bin" / "python"  # `make ray`
QUESTIONS = 96


def png(image: object) -> str:
    held = io.BytesIO()
    image.save(held, "png")
    return base64.b64encode(held.getvalue()).decode()


def run() -> dict:
    if not RAY.exists():
        raise SystemExit("scale_out: Ray is not installed: `make ray` builds its environment, .venv-ray")
    with tempfile.TemporaryDirectory() as work:
        folder = export.export(models.load("mini-vlm"), Path(work) / "mini-vlm", "onnx", "int8")
        alone, rows = inference.load_exported(folder, threads=1), []
        for i, row in enumerate(data.test_split(QUESTIONS)):
            answer = alone.generate([row["image"]], row["question"], 8)
            rows.append({"id": i, "image": png(row["image"]), "question": row["question"], "answer": answer})
        questions, out = Path(work) / "rows.json", Path(work) / "found.json"
        questions.write_text(json.dumps(rows))
        env = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        script = Path(__file__).with_name("scale_out_ray.py")
        subprocess.run([RAY, script, folder, questions, out], env=env, check=True)
        return json.loads(out.read_text())


def main() -> None:
    found = run()
    versions = {"onnxruntime": metadata.version("onnxruntime"), "ray": found.pop("ray")}
    content = {"environment": measure.environment() | versions, "model": "mini-vlm, ONNX Runtime int8", "threads": 1, **found}
    models.write_json(ROOT / "results" / "scale_out.json", content)


if __name__ == "__main__":
    main()
