"""mini-vlm in vLLM's server, over HTTP: bf16, W8A8 and W4A16 (GPTQ) as `export` writes them, beside the same files in PyTorch.

`make vllm` installs vLLM for CPUs into .venv-vllm and runs this: the same 200 test questions, each with its image, to a server
on this machine and to `models.load` of the same checkpoint. Writes results/vllm.json. Nothing here is timed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmrecipes import data, evaluate, export, measure, models, quantize

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
N = 200
TOGETHER = 4  # requests in flight, so that the server batches them
# one GB of KV cache, threads left to the system, and no reports about its use
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
SETTINGS |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
OPTIONS = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"]
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
PACKAGES = ["vllm-cpu", "torch", "transformers", "compressed-tensors"]


def checkpoints(folder: Path) -> dict[str, Path]:
    """mini-vlm in bf16, and its language model in int8 and in 4 bits by GPTQ on images, groups of 32."""
    model = models.load("mini-vlm")
    part = models.part_of(model)
    bits = {n: 4 for n, _ in models.linears(model) if part[f"{n}.weight"] == "language"}
    four = quantize.calibrate(model, data.calibration(64), bits, group_size=quantize.GROUP)
    return {
        "bf16": models.save(model, model.processor, folder / "bf16"),
        "w8a8": export.export(model, folder / "w8a8", "compressed-tensors", "w8a8"),
        "w4a16": export.export(four, folder / "w4a16", "compressed-tensors", "w4a16"),
    }


@contextlib.contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server on the loopback address, ready to answer: its URL. RuntimeError with the log's end where it stops."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--served-model-name", "mini-vlm"]
    command += [*OPTIONS, "--host", "127.0.0.1", "--port", port]
    with log.open("w") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out, env=os.environ | SETTINGS, cwd=log.parent)
        try:
            while not ready(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    raise RuntimeError(f"vLLM ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait()


def ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(url).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(url: str, row: dict) -> str:
    """The answer to one question about one image, greedy, at most 8 tokens as in `evaluate.vqa`."""
    png = base64.b64encode(data.encode_png(row["image"])["bytes"]).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]
    body = {"model": "mini-vlm", "messages": messages, "temperature": 0, "max_tokens": 8}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"].strip()


def run(n: int = N) -> dict:
    """What results/vllm.json says: for each checkpoint, accuracy here and in vLLM, and both compared question by question."""
    rows, variants = data.test_split(n), {}
    whole = evaluate.vqa(models.load("mini-vlm"), rows)
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint in checkpoints(Path(folder)).items():
            ours = evaluate.vqa(models.load(checkpoint), rows)
            with server(checkpoint, Path(folder) / f"{name}.log") as url, ThreadPoolExecutor(TOGETHER) as pool:
                answers = list(pool.map(lambda row, url=url: ask(url, row), rows))
            served = evaluate.score(answers, rows["answer"][:], rows["family"][:], whole.floors)
            variants[name] = {
                "disk_mb": measure.disk_bytes(checkpoint) / 1e6,
                "ours": ours.overall,
                "vllm": served.overall,
                "vllm against ours": evaluate.paired(ours.right, served.right),
                "vllm against fp32": evaluate.paired(whole.right, served.right),
                "same answers": evaluate.agreement(answers, ours.predictions),
            }
            print(f"{name:6s} ours {ours.overall}, vLLM {served.overall}, {variants[name]['vllm against ours']}", flush=True)
    versions = subprocess.run([PYTHON, "-c", VERSIONS % PACKAGES], capture_output=True, text=True, check=True).stdout
    return {"vllm": json.loads(versions), "options": OPTIONS, "n": n, "fp32": whole.overall, "variants": variants}


if __name__ == "__main__":
    if not PYTHON.exists():
        raise SystemExit("vLLM is not installed in .venv-vllm: run `make vllm`")
    models.write_json(ROOT / "results" / "vllm.json", {"environment": measure.environment(), **run()})
