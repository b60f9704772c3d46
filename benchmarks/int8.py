"""Int8 for transformers, who makes it right and who makes it fast: `accuracy()` and `speed()` fill results/int8.json.

- accuracy: `mini-vlm` on the committed test split, each variant paired with fp32 on the same questions
- speed: the real-size SmolVLM-256M twin (random weights): vision tower at 512 px, prefill of 97 tokens, one token alone; the
  relative error to fp32 beside each time, since a fast and wrong model is no row of a table

Each returns a dict that JSON can hold. `python benchmarks/int8.py` prints both.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes import data, evaluate, inference, measure, models, quantize, report
from mmrecipes.export import onnx, wrappers
from mmrecipes.mini import model as mini_model

WRONG = 0.2  # relative error from which an output is broken, not rounded
PATIENCE = 30_000  # ms: a first call that took longer is not repeated, unless it compiled
SLOW = 8  # times slower than fp32 on one call: then timed on that one call only
KEEP = {"vision": (), "language": ("down_proj",)}  # four layers with outliers among their inputs, kept in fp32
CALIBRATION = 96  # questions that fix the ranges of static int8
AFEW = 420  # questions where that is enough: bitsandbytes takes many times as long as fp32, and what is broken shows at once
FREE = {"pixel_values": {0: "batch"}, "inputs_embeds": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}


# ---- variants in PyTorch


def torchao_int8(model: nn.Module) -> nn.Module:
    """torchao: int8 weights, one scale a channel, and int8 activations, one scale a token. The tied head is left alone."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    small = models.clone(model)
    ours = {id(layer) for _, layer in models.linears(small)}
    quantize_(small, Int8DynamicActivationInt8WeightConfig(), lambda m, _: id(m) in ours)
    return small


def simulated_torchao_int8(model: nn.Module) -> nn.Module:
    """The arithmetic of `torchao_int8` in float32: quick where the CPU has no integer kernel."""

    def round_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return ((args[0] / scale).round() * scale, *args[1:])

    twin = quantize.simulate(model, 8)
    for _, layer in models.linears(twin):
        layer.register_forward_pre_hook(round_input)
    return twin


def llm_int8(model: nn.Module) -> nn.Module:
    """bitsandbytes LLM.int8: inputs with an entry above 6 stay in floating point, the rest is int8 by row and channel."""
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says that it casts float32 inputs to float16
    small = models.clone(model)
    for name, layer in list(models.linears(small)):
        twin = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        twin.load_state_dict(layer.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(small.get_submodule(parent), last, twin.to("cpu"))
    return small


# ---- accuracy


def feeds(model: nn.Module, n: int = CALIBRATION) -> dict[str, list[dict[str, np.ndarray]]]:
    """What flows into both graphs on `n` calibration questions with their answers: one batch, so all of one shape."""
    found, core = {"vision": [], "language": []}, model.model
    names = {"vision": ("pixel_values",), "language": ("inputs_embeds", "attention_mask")}

    def note(part: str) -> Callable:
        return lambda _, args, kwargs: found[part].append({k: kwargs[k].numpy() for k in names[part]})

    hooks = [
        core.vision_model.register_forward_pre_hook(note("vision"), with_kwargs=True),
        core.text_model.register_forward_pre_hook(note("language"), with_kwargs=True),
    ]
    for inputs, _ in models.teacher_forced(model, data.calibration(n), n):
        with torch.inference_mode():
            model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def accuracy(n: int | None = None) -> dict:
    """Accuracy of each int8 on `mini-vlm`, with its paired change against fp32 on the same questions; None: all of them."""
    rows, model = data.test_split(n), models.load("mini-vlm")
    base = evaluate.vqa(model, rows)
    found = {"torch fp32": {"accuracy": base.overall, "n": len(rows)}}
    probes = [models.chat(model, r["image"], r["question"]) for r in rows.select(range(3))]

    def add(name: str, variant: nn.Module, note: str = "", most: int | None = None) -> None:
        part = rows if most is None or most >= len(rows) else rows.select(range(most))
        result = evaluate.vqa(variant, part)
        change = evaluate.paired(base.right[: len(part)], result.right)
        found[name] = {"accuracy": result.overall, "change": change, "n": len(part), "note": note}
        print(f"{name:36s} {result.overall}  {change}", flush=True)

    add("torch quantize_dynamic", quantize.dynamic_int8(model), "7-bit activations, one scale a tensor")
    simulated = simulated_torchao_int8(model)
    error = report.check_parity(torchao_int8(model), simulated, probes)
    add("torchao", simulated, f"simulated in fp32; its kernels differ from that by {error:.1e} (relative)")
    add("bitsandbytes LLM.int8", llm_int8(model), "inputs above 6 in floating point", AFEW)
    with tempfile.TemporaryDirectory() as folder:
        whole, seen = onnx.export_parts(model, folder), feeds(model)

        def small(name: str, make: Callable, note: str = "", most: int | None = None) -> None:
            graphs = {part: make(part, Path(folder) / f"{part}-{len(found)}.onnx") for part in whole}
            add(name, onnx.attach(model, graphs), note, most)

        add("ONNX Runtime fp32", onnx.attach(model, whole), most=AFEW)
        for kind, reduced, keep, most, note in (
            ("uint8", False, True, None, "down_proj in fp32"),
            ("uint8", False, False, None, "everything int8"),
            ("int8", True, True, AFEW, "7-bit weights, down_proj in fp32"),
            ("int8", False, False, AFEW, "everything int8; products saturate without VNNI"),
        ):

            def dynamic(part: str, out: Path, kind=kind, reduced=reduced, keep=keep) -> Path:
                return onnx.dynamic_int8(whole[part], out, kind, reduced, KEEP[part] if keep else ())

            small(f"ONNX Runtime dynamic, {kind}, {'some kept' if keep else 'all'}", dynamic, note, most)
        for method in ("MinMax", "Percentile"):

            def static(part: str, out: Path, method=method) -> Path:
                config = onnx.StaticConfig(method, reduce_range=True, keep=KEEP[part])
                return onnx.static_int8(whole[part], seen[part], out, config)

            small(f"ONNX Runtime static, {method}", static, f"7-bit weights, down_proj in fp32, {CALIBRATION} questions")
    return {"model": "mini-vlm, trained weights", "variants": found}


# ---- speed


def speed(repeats: int = 5, twin: nn.Module | None = None) -> dict:
    """Milliseconds and relative error of each variant on the real-size twin, or on `twin`, in three stages."""
    torch.manual_seed(0)
    twin = twin or mini_model.real_size("smolvlm-256m")
    side = twin.config.vision_config.image_size
    vision, language = wrappers.Idefics3Vision(twin).eval(), wrappers.LanguageWithoutCache(twin).eval()
    del twin
    width = language.decoder.config.hidden_size
    picture = {"pixel_values": torch.randn(1, 3, side, side)}
    text = {
        k: {"inputs_embeds": torch.randn(1, k, width), "attention_mask": torch.ones(1, k, dtype=torch.int64)} for k in (97, 1)
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for part, module, stages in (
            ("vision", vision, {f"vision tower and connector, {side} px": picture}),
            ("language", language, {"prefill, 97 tokens": text[97], "one token, no cache": text[1]}),
        ):
            found |= {stage: {} for stage in stages}
            example = next(iter(stages.values()))
            with torch.inference_mode():
                wanted = {stage: module(**inputs) for stage, inputs in stages.items()}
            kept: dict[str, Callable] = {}
            for name, fn in _variants(part, module, example, Path(folder)):
                for stage, inputs in stages.items():
                    found[stage][name] = _once(fn, inputs, wanted[stage], found[stage].get("torch fp32"), "compiled" not in name)
                    print(f"{stage:36s} {name:36s} {found[stage][name]}", flush=True)
                if all("slow" not in found[stage][name] for stage in stages):
                    kept[name] = fn
            for stage, inputs in stages.items():
                fns = {name: lambda fn=fn, inputs=inputs: fn(inputs) for name, fn in kept.items()}
                for name, ms in measure.wall(fns, repeats, warmup=1).items():
                    found[stage][name]["ms"] = ms
                base = {p: found[stage].get(f"torch {p}", {}).get("ms", {}).get("median") for p in ("fp32", "bf16")}
                for row in found[stage].values():
                    row["faster"] = {p: base[p] / row["ms"]["median"] for p in base if base[p] and "ms" in row}
            del kept
            gc.collect()
    return {"model": "smolvlm-256m twin, random weights, batch 1", "stages": found}


def _once(fn: Callable, inputs: dict, wanted: Tensor, fp32: dict | None, patient: bool) -> dict:
    """One row: the error of a variant, and its time on the second call, or, `patient`, on the first where that took long."""

    def once() -> tuple[Tensor, float]:
        start = time.perf_counter()
        out = fn(inputs).float()
        return out, 1000 * (time.perf_counter() - start)

    try:
        first, took = once()
        if not patient or took < PATIENCE:
            took = once()[1]
    except Exception as e:  # whatever a backend does not take
        return {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}", "slow": True}
    error = ((first - wanted).norm() / wanted.norm()).item()
    row = {"relative_error": error, "first_ms": took, "wrong": not error < WRONG}
    if fp32 and took > SLOW * fp32["first_ms"]:
        row |= {"slow": True, "ms": {"median": took, "low": took, "high": took}, "note": "timed once"}
    return row


def _variants(part: str, module: nn.Module, example: dict, folder: Path) -> Iterator[tuple[str, Callable]]:
    """Name and function (inputs -> output tensor) of each way to compute `module`, one after another."""

    def torch_(m: nn.Module, dtype: torch.dtype = torch.float32) -> Callable:
        def call(inputs: dict) -> Tensor:
            with torch.inference_mode():
                return m(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})

        return call

    def ort(graph: Path) -> Callable:
        run = inference.onnx_session(graph, torch.get_num_threads()).run
        return lambda inputs: torch.from_numpy(run(None, {k: v.numpy() for k, v in inputs.items()})[0])

    yield "torch fp32", torch_(module)
    half = copy.deepcopy(module).to(torch.bfloat16)
    yield "torch bf16", torch_(half, torch.bfloat16)
    yield "torch fp32 compiled", torch_(torch.compile(module))
    yield "torch quantize_dynamic", torch_(quantize.dynamic_int8(module))
    yield "bitsandbytes LLM.int8", torch_(llm_int8(module))
    graph = onnx.to_onnx(module, _doubled(example), folder / f"{part}.onnx", {k: FREE[k] for k in example})
    yield "ONNX Runtime fp32", ort(graph)
    for kind, reduced in (("uint8", False), ("int8", True), ("int8", False)):
        name = f"ONNX Runtime dynamic, {kind}{' reduced' if reduced else ''} weights"
        yield name, ort(onnx.dynamic_int8(graph, folder / f"{part}-{kind}-{reduced}.onnx", kind, reduced))
    yield from _openvino(module, example)
    small = torchao_int8(module)
    yield "torchao", torch_(small)


def _doubled(example: dict) -> dict:
    """A batch of two: exporters take an axis of length one for fixed."""
    return {k: v.expand(2, *v.shape[1:]).contiguous() for k, v in example.items()}


def _openvino(module: nn.Module, example: dict) -> Iterator[tuple[str, Callable]]:
    """OpenVINO in f32, with int8 weights alone, and with int8 activations (ranges fixed on noise: for speed, not accuracy)."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "tokens")}
    shapes = {k: {axis: dims[name] for axis, name in FREE[k].items()} for k in example}
    with torch.no_grad():
        whole = ov.convert_model(torch.export.export(module, (), _doubled(example), dynamic_shapes=shapes))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def run(model) -> Callable:
        compiled = ov.Core().compile_model(model, "CPU", settings)
        return lambda inputs: torch.from_numpy(compiled([v.numpy() for v in inputs.values()])[0].copy())

    yield "OpenVINO f32", run(whole)
    yield "OpenVINO int8 weights", run(nncf.compress_weights(whole.clone(), mode=nncf.CompressWeightsMode.INT8_SYM))
    noise = nncf.Dataset([[v.numpy() for v in example.values()]] * 2)
    yield "OpenVINO int8", run(nncf.quantize(whole.clone(), noise, subset_size=2, model_type=nncf.ModelType.TRANSFORMER))


if __name__ == "__main__":
    jobs = {"accuracy": accuracy, "speed": speed}
    for job in sys.argv[1:] or jobs:
        print(json.dumps({job: jobs[job]()}, indent=1, default=vars))
