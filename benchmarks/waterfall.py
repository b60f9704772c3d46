"""What each step of `fast_resampler.faster` gives, on a model with Megrez's published widths: `python benchmarks/waterfall.py`.

SigLIP-SO400M's layers, a resampler of 64 queries and a language model of 3B parameters, random weights, of each tower the first
few layers alone (DEPTH; 27 and 32 are published), so that fp32 fits: beside what was measured stands what it comes to with all
layers, their time and bytes counted as often as there are layers. One prompt with four images of 256, 512, 768 and 1,024 px:

    sliced  as the public code gives them to the encoder: cut into slices of about 448 px by MiniCPM-V's rule, all in one batch,
            padded to the longest. The baseline: eager attention, fp32 or bf16, weights kept in the resampler, all logits
    native  each image whole, as `mini-resampler` reads it, padded to the largest. Eager attention would need more memory than
            MEMORY_GB; the baseline has SDPA
    agree   `mini-resampler`, trained: how many answers are unchanged, in batches of mixed sizes

Every measurement is a fresh process with a peak of its own; ROUNDS of them, interleaved. What is done lies in runs/waterfall,
and a stopped run goes on there: remove it after a change of code. Writes results/waterfall.json; about 15 minutes on two cores.
`--quick` tries everything with tiny widths, and writes runs/waterfall/quick.json. `sliced`, `native`, `agree`: only these.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrecipes import data, evaluate, measure, models
from mmrecipes.evaluate.statistics import agreement
from mmrecipes.measure.process import run_fresh
from mmrecipes.mini import fast_resampler, resampler
from mmrecipes.mini import modeling_mini_resampler as modeling

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "waterfall"
ROUNDS = int(os.environ.get("ROUNDS", 3))
MEMORY_GB = float(os.environ.get("MEMORY_GB", 14))  # what a process may take
SIDES, PATCH, SLICE, MOST = (256, 512, 768, 1024), 14, 448, 9  # px; slices an image
PUBLISHED, DEPTH = {"vision": 27, "language": 32}, {"vision": 2, "language": 3}
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh"}
TEXT = {"hidden_size": 2560, "intermediate_size": 7168, "num_attention_heads": 40, "num_key_value_heads": 10}
TEXT |= {"vocab_size": 122_880}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
IMAGE, QUESTION = 3, 40  # the image token's id; tokens of the question
SIZES = ((96, 96), (128, 128), (192, 192), (256, 256), (384, 384), (384, 192), (192, 384))  # px, of `agree`
ASKED = 420

ALL = fast_resampler.STEPS
CUMULATIVE = {"fp32, eager": (), **{f"+ {step}": ALL[: i + 1] for i, step in enumerate(ALL)}}
LOWER = {"+ bf16": (*ALL, "bf16"), "+ int8": (*ALL, "int8")}
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sliced": {**CUMULATIVE, **LOWER, "bf16, eager": ("bf16",), "bf16, SDPA": ("sdpa", "bf16")},
    "native": {
        **{"fp32, eager": (), "fp32, SDPA": ("sdpa",), "+ packed": ("sdpa", "packed"), "+ all others": ALL},
        **{**LOWER, "bf16, eager": ("bf16",), "bf16, SDPA": ("sdpa", "bf16")},
    },
}


# ---- what goes in


def fitted(width: float, height: float) -> tuple[int, int]:
    """Rows and columns of patches of an image scaled to about SLICE x SLICE px, its aspect ratio kept."""
    ratio = width / height
    height = int(SLICE / math.sqrt(ratio))
    return max(1, round(height / PATCH)), max(1, round(int(height * ratio) / PATCH))


def sliced(width: int, height: int) -> list[tuple[int, int]]:
    """Patch grids of an image as MiniCPM-V cuts it: an overview and, where it is larger than a slice, a grid of slices."""
    count = min(math.ceil(width * height / SLICE**2), MOST)
    if count <= 1:
        return [fitted(width, height)]
    counts = [n for n in (count - 1, count, count + 1) if 1 < n <= MOST]
    grids = [(n // rows, rows) for n in counts for rows in range(1, n + 1) if n % rows == 0]
    across, down = min(grids, key=lambda g: abs(math.log(width / height) - math.log(g[0] / g[1])))
    return [fitted(width, height)] + [fitted(width / across, height / down)] * (across * down)


def patch_grids(workload: str, quick: bool) -> list[tuple[int, int]]:
    """Rows and columns of patches of each image. A slice is laid out as one row of patches, as the public code does, so that
    padding to the longest adds no rows; which positions they take matters neither to time nor to memory."""
    whole = [(side // PATCH // (4 if quick else 1),) * 2 for side in SIDES]
    slices = [(1, rows * columns // (16 if quick else 1)) for side in SIDES for rows, columns in sliced(side, side)]
    return slices if workload == "sliced" else whole


def build(dtype: torch.dtype, quick: bool) -> nn.Module:
    """The model, with weights that bf16 holds exactly, eager attention, in eval mode."""
    from transformers.initialization import no_init_weights

    vision, text = (VISION | TINY, TEXT | TINY | {"vocab_size": 500, "num_key_value_heads": 2}) if quick else (VISION, TEXT)
    config = modeling.MiniResamplerConfig(
        vision_config=vision | {"num_hidden_layers": DEPTH["vision"], "image_size": 70 * PATCH, "patch_size": PATCH},
        text_config=text | {"num_hidden_layers": DEPTH["language"], "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        resampler_heads=text["hidden_size"] // (32 if quick else 128),
        tie_word_embeddings=False,
    )
    with no_init_weights():
        model = modeling.MiniResamplerForConditionalGeneration._from_config(config, dtype=dtype)
    noise = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().to(dtype)  # a prime: no two
    for name, p in model.named_parameters():  # rows begin alike
        if p.ndim == 1:
            p.data.fill_(0 if name.endswith("bias") else 1)
        else:
            for part in p.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    model.set_attn_implementation("eager")
    return model.eval()


def prompt(grids: list[tuple[int, int]], dtype: torch.dtype, queries: int = 64) -> dict[str, Tensor]:
    """One prompt with an image of each grid of patches, padded to the longest side of each."""
    high, wide = (PATCH * max(sides) for sides in zip(*grids, strict=True))
    pixels, seen = torch.zeros(1, len(grids), 3, high, wide), torch.zeros(1, len(grids), high, wide, dtype=torch.bool)
    noise = torch.Generator().manual_seed(1)
    for i, (rows, columns) in enumerate(grids):
        rows, columns = rows * PATCH, columns * PATCH
        pixels[0, i, :, :rows, :columns] = torch.rand(3, rows, columns, generator=noise) * 2 - 1
        seen[0, i, :rows, :columns] = True
    images = [10, *[IMAGE] * queries, 11] * len(grids)
    ids = torch.tensor([[*images, *range(20, 20 + QUESTION)]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return text | {"pixel_values": pixels.to(dtype), "pixel_attention_mask": seen}


# ---- one measurement, in a process of its own


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers and, of int8 layers, whose packed weights are neither."""
    packed = [m for m in module.modules() if isinstance(m, fast_resampler.Int8Linear)]
    tensors = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values()) + sum(m.in_features * m.out_features + m.scale.nbytes for m in packed)


def clocked(modules: dict[str, list[nn.Module]]) -> dict[str, float]:
    """{name: seconds spent in these modules}, which grows as they are called."""
    spent, begun = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def watch(name: str, module: nn.Module) -> None:
        def enter(*_) -> None:
            begun[name] = time.perf_counter()

        def leave(*_) -> None:
            spent[name] += time.perf_counter() - begun[name]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    for name, own in modules.items():
        for module in own:
            watch(name, module)
    return spent


def one(workload: str, name: str, quick: bool) -> None:
    """Prints seconds to the first token and of its parts, peak MB of the prefill alone, and the error of the last logits."""
    steps = VARIANTS[workload][name]
    dtype = torch.bfloat16 if set(steps) & set(fast_resampler.PRECISIONS) else torch.float32
    grids, begin = patch_grids(workload, quick), time.perf_counter()
    model = fast_resampler.faster(build(dtype, quick), steps)
    inputs, core = prompt(grids, dtype), model.model
    layers = {"vision": list(core.vision_model.encoder.layers), "language": list(core.text_model.layers)}
    row = {"load_s": time.perf_counter() - begin, "weights_mb": weight_bytes(model) / 1e6}
    row["layer_mb"] = {part: weight_bytes(own[0]) / 1e6 for part, own in layers.items()}
    with torch.inference_mode():
        model(**prompt([(4, 4)], dtype), use_cache=True)  # warm-up
        parts = {"vision": [core.vision_model], "resampler": [core.resampler], "head": [model.lm_head]}
        spent = clocked(parts | {f"{part} layers": own for part, own in layers.items()})
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what the model takes
        row["idle_mb"], begin = measure.peak_mb(), time.perf_counter()
        logits = model(**inputs, use_cache=True).logits
        row |= {"ttft_s": time.perf_counter() - begin, "peak_mb": measure.peak_mb(), "parts_s": spent}
    kept, last = WORK / f"{workload}{'-quick' if quick else ''}.pt", logits[0, -1].float()
    if not kept.exists():  # the first variant of all that fit is what the others are compared with
        torch.save(last, kept)
    wanted = torch.load(kept)
    print(json.dumps(row | {"error": ((last - wanted).norm() / wanted.norm()).item()}))


# ---- all of them


def needed_gb(grids: list[tuple[int, int]], steps: tuple[str, ...], quick: bool) -> float:
    """About the most GB that eager attention keeps at once, with weights: scores twice or, in bf16, once and twice in fp32."""
    longest = max(rows for rows, _ in grids) * max(columns for _, columns in grids)
    heads = (VISION | TINY if quick else VISION)["num_attention_heads"]
    weights = 4.0 if "bf16" not in steps else 2.0
    return len(grids) * heads * longest**2 * (10 if "bf16" in steps else 8) / 1e9 + (0 if quick else weights)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def full_depth(row: dict) -> dict[str, float]:
    """Seconds and MB with all layers: each tower's layers count as often as published."""
    more = {part: PUBLISHED[part] / DEPTH[part] - 1 for part in DEPTH}
    seconds = row["ttft_s"] + sum(m * row["parts_s"][f"{part} layers"] for part, m in more.items())
    extra = sum(m * DEPTH[part] * row["layer_mb"][part] for part, m in more.items())
    return {"full_ttft_s": seconds, "full_peak_mb": row["peak_mb"] + extra, "full_weights_mb": row["weights_mb"] + extra}


def compared(row: dict, base: dict) -> dict[str, float]:
    """How many times as fast as `base`, and the share of its peak memory; as measured, and with all layers."""
    faster = {f"{key}faster": base[f"{key}ttft_s"]["median"] / row[f"{key}ttft_s"]["median"] for key in ("", "full_")}
    return faster | {f"{key}peak": row[f"{key}peak_mb"]["median"] / base[f"{key}peak_mb"]["median"] for key in ("", "full_")}


def measured(workload: str, quick: bool) -> dict:
    """{"images", "patches", "padded_patches", "visual_tokens", "rows", "left_out"} of one workload."""
    grids, kept = patch_grids(workload, quick), WORK / f"{'quick-' if quick else ''}rows.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    eager = {name: needed_gb(grids, steps, quick) for name, steps in VARIANTS[workload].items() if "sdpa" not in steps}
    left_out = {name: gb for name, gb in eager.items() if gb > MEMORY_GB}
    order = [name for name in VARIANTS[workload] if name not in left_out]
    for i in range(1 if quick else ROUNDS):
        for name in order if i == 0 else order[i % len(order) :] + order[: i % len(order)]:
            key = f"{workload}/{name}/{i}"
            if key not in done:
                code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import waterfall\n"
                done[key] = run_fresh(f"{code}waterfall.one({workload!r}, {name!r}, {quick})", key)
                done[key] |= full_depth(done[key])
                models.write_json(kept, done)
                print(
                    f"{key:32s} {done[key]['ttft_s']:6.2f} s {done[key]['peak_mb']:6.0f} MB {done[key]['error']:.1e}", flush=True
                )
    rows = []
    for name in order:
        own = [found for key, found in done.items() if key.startswith(f"{workload}/{name}/")]
        row = {"name": name, "steps": VARIANTS[workload][name], "error": max(o["error"] for o in own), "rounds": len(own)}
        names = ("ttft_s", "peak_mb", "full_ttft_s", "full_peak_mb", "load_s")
        row |= {key: spread([o[key] for o in own]) for key in names} | {"weights_mb": own[0]["weights_mb"]}
        row["parts_s"] = {part: spread([o["parts_s"][part] for o in own]) for part in own[0]["parts_s"]}
        row["vision_s"] = spread([o["parts_s"]["vision"] + o["parts_s"]["resampler"] for o in own])
        rows.append(row)
    bases = [rows[0], next(row for row in rows if row["name"].startswith("bf16"))]
    for row in rows:
        row["against"] = {base["name"]: compared(row, base) for base in bases}
    high, wide = (max(sides) for sides in zip(*grids, strict=True))
    counts = {"images": len(grids), "patches": sum(r * c for r, c in grids), "padded_patches": len(grids) * high * wide}
    return counts | {"visual_tokens": 64 * len(grids), "rows": rows, "left_out_gb": left_out}


def agree(quick: bool) -> dict:
    """Answers of the trained `mini-resampler` that each precision leaves as they are, in batches of mixed sizes."""
    model = models.load("mini-resampler")
    asked = data.questions("test", 42 if quick else ASKED)
    own = [resampler.resized(asked, size) for size in (SIZES[:2] if quick else SIZES)]
    rows = {key: asked[key][:] for key in ("question", "answer", "family")}
    rows["image"] = [own[i % len(own)]["image"][i] for i in range(len(asked))]  # sizes in turn
    model.set_attn_implementation("eager")
    whole, found = evaluate.vqa(model, rows, batch_size=14, progress=False), {}
    for name, steps in {"fp32": ALL, "bf16": (*ALL, "bf16"), "int8": (*ALL, "int8"), "bf16, no other step": ("bf16",)}.items():
        fast = evaluate.vqa(fast_resampler.faster(model, steps), rows, batch_size=14, progress=False)
        same = agreement(fast.predictions, whole.predictions)
        found[name] = {"unchanged": same, "accuracy": fast.overall, "change": evaluate.paired(whole.right, fast.right)}
        print(f"{name:20s} unchanged {same}  accuracy {fast.overall} of {whole.overall}", flush=True)
    return {"accuracy": whole.overall, "sizes": SIZES, "precisions": found}


def main(asked: list[str]) -> None:
    quick, jobs = "--quick" in asked, [a for a in asked if a != "--quick"] or [*VARIANTS, "agree"]
    out = WORK / "quick.json" if quick else ROOT / "results" / "waterfall.json"
    WORK.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text()) if out.exists() else {}
    found = {job: agree(quick) if job == "agree" else measured(job, quick) for job in jobs}
    about = {"model": "Megrez-3B-Omni's widths, random weights", "depth": DEPTH, "published_depth": PUBLISHED, "sides": SIDES}
    models.write_json(out, before | {"environment": measure.environment(), **about, "memory_gb": MEMORY_GB, **found})
    print("wrote", out.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
