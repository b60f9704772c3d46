"""Where the time goes, and the most that a precision can give: stage budget and roofline (notebook 01)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmrecipes.measure.size import held_tensors
from mmrecipes.measure.timing import STAGES, cast, clock, interleaved, walk_stages
from mmrecipes.models.modules import nested_parts

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # a weight; scales left out, so that a bound stays a bound


def stage_budget(model: nn.Module, inputs: Mapping, new_tokens: int = 8) -> list[dict]:
    """Rows of stage, ms, share (of the total), calls, tokens, weight_bytes (read, all calls), gflop, gflop_per_s.
    Decode is the sum over `new_tokens` tokens. Vision's tokens are its output positions. Median of three runs. GFLOP are
    NaN, counts 0, where torch's counter fails.
    >>> [row["stage"] for row in stage_budget(model, inputs, 1)]
    ['vision', 'connector', 'prefill', 'decode']
    """
    own = cast(model, inputs)
    found = interleaved({"": lambda: walk_stages(model, own, new_tokens, clock)}, repeats=3, warmup=1)[""]
    ms, rows = {stage: t["median"] for stage, t in found.items()}, []
    try:
        work = _work(model, own, new_tokens)
    except Exception:  # torch's counter, or what it meets in a model that does something unusual
        work = {stage: (float("nan"), 0, 0, 0, 0) for stage in ms if ms[stage]}
    for stage, (flop, _, size, calls, tokens) in work.items():
        row = {"stage": stage, "ms": ms[stage], "share": ms[stage] / sum(ms.values()), "calls": int(calls), "tokens": int(tokens)}
        rows.append(row | {"weight_bytes": int(size), "gflop": flop / 1e9, "gflop_per_s": flop / ms[stage] / 1e6})
    return rows


def roofline(model: nn.Module, inputs: Mapping, peaks: dict) -> list[dict]:
    """For each stage and weight precision the least time it can take with the `peaks` of `machine_peaks`.
    Rows of stage (decode: one token), precision, gflop, weight_bytes, bound_ms = max(gflop / peak, bytes / bandwidth),
    bound_by ("compute" or "memory"), at_most (times faster than the fp32 bound). Williams, Waterman and Patterson, CACM 52(4),
    2009. Weights only, neither activations nor the KV cache; "int4" computes at the best peak of all. Weights that stay in the
    cache can be read faster than `bandwidth` says: then a memory bound is not one.
    >>> roofline(model, inputs, {"fp32": 100.0, "bf16": 200.0, "int8": 400.0, "bandwidth": 10.0})[0]["bound_by"]
    'compute'
    """
    rows, best = [], max(peaks[p] for p in ("fp32", "bf16", "int8"))
    for stage, (flop, weights, *_) in _work(model, cast(model, inputs), 1).items():
        fp32 = None
        for precision, each in BYTES.items():
            peak = peaks.get(precision, best)
            if not peak:  # no kernel for it here
                continue
            compute, memory = flop / peak / 1e6, each * weights / peaks["bandwidth"] / 1e6
            bound = max(compute, memory)
            fp32 = fp32 or bound
            row = {"stage": stage, "precision": precision, "gflop": flop / 1e9, "weight_bytes": int(each * weights)}
            bound_by = "compute" if compute > memory else "memory"
            rows.append(row | {"bound_ms": bound, "bound_by": bound_by, "at_most": fp32 / bound})
    return rows


def _work(model: nn.Module, inputs: dict, new_tokens: int) -> dict[str, tuple]:
    """Of each stage that does any work: FLOP (two a multiply-add), weights read, their bytes, calls, tokens.
    torch's counter sees a float model's operators only: a quantized layer counts as the same layer in float does."""
    # torch has no entry for the CPU's kernel of attention
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, (*q[:-2], *k[-2:]), (*q[:-2], *v[-2:]))}
    counter, counts, begun = FlopCounterMode(display=False, custom_mapping=attention), np.zeros(5), {}
    stages = {module for part, module in nested_parts(model) if part in STAGES}
    held = {m: [(count, size) for _, _, count, size in held_tensors(m)] for m in model.modules()}

    def after(module: nn.Module, args: tuple, output: object) -> None:
        weights, size = np.sum(held[module] or [(0, 0)], axis=0)
        width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if width and weights and counter.get_total_flops() == begun[module]:
            counts[0] += 2 * held[module][0][0] * output.numel() / width
        # a look-up reads its rows only
        share = min(1, output.numel() / max(weights, 1)) if hasattr(module, "num_embeddings") else 1
        counts[1:3] += share * weights, share * size
        if module in stages:
            while not isinstance(output, Tensor):
                output = output[0]
            counts[3:] += 1, output.numel() / output.shape[-1]

    watched = [m for m in model.modules() if held[m] or m in stages]
    hooks = [m.register_forward_pre_hook(lambda m, _: begun.update({m: counter.get_total_flops()})) for m in watched]
    hooks += [m.register_forward_hook(after) for m in watched]
    # the counter asks for the gradient of a parameter that a module gets as its input (Idefics2), and there is none
    learning = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
    try:
        with counter:
            done = walk_stages(model, inputs, new_tokens, lambda: counts + np.array([counter.get_total_flops(), 0, 0, 0, 0]))
    finally:
        for hook in hooks:
            hook.remove()
        for p in learning:
            p.requires_grad_()
    done["prefill"][3:] = 1, inputs["input_ids"].numel()
    done["decode"][3:] = new_tokens, new_tokens * len(inputs["input_ids"])
    return {stage: tuple(v.tolist()) for stage, v in done.items() if np.any(v)}
