"""What a GPU makes of it: 2:4 sparsity, dtypes and compiled decoding, mixed-precision training. Three minutes on an H100.

Random weights: times and memory only. Times are medians with quartiles; a part that this machine's libraries cannot run leaves
its error in its row. Writes results/gpu.json.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes import data, measure, models, train
from mmrecipes.errors import one_line
from mmrecipes.measure.timing import timed
from mmrecipes.mini import batches, losses
from mmrecipes.mini import model as mini_model

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"SmolVLM-256M, up_proj": (576, 1536), "Qwen2.5-VL-3B, up_proj": (2048, 11008), "8B, up_proj": (4096, 14336)}
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)  # tokens at once: one is decoding, the rest are prompts or batches
NEW_TOKENS, REPEATS = 64, 7
QWEN_TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
QWEN_TEXT |= {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
QWEN_VISION = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 2048}


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def kernel_us(fn: Callable) -> dict[str, float]:
    """Microseconds of `fn` on the GPU alone, as a CUDA graph, with a cold L2 cache before each."""
    from triton.testing import do_bench_cudagraph

    try:
        times = do_bench_cudagraph(fn, rep=20, return_mode="all")
        how = "CUDA graph"
    except Exception:  # a kernel that cannot be captured
        from triton.testing import do_bench

        times, how = do_bench(fn, warmup=10, rep=30, return_mode="all"), "launched"
        torch.cuda.synchronize()
    return spread([1e3 * float(t) for t in times]) | {"how": how}


def two_of_four() -> list[dict]:
    """A bf16 linear layer, dense and with two of each four weights zero in NVIDIA's sparse format."""
    from torch.sparse import to_sparse_semi_structured

    found = []
    for name, (into, out) in LAYERS.items():
        dense = nn.Linear(into, out, bias=False, device="cuda", dtype=torch.bfloat16)
        groups = dense.weight.detach().view(-1, 4)
        smallest = groups.abs().topk(2, largest=False).indices
        dense.weight = nn.Parameter(groups.scatter(1, smallest, 0).view(out, into), requires_grad=False)
        sparse = nn.Linear(into, out, bias=False, device="cuda", dtype=torch.bfloat16)
        sparse.weight = nn.Parameter(to_sparse_semi_structured(dense.weight), requires_grad=False)
        for rows in ROWS:
            x = torch.randn(rows, into, device="cuda", dtype=torch.bfloat16)
            with torch.inference_mode():
                error = ((sparse(x) - dense(x)).float().norm() / dense(x).float().norm()).item()
                row = {"layer": name, "rows": rows, "in": into, "out": out, "error": error}
                row |= {"dense_us": kernel_us(partial(dense, x)), "sparse_us": kernel_us(partial(sparse, x))}
            row["ratio"] = row["dense_us"]["median"] / row["sparse_us"]["median"]
            found.append(row)
    return found


# ---- generation


def qwen(dtype: torch.dtype) -> nn.Module:
    """A random model of Qwen2.5-VL-3B's dimensions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(text_config=QWEN_TEXT | {"rope_parameters": rope}, vision_config=QWEN_VISION)
    with torch.device("cuda"), no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
        for p in model.parameters():
            p.data.normal_(std=0.02) if p.ndim > 1 else p.data.fill_(1)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight  # tied, as in the 3B model
    return model.eval()


def qwen_inputs(model: nn.Module) -> dict[str, Tensor]:
    """One image of 504 px (324 visual tokens) and 32 words."""
    config, side = model.config, 36
    visual = [config.vision_start_token_id] + [config.image_token_id] * (side * side // 4) + [config.vision_end_token_id]
    ids = torch.tensor([visual + list(range(1000, 1032))], device="cuda")
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, device="cuda")
    grid = torch.tensor([[1, side, side]], device="cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid}


def smolvlm(dtype: torch.dtype) -> nn.Module:
    return mini_model.real_size(dtype=dtype).to("cuda")


def smolvlm_inputs(model: nn.Module) -> dict[str, Tensor]:
    """One image of 512 px (64 visual tokens) and a question."""
    from mmrecipes.data import scenes

    image = scenes.render(scenes.make_scene(5), 512)
    return dict(models.chat(model, image, "What is in this picture? Name each of the objects and say what colour it has."))


def generate_ms(model: nn.Module, inputs: dict[str, Tensor], tokens: int, **settings: Any) -> float:
    begin = measure.clock()
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **settings)
    return measure.clock() - begin


def generation(make: Callable, inputs_of: Callable, dtype: torch.dtype, change: Callable | None, **settings: Any) -> dict:
    """Time to the first token, decode rate and peak memory of `generate`."""
    model = make(dtype)
    inputs = measure.cast(model, inputs_of(model))
    if change:
        change(model)
    torch.cuda.reset_peak_memory_stats()
    for tokens in (1, NEW_TOKENS, NEW_TOKENS):  # compiles, records, chooses kernels
        generate_ms(model, inputs, tokens, **settings)
    first, whole = ([generate_ms(model, inputs, tokens, **settings) for _ in range(REPEATS)] for tokens in (1, NEW_TOKENS))
    rate = [1e3 * (NEW_TOKENS - 1) / (w - f) for f, w in zip(first, whole, strict=True)]
    weights = sum(t.numel() * t.element_size() for t in {p.data_ptr(): p for p in model.parameters()}.values())
    found = {"ttft_ms": spread(first), "tokens_per_s": spread(rate), "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
    return found | {"weights_mb": weights / 1e6, "prompt_tokens": inputs["input_ids"].shape[1]}


def torchao_change(name: str) -> Callable:
    def change(model: nn.Module) -> None:
        import torchao.quantization as ao

        config = getattr(ao, name)()
        ao.quantize_(model, config, lambda m, _: isinstance(m, nn.Linear) and m.in_features % 16 == m.out_features % 16 == 0)

    return change


def generations() -> Iterator[list[dict]]:
    static, eager = {"cache_implementation": "static"}, torch.bfloat16
    variants = {
        "fp32, eager": (torch.float32, None, {}),
        "bf16, eager": (eager, None, {}),
        "bf16, static KV cache, compiled": (eager, None, static),
        "int8 weights (torchao), compiled": (eager, "Int8WeightOnlyConfig", static),
        "fp8 weights and activations (torchao), compiled": (eager, "Float8DynamicActivationFloat8WeightConfig", static),
    }
    sizes = {"SmolVLM-256M": (smolvlm, smolvlm_inputs), "Qwen2.5-VL-3B": (qwen, qwen_inputs)}
    found = []
    for name, (dtype, quantized, settings) in variants.items():
        for size, (make, inputs_of) in sizes.items():
            change = torchao_change(quantized) if quantized else None
            found.append(_guarded({"model": size, "variant": name}, generation, make, inputs_of, dtype, change, **settings))
            yield found


def _guarded(row: dict, fn: Callable, *arguments: Any, **settings: Any) -> dict:
    begin = time.perf_counter()
    try:
        row |= fn(*arguments, **settings)
    except Exception as e:  # libraries there may be older; the row says so
        row["error"] = one_line(e)[:300]
    gc.collect()
    torch.cuda.empty_cache()
    if hasattr(torch, "_dynamo"):
        torch._dynamo.reset()
    print({k: v for k, v in row.items() if k != "log"}, f"{time.perf_counter() - begin:.0f} s", flush=True)
    return row


# ---- training


def training_step(size: str, precision: str, checkpointing: bool, rows: int) -> dict:
    """Milliseconds a step (forward, backward, update), images a second, peak memory."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if size == "mini-vlm":
        processor = mini_model.make_processor()
        model = mini_model.make_model(processor.tokenizer).to("cuda")
        drawn = batches.ChatBatches(data.block("mini-vlm/align"), 1, rows, processor.tokenizer)
        batch = train.shard(drawn[0], 0, 1, torch.device("cuda"))
        loss_of = lambda: losses.answer_loss(model, batch, drawn.word_ids, 0.0)[0]  # noqa: E731
    else:
        model = mini_model.real_size().to("cuda").train()
        inputs = {k: v.repeat_interleave(rows, 0) for k, v in smolvlm_inputs(model).items()}
        loss_of = lambda: model(**inputs, labels=inputs["input_ids"], use_cache=False).loss  # noqa: E731
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    steppers = train.optimizers([model], 1e-4, 1e-4) if size == "mini-vlm" else [torch.optim.AdamW(model.parameters(), lr=1e-5)]

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16 autocast"):
            loss = loss_of()
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = [1e3 * timed(step) for _ in range(10)]
    found = {"step_ms": spread(times), "images_per_s": 1e3 * rows / statistics.median(times)}
    return found | {"peak_mb": torch.cuda.max_memory_allocated() / 1e6, "rows": rows}


def trainings() -> list[dict]:
    found = []
    for size, rows in (("mini-vlm", 16), ("SmolVLM-256M", 16)):
        for precision in ("fp32", "tf32", "bf16 autocast"):
            for checkpointing in (False, True):
                row = {"model": size, "precision": precision, "gradient checkpointing": checkpointing}
                found.append(_guarded(row, training_step, size, precision, checkpointing, rows))
    return found


def main() -> None:
    out, versions = ROOT / "results" / "gpu.json", {name: metadata.version(name) for name in ("transformers", "triton")}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torchao"] = metadata.version("torchao")
    found = {"environment": measure.environment() | versions, "new_tokens": NEW_TOKENS}
    found |= {"peaks": measure.machine_peaks(0.5, "cuda"), "two_of_four": two_of_four(), "training": trainings()}
    for rows in generations():  # written as each is there
        models.write_json(out, found | {"generation": rows})


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU")
    main()
