"""The real-size twin (SmolVLM-256M's dimensions, random weights) in every runtime: `make bench`. About an hour on two cores.
BENCH_MODEL=smolvlm2-500m takes the larger one, BENCH_MODEL=qwen2.5-vl-3b one of Qwen2.5-VL-3B's dimensions, each into a file of
its own; arguments pick rows by a part of their name.

One picture of 512 px and 32 words in, 32 tokens out. Each variant runs in a fresh process, on two threads, and all of them in
turn, `ROUNDS` times: a row shows the median of the rounds, and their range. The exported models stay in runs/bench, and are not
made again. Random weights: accuracy means nothing here; "error" is that of the logits, relative to fp32, the largest of the
prompt's and of each token's, with the same tokens fed to all. `load_s` is what a fresh process takes until the model is ready,
imports included (and quantization, where it is done in memory), `first_s` until its first token. The files that are loaded lie
in the page cache. llama.cpp takes part where `make peers` has built it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import bench_torch
from bench_row import CHECKPOINT, END, MODEL, QUESTION, ROOT, THREADS, TOKENS, WORK, measured

PEERS = ROOT / ".venv-peers" / "bin" / "python"  # `make peers`
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
# name -> what it is: a way to load it in PyTorch, or a runtime and how its files are made
VARIANTS = {
    "PyTorch fp32, eager": ("torch", "fp32"),
    "PyTorch bf16, eager": ("torch", "bf16"),
    "PyTorch fp32, compiled": ("torch", "compiled"),
    "PyTorch bf16, compiled": ("torch", "bf16-compiled"),
    "PyTorch int8, quantize_dynamic": ("torch", "quantize_dynamic"),
    "PyTorch int8, torchao": ("torch", "torchao"),
    "PyTorch NF4, bitsandbytes": ("torch", "nf4"),
    "ONNX Runtime fp32, as exported": ("onnx", "plain-fp32"),
    "ONNX Runtime int8, quantize_dynamic": ("onnx", "plain-int8"),
    "ONNX Runtime int8, transformers optimizer": ("onnx", "plain-fused-int8"),
    "ONNX Runtime 4 bits, MatMulNBitsQuantizer": ("onnx", "plain-int4"),
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8, NNCF": ("openvino", "nncf-int8"),
    "OpenVINO 4 bits, NNCF": ("openvino", "nncf-int4"),
    "llama.cpp Q8_0": ("llama.cpp", "q8_0"),
    "llama.cpp Q4_0": ("llama.cpp", "q4_0"),
    "llama.cpp Q4_K_M": ("llama.cpp", "q4_k_m"),
    "llama.cpp Q4_0, mtmd's own prompt": ("llama.cpp", "q4_0-two-tiles"),
    "llama.cpp Q4_0, on our visual tokens": ("llama.cpp", "q4_0-our-tokens"),
    "ours: ONNX Runtime fp32": ("onnx", "fp32"),
    "ours: ONNX Runtime int8": ("onnx", "int8"),
    "ours: ONNX Runtime int4": ("onnx", "int4"),
    "ours: ONNX Runtime int4, vision static": ("onnx", "static"),
    "ours: OpenVINO int4": ("openvino", "int4"),
    "ours: OpenVINO int4, vision static": ("openvino", "static"),
    "ours: vision static in OpenVINO, ONNX Runtime int8": ("mixed", "int8"),
    "ours: vision static in OpenVINO, ONNX Runtime int4": ("mixed", "int4"),
    "ours: ExecuTorch int8": ("executorch", "int8"),
}
QWEN_ROWS = ("PyTorch fp32, eager", "PyTorch bf16, eager", "llama.cpp Q8_0", "llama.cpp Q4_0")
QWEN_ROWS += ("ours: ONNX Runtime int8", "ours: ONNX Runtime int4")
QWEN_NOTES = [
    "OpenVINO has no row: its export of this decoder was not tried, whose float32 weights take 12 GB beside those of PyTorch."
]
QWEN_NOTES += ["Peak memory counts the pages of files that are mapped: while an export loads, those of the checkpoint (7.5 GB)."]
if MODEL.startswith("qwen"):
    VARIANTS = {name: VARIANTS[name] for name in QWEN_ROWS}
NOTES = ["OpenVINO GenAI has no row: its VLMPipeline (2026.4.1) ends with \"Unsupported 'idefics3' VLM model type\"."]
NOTES += ["ONNX Runtime's transformer optimizer fuses norms and biases in these graphs, and finds no attention that it knows."]


def folder(runtime: str, how: str) -> Path:
    how = how.partition("-")[0] if runtime == "llama.cpp" else how  # the rest of it is about the prompt
    return CHECKPOINT if runtime == "torch" else WORK / f"{runtime}-{how}"


def applies(runtime: str, how: str) -> bool:
    """OpenVINO computes in bf16 only where the CPU has instructions for it, and in fp32 elsewhere, whatever it is told."""
    from mmrecipes import measure

    if runtime == "llama.cpp":
        return PEERS.exists()
    return (runtime, how) != ("openvino", "bf16") or any("bf16" in c for c in measure.environment()["capabilities"])


# ---- prepare: checkpoint, picture, exports


def prepare(runtime: str, how: str) -> None:
    """Write the files of one variant, unless they are there."""
    from mmrecipes import models
    from mmrecipes.data import scenes
    from mmrecipes.mini import model as mini_model

    if runtime == "torch":
        if MODEL.startswith("qwen"):
            import qwen_checkpoint

            qwen_checkpoint.write(CHECKPOINT)
        else:
            models.save(twin := mini_model.real_size(MODEL), twin.processor, CHECKPOINT, "bfloat16")
        scenes.render(scenes.make_scene(5), 512).save(WORK / "picture.png")
        return
    if runtime == "llama.cpp":
        peer("write", folder(runtime, how), how.partition("-")[0])
        return
    import peer_exports

    from mmrecipes import export

    model, out = models.load(CHECKPOINT), folder(runtime, how)
    if how.startswith("plain-"):
        peer_exports.plain_onnx(model, out, how.removeprefix("plain-"))
    elif how.startswith("nncf-"):
        peer_exports.plain_openvino(model, out, how.removeprefix("nncf-"))
    elif how == "static" or runtime == "mixed":
        seen = [scenes.render(scenes.make_scene(seed), 512) for seed in range(10, 14)]
        where = {"vision": "openvino", "language": "onnx"} if runtime == "mixed" else runtime
        precisions = {"vision": "static", "language": "int4" if how == "static" else how}
        with export.written(model, out, where, precisions, seen, False):
            pass
    elif how == "fp32":
        export.export(model, out, runtime, how)
    else:
        with export.written(model, out, runtime, how, (), False):
            pass


def ready(place: Path) -> bool:
    """Whether all files of a variant are there: each of these is written last."""
    from mmrecipes import inference

    return any((place / name).exists() for name in (inference.MANIFEST, "model.safetensors", "types.txt"))


# ---- one variant in this process


def run(runtime: str, how: str, forced: list[int] | None) -> dict:
    """What `bench_row.measured` finds; without `forced` also the prompt and its visual tokens, for peers.py."""
    if runtime == "torch":
        row = measured(lambda: bench_torch.load(how), bench_torch.calls, CHECKPOINT, forced)
        return row if forced else row | bench_torch.reference()
    if runtime != "executorch":  # whose Python API takes PyTorch's tensors
        sys.modules.update(torch=None, torchao=None)  # as where only the runtime is installed: it needs no PyTorch
    return measured(lambda: _load_exported(folder(runtime, how)), _exported_calls, folder(runtime, how), forced)


def _load_exported(place: Path):
    from mmrecipes import inference

    return inference.load_exported(place, threads=THREADS)


def _exported_calls(loaded):
    import numpy as np
    from PIL import Image

    inputs = loaded.inputs(Image.open(WORK / "picture.png"), QUESTION)
    return lambda: loaded.prefill(inputs), lambda token: loaded.graphs.step(np.array([[token]]))


# ---- all of them


def child(*arguments: str, python: Path = Path(sys.executable), script: Path = Path(__file__)) -> str:
    """The last line that a fresh process prints."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.rpartition("\n\n")[2]


def peer(command: str, place: Path, how: str) -> str:
    return child(command, str(place), how, python=PEERS, script=Path(__file__).with_name("peers.py"))


def run_fresh(name: str, reference: Path) -> dict:
    """The row of one variant, from a process of its own, with the tokens of the reference if there is one."""
    runtime, how = VARIANTS[name]
    if runtime == "llama.cpp":
        return json.loads(peer("run", folder(runtime, how), how))
    return json.loads(child("run", name, *([str(reference)] if reference.exists() else [])))


def everything(only: list[str]) -> dict:
    """All rows, and what each export took."""
    import shutil

    from tqdm import tqdm

    WORK.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in VARIANTS if not only or any(o in n for o in only)]
    if not wanted:
        raise SystemExit(f"no variant is called {' or '.join(only)}; there are: {', '.join(VARIANTS)}")
    if not PEERS.exists() and any(VARIANTS[n][0] == "llama.cpp" for n in wanted):
        print("llama.cpp is left out: `make peers` builds it")
    names = [n for n in wanted if applies(*VARIANTS[n])]
    names = list(dict.fromkeys(["PyTorch fp32, eager", *names]))
    exports = WORK / "exports.json"
    made = json.loads(exports.read_text()) if exports.exists() else {}
    for name in tqdm(names, desc="exports"):
        place = folder(*VARIANTS[name])
        if not ready(place):
            shutil.rmtree(place, ignore_errors=True)
            made[name] = json.loads(child("prepare", name))
            exports.write_text(json.dumps(made))
    rounds: dict[str, list[dict]] = {n: [] for n in names}
    reference = WORK / "reference.json"
    reference.unlink(missing_ok=True)  # left by an interrupted run, maybe of another checkpoint
    for _ in range(ROUNDS):
        for name in tqdm(names, desc="runs"):
            row = run_fresh(name, reference)
            if not reference.exists():  # the first of all, PyTorch in fp32
                keys = ("tokens", "prompt", "prompt_ids", "positions", "image_token_id", "visual_tokens")
                reference.write_text(json.dumps({key: row[key] for key in keys}))
            rounds[name].append(row)
    reference.unlink()
    return {"rows": _rows(rounds), "exports": made}


def _rows(rounds: dict[str, list[dict]]) -> list[dict]:
    import numpy as np

    wanted = [np.array(each) for each in rounds["PyTorch fp32, eager"][0]["logits"]]
    rows = []
    for name, runs in rounds.items():
        row: dict = {"name": name}
        for key in ("ttft_ms", "tokens_per_s", "peak_mb", "load_s", "first_s"):
            values = [r[key] for r in runs]
            row |= {key: statistics.median(values), f"{key}_range": [min(values), max(values)]}
        found = [np.array(each) for each in runs[0]["logits"]]
        errors = [np.linalg.norm(f - w) / np.linalg.norm(w) for f, w in zip(found, wanted, strict=True)]
        row |= {"disk_mb": runs[0]["disk_mb"], "error": float(np.max(errors))}
        rows.append(row | {key: runs[0][key] for key in ("note",) if key in runs[0]})
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(f"{'variant':42s} {'TTFT ms':>8s} {'x':>5s} {'tokens/s':>8s} {'x':>5s} {'peak MB':>8s} {'disk MB':>8s}", end="")
    print(f" {'load s':>7s} {'first s':>7s} {'error':>8s}")
    for r in rows:
        faster, rate = first["ttft_ms"] / r["ttft_ms"], r["tokens_per_s"] / first["tokens_per_s"]
        print(
            f"{r['name']:42s} {r['ttft_ms']:8.0f} {faster:5.2f} {r['tokens_per_s']:8.1f} {rate:5.2f} {r['peak_mb']:8.0f} "
            f"{r['disk_mb']:8.0f} {r['load_s']:7.2f} {r['first_s']:7.2f} {r['error']:8.1g}"
        )
    for r in rows:
        if "note" in r:
            print(f"{r['name']}: {r['note']}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["prepare"]:
        start = time.perf_counter()
        prepare(*VARIANTS[arguments[1]])
        from mmrecipes import measure

        made = {"seconds": time.perf_counter() - start, "peak_mb": measure.peak_mb(), "commit": measure.environment()["commit"]}
        print("\n\n" + json.dumps(made))
    elif arguments[:1] == ["run"]:
        forced = json.loads(Path(arguments[2]).read_text())["tokens"] if len(arguments) > 2 else None
        print("\n\n" + json.dumps(run(*VARIANTS[arguments[1]], forced)))
    else:
        from mmrecipes import measure, models

        found = everything(arguments)
        words = {"model": MODEL, "question": QUESTION, "tokens": TOKENS, "threads": THREADS, "rounds": ROUNDS}
        versions = {n: metadata.version(n) for n in ("onnxruntime", "openvino", "nncf", "torchao", "bitsandbytes", "executorch")}
        if any(row["name"].startswith("llama.cpp") for row in found["rows"]):
            pinned = Path(__file__).with_name("peers.txt").read_text()
            versions["llama-cpp-python"] = re.search("llama-cpp-python==(.*)", pinned)[1]
        content = {
            "environment": measure.environment() | versions,
            **words,
            **found,
            "notes": QWEN_NOTES if MODEL.startswith("qwen") else NOTES,
        }
        if not arguments or END:  # a part of the main table is for the eye alone
            models.write_json(ROOT / "results" / f"bench{END}.json", content)
        show(found["rows"])


if __name__ == "__main__":
    main(sys.argv[1:])
