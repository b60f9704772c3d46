"""What a model's config.json alone tells: `mmrecipes doctor DIR --config-only`.

The model is built without weights, on the meta device, so that any size takes seconds and no memory. Its bytes are counted; its
times are predicted from this machine's measured peaks.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from mmrecipes.errors import UserError, one_line
from mmrecipes.measure import machine, timing
from mmrecipes.models import images, loading, modules, preflight, processors, prompts
from mmrecipes.quantize.groups import GROUP
from mmrecipes.report import doctor, dtype_checks, plain, predicted, targets
from mmrecipes.report.dtype_checks import TIED, Finding
from mmrecipes.report.predicted import PRECISIONS

SIZES = ((256, 256), (512, 512), (768, 768), (1024, 1024), (1024, 512))  # width, height, px
INSTRUCTIONS = {
    "int8": {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
}
NF4_ROWS = 32  # outputs that bitsandbytes' CPU kernel packs together


def examine(name: str | Path, question: str, image: str | Path | None = None) -> dict:
    """All that `show` prints, as one JSON object, for the model `name`, a directory or a hub id, of which only the JSON files
    are read. Times are predicted for `image`, or for one of 512 px a side. Raises UserError as `models.load` does."""
    model = loading.skeleton(name)
    config = preflight.read_json(Path(model.name_or_path) / "config.json")
    if "head" not in modules.parts(model):
        raise UserError(f"{name}: {type(model).__name__} compares images with texts and does not answer questions; give a VLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {type(model).__name__} is an encoder-decoder, and only decoders are supported; give another")
    held = predicted.weights(model)
    sizes, why = visual_tokens(model, question, image)
    asked = sizes[-1] if image and sizes else next((s for s in sizes if s["width"] == s["height"] == 512), None)
    asked = asked or assumed_prompt(model.config)
    rows, free = predicted.parts(model, held), preflight.free_memory()
    peaks, launch = machine.machine_peaks(0.4), _launch_us()
    stages = predicted.work(model, held, asked)
    times = predicted.predict(stages, peaks, launch)
    environment = machine.environment()
    return {
        "model": {
            "class": type(model).__name__,
            "model_type": model.config.model_type,
            "saved_in": config.get("dtype") or config.get("torch_dtype"),
        },
        "environment": environment,
        "peaks": peaks | {"launch_us": launch},
        "free_bytes": free,
        "parts": rows,
        "findings": [asdict(f) for f in (*_memory(rows[-1], free), *findings(model))],
        "exports": [asdict(e) for e in doctor.exports(model)],
        "visual_tokens": sizes,
        "no_visual_tokens": why,
        "kv_cache": predicted.kv_cache(model),
        "serving": predicted.serving(model, rows[-1], free),
        "throughput": predicted.throughput(model, stages[-1], asked["prompt_tokens"], peaks),
        "prompt": asked,
        "times": times,
        "will_not_pay": list(will_not_pay(environment["capabilities"], peaks, times)),
    }


def _memory(total: dict, free: int) -> Iterator[Finding]:
    if 1.2 * total["fp32"] > free:  # as models.load counts
        fits = "bfloat16 would fit" if 1.2 * total["bf16"] <= free else "bfloat16 would not fit, either"
        what = f"float32 takes {1.2 * total['fp32'] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {fits}"
        yield Finding("loading", "all weights", what, "take a larger machine, or a checkpoint in fewer bits")


def findings(model: nn.Module) -> Iterator[Finding]:
    """What the shapes alone say stands in the way of a technique."""
    yield from (*doctor.odd_groups(model), *doctor.norms(model), *dtype_checks.dtype_findings(model))
    if quantized := getattr(model.config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", "")
        yield Finding("all", "config.json", f"the weights are quantized already ({method})", "start from the float checkpoint")
    for name, m in model.named_modules():
        if isinstance(m, nn.Embedding) and m is model.get_input_embeddings() and m.embedding_dim % GROUP:
            what = f"rows of {m.embedding_dim} do not divide into groups of {GROUP}: a packed look-up table needs padded rows"
            yield Finding("int8 and 4-bit embeddings", name, what, "keep the embeddings in floating point")
    if (head := modules.parts(model)["head"]).weight is model.get_input_embeddings().weight:
        name = next(n for n, m in model.named_modules() if m is head)
        yield Finding("4-bit weights", name, *TIED)
    for name, m in modules.linears(model):
        if m.out_features % NF4_ROWS:
            what = f"{m.out_features} outputs are no multiple of {NF4_ROWS}, which bitsandbytes packs together on CPUs with bf16"
            yield Finding("NF4", name, what, "leave it in bf16, or pad its rows")


def visual_tokens(model: nn.Module, question: str, image: str | Path | None) -> tuple[list[dict], str | None]:
    """`prompt` for each of `SIZES`, and last for `image`; without a processor that works nothing, and the reason."""
    shown = [Image.new("RGB", size, "gray") for size in SIZES] + ([images.load_image(image)] if image else [])
    try:
        model.processor = processors.load_processor(Path(model.name_or_path))
        return [prompt(model, each, question) for each in shown], None
    except UserError as e:
        return [], str(e).removeprefix(f"{model.name_or_path}: ")
    except Exception as e:  # whatever a processor raises that wants its images or texts in another way
        return [], f"the processor does not take one image and one question as others do ({one_line(e)})"


def prompt(model: nn.Module, shown: Image.Image, question: str) -> dict:
    """One turn with one image: tokens, visual tokens, patches and tiles (whole images that the vision encoder sees)."""
    inputs = prompts.processed(model.processor, [shown], prompts.chat_prompts(model.processor, [question]))
    token = next(i for c in (model.config, model.processor) if (i := getattr(c, "image_token_id", None)) is not None)
    pixels = inputs["pixel_values"]
    patch = _first(getattr(modules.config_of(model, "vision"), "patch_size", None))
    if pixels.dim() in (2, 3):  # patches already: (patches, values) or (images, patches, values)
        patches = pixels.numel() // pixels.shape[-1]
        tiles = len(next((v for k, v in inputs.items() if k.startswith("image_grid")), [1]))
    else:
        patches = pixels.numel() // (3 * patch**2) if patch else None
        tiles = pixels.numel() // pixels.shape[-3:].numel()
    ids = inputs["input_ids"]
    row = {"width": shown.width, "height": shown.height, "visual_tokens": int((ids == token).sum())}
    return row | {"prompt_tokens": ids.numel(), "patches": patches, "tiles": tiles}


def assumed_prompt(config: object) -> dict:
    """As `prompt`, from the config's own sizes, where there is no processor: one image, 32 tokens of text."""
    vision = modules.config_of(config, "vision")
    side, patch = _first(getattr(vision, "image_size", None)) or 512, _first(getattr(vision, "patch_size", None))
    patches = (side // patch) ** 2 if patch else None
    tokens = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
    if not tokens:
        owners = ((vision, "spatial_merge_size"), (config, "spatial_merge_size"), (config, "scale_factor"))
        merged = next((m for owner, key in owners if (m := getattr(owner, key, None))), 1)
        tokens = (patches or 256) // merged**2
    row = {"width": side, "height": side, "visual_tokens": tokens, "prompt_tokens": tokens + 32}
    return row | {"patches": patches, "tiles": 1}


def _first(value: object) -> int | None:
    """A size that some configs give as a number, others as a pair; None for a size a stage, as convolutional encoders have."""
    sizes = set(value) if isinstance(value, list | tuple) else {value}
    return sizes.pop() if len(sizes) == 1 else None


def _launch_us() -> float:
    """Microseconds of one decoder layer of transformers, in eager PyTorch, with next to nothing to compute."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "vocab_size": 8}
    model, token = LlamaModel(LlamaConfig(num_hidden_layers=8, **sizes)).eval(), torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        return 1e3 * timing.wall({"": lambda: model(token)}, repeats=15)[""]["low"] / 8


def will_not_pay(capabilities: list[str], peaks: dict, times: list[dict]) -> Iterator[str]:
    """Which techniques this CPU, or the model's own size, will not reward."""
    for precision, instructions in INSTRUCTIONS.items():
        if not instructions & set(capabilities):
            rate = f"measured {peaks[precision]:.0f} GFLOP/s, float32 {peaks['fp32']:.0f}"
            yield f"{precision}: none of {', '.join(sorted(instructions))} here: fewer bytes, hardly faster arithmetic ({rate})"
    stages = {row["stage"]: row for row in times}
    if stages["ttft"]["int8"]["ms"] < 1.1 * stages["ttft"]["int4"]["ms"]:
        yield "4-bit weights: the first token comes no sooner than with int8, as its time is not spent on reading weights"
    launched = [stage for stage, row in stages.items() if row["fp32"]["bound_by"] == "launch"]
    if launched:
        yield f"all, in eager PyTorch: {', '.join(launched)}: launching operations takes longer than their float32 work"


def show(found: dict) -> None:
    """Print a diagnosis as plain text of at most 100 columns."""
    model, env, peaks = found["model"], found["environment"], found["peaks"]
    has = " ".join(env["capabilities"]) or "no vector instructions that we know"
    memory = f"{env['memory_gb']} GB ({found['free_bytes'] / 1e9:.1f} free)"
    print(
        plain.paragraph(
            f"{model['class']} ({model['model_type']}), saved in {model['saved_in'] or 'an unknown dtype'}; no weights were read"
        )
    )
    print(plain.paragraph(f"{env['cpu']}, {env['threads']} threads, {memory}: {has}"))
    print(plain.paragraph(f"torch {env['torch']}, transformers {env['transformers']}"))
    rows = [(r["part"], f"{r['parameters']:,}", *(f"{r[p] / 1e6:,.1f}" for p in PRECISIONS)) for r in found["parts"]]
    print("\n" + plain.table("What it holds, MB", ("part", "parameters", *PRECISIONS), rows))
    note = "int8: a scale a channel; int4: a scale for 32 weights; 16 bits a scale; what is no linear layer stays bf16"
    print(plain.paragraph(note))
    if found["visual_tokens"]:
        keys = ("width", "height", "visual_tokens", "prompt_tokens", "patches", "tiles")
        rows = [[row[k] if row[k] is not None else "-" for k in keys] for row in found["visual_tokens"]]
        print("\n" + plain.table("Tokens of one image, px", [k.replace("_", " ") for k in keys], rows))
    else:
        print("\n" + plain.section("Tokens of one image", [f"not known: {found['no_visual_tokens']}"]))
    cache = found["kv_cache"]
    kept = {"all": "all tokens", "window": f"the last {cache['window']}", "state": "a state of fixed size"}
    layers = ", ".join(f"layers that keep {kept[kind]}: {n}" for kind, n in cache["layers"].items() if n)
    print("\n" + plain.section("KV cache", [f"{cache['fp32']:,} bytes a token in fp32, {cache['bf16']:,} in bf16; {layers}"]))
    print("\n" + doctor.serving_text(found["serving"]))
    show_times(found["times"], found["prompt"], peaks, assumed=not found["visual_tokens"])
    rows = [(r["users"], *(f"{r[p]['tokens_per_s']:,.0f} {r[p]['bound_by']}" for p in PRECISIONS)) for r in found["throughput"]]
    print("\n" + plain.table("Decoding together, tokens a second at most, and what bounds them", ("users", *PRECISIONS), rows))
    print("\n" + plain.section("What will not pay off", found["will_not_pay"] or ["nothing that is known beforehand"]))
    print("\n" + doctor.export_text([doctor.Export(**e) for e in found["exports"]]))
    print("\n" + targets.target_table(env["capabilities"], env["gpu"]))
    print("\n" + plain.findings(doctor.finding_rows([Finding(**f) for f in found["findings"]])))


def show_times(times: list[dict], asked: dict, peaks: dict, assumed: bool) -> None:
    """Print the predicted times, what they are for and what they rest on."""
    rows = []
    for row in times:
        ms = [row[p]["ms"] for p in PRECISIONS]
        each = [f"{t:,.{0 if t >= 100 else 2}f} {row[p]['bound_by']}" for t, p in zip(ms, PRECISIONS, strict=True)]
        rows.append((row["stage"], "-" if row["gflop"] is None else f"{row['gflop']:,.2f}", *each))
    print("\n" + plain.table("Predicted least times, ms, and what bounds them", ("stage", "GFLOP", *PRECISIONS), rows))
    what = "assumed from the config, as there is no processor" if assumed else f"{asked['width']} x {asked['height']} px"
    if times[0]["gflop"] is None:
        what += ", vision encoder's arithmetic unknown"
    rates = ", ".join(f"{p} {peaks[p]:.0f}" for p in ("fp32", "bf16", "int8"))
    print(
        plain.paragraph(
            f"one image ({what}), {asked['prompt_tokens']} tokens; decode: one token. Measured here: GFLOP/s {rates}; memory "
            f"{peaks['bandwidth']:.1f} GB/s; launch {peaks['launch_us']:.0f} us a layer"
        )
    )
