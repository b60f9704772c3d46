"""The real-size twin (SmolVLM-256M's dimensions, random weights) in every runtime: `make bench`. About an hour on two cores.

One picture of 512 px and 32 words in, 32 tokens out. Each variant runs in a fresh process, on two threads, and all of them in
turn, `ROUNDS` times: a row shows the median of the rounds, and their range. The exported models stay in runs/bench, and are not
made again. Random weights: accuracy means nothing here; "error" is that of the logits, relative to fp32, the larger of the
prompt's and of the last token's, with the same tokens fed to all.
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

WORK = Path(__file__).resolve().parent.parent / "runs" / "bench"
ROUNDS, RUNS, TOKENS, THREADS = 3, 1, 32, 2
QUESTION = "What is in this picture? Name each of the objects, say what colour it has, how large it is, and where it is."
# name -> what it is: a way to load it in PyTorch, or a runtime and how its files are made
VARIANTS = {
    "PyTorch fp32, eager": ("torch", "fp32"),
    "PyTorch bf16, eager": ("torch", "bf16"),
    "PyTorch fp32, compiled": ("torch", "compiled"),
    "PyTorch int8, quantize_dynamic": ("torch", "quantize_dynamic"),
    "PyTorch int8, torchao": ("torch", "torchao"),
    "PyTorch NF4, bitsandbytes": ("torch", "nf4"),
    "ONNX Runtime fp32, as exported": ("onnx", "plain-fp32"),
    "ONNX Runtime int8, quantize_dynamic": ("onnx", "plain-int8"),
    "ONNX Runtime 4 bits, MatMulNBitsQuantizer": ("onnx", "plain-int4"),
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8, NNCF": ("openvino", "nncf-int8"),
    "OpenVINO 4 bits, NNCF": ("openvino", "nncf-int4"),
    "ours: ONNX Runtime fp32": ("onnx", "fp32"),
    "ours: ONNX Runtime int8": ("onnx", "int8"),
    "ours: ONNX Runtime int4": ("onnx", "int4"),
    "ours: ONNX Runtime int4, vision static": ("onnx", "static"),
    "ours: OpenVINO int4": ("openvino", "int4"),
    "ours: OpenVINO int4, vision static": ("openvino", "static"),
    "ours: ExecuTorch int8": ("executorch", "int8"),
}


def folder(runtime: str, how: str) -> Path:
    return WORK / ("checkpoint" if runtime == "torch" else f"{runtime}-{how}")


def applies(runtime: str, how: str) -> bool:
    """OpenVINO computes in bf16 only where the CPU has instructions for it, and in fp32 elsewhere, whatever it is told."""
    from mmrecipes import measure

    return (runtime, how) != ("openvino", "bf16") or any("bf16" in c for c in measure.environment()["capabilities"])


# ---- prepare: checkpoint, picture, exports


def prepare(runtime: str, how: str) -> None:
    """Write the files of one variant, unless they are there."""
    from mmrecipes import models
    from mmrecipes.data import scenes
    from mmrecipes.mini import model as mini_model

    if runtime == "torch":
        models.save(twin := mini_model.real_size(), twin.processor, folder("torch", ""), "bfloat16")
        scenes.render(scenes.make_scene(5), 512).save(WORK / "picture.png")
        return
    from mmrecipes import export

    model = models.load(folder("torch", ""))
    if how.startswith("plain-"):
        _plain_onnx(model, how.removeprefix("plain-"))
    elif how.startswith("nncf-"):
        _plain_openvino(model, how.removeprefix("nncf-"))
    elif how == "static":
        seen = [scenes.render(scenes.make_scene(seed), 512) for seed in range(10, 14)]
        with export.written(model, folder(runtime, how), runtime, {"vision": "static", "language": "int4"}, seen, False):
            pass
    elif how == "fp32":
        export.export(model, folder(runtime, how), runtime, how)
    else:
        with export.written(model, folder(runtime, how), runtime, how, (), False):
            pass


def _plain_onnx(model, how: str) -> None:
    """As the exporters write it, without fusions, and then the runtime's own quantizer with its defaults."""
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from mmrecipes import export
    from mmrecipes.export import wrappers
    from mmrecipes.export.onnx import strip_metadata
    from mmrecipes.quiet import library_logs

    out = folder("onnx", f"plain-{how}")
    out.mkdir()
    tower, picture = wrappers.vision_wrapper(model)
    module, example, axes = wrappers.language_wrapper(model)
    graphs = {"vision": out / "vision.onnx", "language": out / "language.onnx"}
    with library_logs(), torch.no_grad():
        torch.onnx.export(tower.eval(), (picture,), dynamo=True, verbose=False).save(graphs["vision"], external_data=False)
        config = OnnxConfig(dynamic_shapes=axes, prefer_deferred_runtime_asserts_over_guards=True)
        program = OnnxExporter().export(module, example, config).program
        import onnx_ir

        onnx_ir.save(program, str(graphs["language"]))
        for graph in graphs.values():
            if how == "int8":
                quantize_dynamic(graph, graph)
            elif how == "int4":
                found = MatMulNBitsQuantizer(str(graph))
                found.process()
                found.model.save_model_to_file(str(graph))
    for graph in graphs.values():
        strip_metadata(graph)
    export.write_manifest(model, out, export.BACKENDS["onnx"], {"vision": how, "language": how})


def _plain_openvino(model, how: str) -> None:
    import nncf
    import openvino as ov

    from mmrecipes import export
    from mmrecipes.export import openvino

    # from our graph, whose attention OpenVINO keeps whole: so weights alone are compared, and the peer is at its best
    mode = {"int8": {}, "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64}}[how]  # 128 does not divide 576
    out = folder("openvino", f"nncf-{how}")
    out.mkdir()
    openvino.write_openvino(model, out, {"vision": "fp32", "language": "fp32"}, [])
    for part in export.PARTS:
        small = nncf.compress_weights(ov.Core().read_model(out / f"{part}.xml"), **mode)
        ov.save_model(small, out / "small.xml", compress_to_fp16=False)
        for ending in ("xml", "bin"):
            (out / f"small.{ending}").replace(out / f"{part}.{ending}")
    export.write_manifest(model, out, export.BACKENDS["openvino"], {"vision": how, "language": how})


# ---- one variant in this process


def run(runtime: str, how: str, forced: list[int] | None) -> dict:
    """Median ms to the first token, tokens a second, peak memory and bytes; and the logits, for the error."""
    import numpy as np

    if runtime == "torch":
        look, step = _torch(how)
    else:
        if runtime != "executorch":  # whose Python API takes PyTorch's tensors
            sys.modules.update(torch=None, torchao=None)  # as where only the runtime is installed: it needs no PyTorch
        look, step = _exported(runtime, how)
    from mmrecipes import measure

    # the first run warms up: kernels are chosen, pages touched
    runs = [measure.time_generation(look, step, TOKENS - 1, forced) for _ in range(1 + RUNS)][1:]
    logits = runs[-1][2]
    tokens = list(forced or (int(each.argmax()) for each in logits[:-1]))
    files = [p for p in folder(runtime, how).iterdir() if p.name.startswith(("model", "vision", "language"))]
    ttft, step_ms = (statistics.median(run[i] for run in runs) for i in (0, 1))
    row = {"ttft_ms": ttft, "tokens_per_s": 1e3 / step_ms, "peak_mb": measure.peak_mb()}
    row |= {"disk_mb": sum(p.stat().st_size for p in files) / 1e6, "tokens": tokens}
    return row | {"logits": [np.asarray(each, np.float32).tolist() for each in logits]}


def _exported(runtime: str, how: str):
    import numpy as np
    from PIL import Image

    from mmrecipes import inference

    loaded = inference.load_exported(folder(runtime, how), threads=THREADS)
    inputs = loaded.inputs(Image.open(WORK / "picture.png"), QUESTION)
    return lambda: loaded.prefill(inputs), lambda token: loaded.graphs.step(np.array([[token]]))


def _torch(how: str):
    import torch

    from mmrecipes import models, quantize

    torch.set_num_threads(THREADS)
    model = _nf4() if how == "nf4" else models.load(folder("torch", ""), dtype="bfloat16" if how == "bf16" else "float32")
    inputs = models.chat(model, WORK / "picture.png", QUESTION)
    if how == "quantize_dynamic":
        model = quantize.dynamic_int8(model)
    elif how == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    elif how == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)
    kept = {}

    @torch.inference_mode()
    def look():
        kept["cache"] = None
        return _next(inputs)

    @torch.inference_mode()
    def step(token: int):
        return _next({"input_ids": torch.tensor([[token]])})

    def _next(given):
        found = model(**given, past_key_values=kept["cache"], use_cache=True, logits_to_keep=1)
        kept["cache"] = found.past_key_values
        return found.logits[0, -1].float().numpy()

    return look, step


def _nf4():
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(folder("torch", ""), quantization_config=config, dtype=torch.float32)
    model.processor = AutoProcessor.from_pretrained(folder("torch", ""))
    return model.eval()


# ---- all of them


def _child(*arguments: str) -> dict:
    """What a fresh process prints last, as JSON; with its seconds and peak memory for a preparation."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def everything(only: list[str]) -> dict:
    """All rows, and what each export took."""
    import shutil

    from tqdm import tqdm

    from mmrecipes import inference

    WORK.mkdir(parents=True, exist_ok=True)
    names = [n for n, how in VARIANTS.items() if applies(*how) and (not only or any(o in n for o in only))]
    if not names:
        raise SystemExit(f"no variant is called {' or '.join(only)}; there are: {', '.join(VARIANTS)}")
    names = list(dict.fromkeys(["PyTorch fp32, eager", *names]))
    exports = WORK / "exports.json"
    made = json.loads(exports.read_text()) if exports.exists() else {}
    for name in tqdm(names, desc="exports"):
        place = folder(*VARIANTS[name])
        if not (place / inference.MANIFEST).exists() and not (place / "model.safetensors").exists():
            shutil.rmtree(place, ignore_errors=True)
            made[name] = _child("prepare", name)
            exports.write_text(json.dumps(made))
    rounds: dict[str, list[dict]] = {n: [] for n in names}
    reference = WORK / "reference.json"
    reference.unlink(missing_ok=True)  # left by an interrupted run, maybe of another checkpoint
    for _ in range(ROUNDS):
        for name in tqdm(names, desc="runs"):
            row = _child("run", name, *([str(reference)] if reference.exists() else []))
            if name == "PyTorch fp32, eager":
                reference.write_text(json.dumps(row["tokens"]))
            rounds[name].append(row)
    reference.unlink()
    return {"rows": _rows(rounds), "exports": made}


def _rows(rounds: dict[str, list[dict]]) -> list[dict]:
    import numpy as np

    wanted = [np.array(each) for each in rounds["PyTorch fp32, eager"][0]["logits"]]
    rows = []
    for name, runs in rounds.items():
        row: dict = {"name": name}
        for key in ("ttft_ms", "tokens_per_s", "peak_mb"):
            values = [r[key] for r in runs]
            row |= {key: statistics.median(values), f"{key}_range": [min(values), max(values)]}
        found = [np.array(each) for each in runs[0]["logits"]]
        errors = [np.linalg.norm(f - w) / np.linalg.norm(w) for f, w in zip(found, wanted, strict=True)]
        rows.append(row | {"disk_mb": runs[0]["disk_mb"], "error": float(np.max(errors))})
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(f"{'variant':42s} {'TTFT ms':>8s} {'x':>5s} {'tokens/s':>8s} {'x':>5s} {'peak MB':>8s} {'disk MB':>8s} {'error':>8s}")
    for r in rows:
        faster, rate = first["ttft_ms"] / r["ttft_ms"], r["tokens_per_s"] / first["tokens_per_s"]
        print(
            f"{r['name']:42s} {r['ttft_ms']:8.0f} {faster:5.2f} {r['tokens_per_s']:8.1f} {rate:5.2f} "
            f"{r['peak_mb']:8.0f} {r['disk_mb']:8.0f} {r['error']:8.1g}"
        )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["prepare"]:
        start = time.perf_counter()
        prepare(*VARIANTS[arguments[1]])
        from mmrecipes import measure

        made = {"seconds": time.perf_counter() - start, "peak_mb": measure.peak_mb(), "commit": measure.environment()["commit"]}
        print("\n" + json.dumps(made))
    elif arguments[:1] == ["run"]:
        forced = json.loads(Path(arguments[2]).read_text()) if len(arguments) > 2 else None
        print("\n" + json.dumps(run(*VARIANTS[arguments[1]], forced)))
    else:
        from mmrecipes import measure, models

        found = everything(arguments)
        words = {"question": QUESTION, "tokens": TOKENS, "threads": THREADS, "rounds": ROUNDS}
        versions = {n: metadata.version(n) for n in ("onnxruntime", "openvino", "nncf", "torchao", "bitsandbytes", "executorch")}
        content = {"environment": measure.environment() | versions, **words, **found}
        if not arguments:  # a part of the table is for the eye alone
            models.write_json(Path(__file__).resolve().parent.parent / "results" / "bench.json", content)
        show(found["rows"])


if __name__ == "__main__":
    main(sys.argv[1:])
