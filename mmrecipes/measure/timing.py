"""How long a model takes, stage by stage, interleaved with others (notebook 01). Times are milliseconds unless said otherwise."""

from __future__ import annotations

import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import nested_parts

STAGES = ("vision", "connector", "prefill", "decode")


def wall(fns: dict[str, Callable], repeats: int = 7, warmup: int = 2) -> dict[str, dict]:
    """Milliseconds of each function: "median", "low" and "high" (the quartiles).

    Interleaved: each round calls every function once, in rotating order, so that a change in the machine's load hits all.
    >>> sorted(wall({"sum": lambda: sum(range(99))}, repeats=3)["sum"])
    ['high', 'low', 'median']
    """
    runs = {name: lambda fn=fn: {"ms": 1e3 * timed(fn)} for name, fn in fns.items()}
    return {name: row["ms"] for name, row in interleaved(runs, repeats, warmup).items()}


def latency(
    models: dict[str, nn.Module], inputs: Mapping, new_tokens: int = 8, repeats: int = 7, warmup: int = 2
) -> dict[str, dict]:
    """Milliseconds of each stage of each variant: "median", "low" and "high" (the quartiles), interleaved as in `wall`.

    "vision" and "connector" are exclusive of each other; "prefill" is the rest of the first forward pass; "ttft" is all
    three (the image processor and tokenizer not included); "decode" is one further token with the KV cache, the mean of
    `new_tokens`. "tokens_per_s" is the rate of the decode stage, over the whole batch. Inputs are cast to each variant's dtype.
    >>> list(latency({"fp32": model}, inputs, new_tokens=1, repeats=1, warmup=0)["fp32"])
    ['vision', 'connector', 'prefill', 'decode', 'ttft', 'tokens_per_s']
    """
    if not models or new_tokens < 1:
        raise UserError(f"latency: {len(models)} models, new_tokens={new_tokens}: give one model and one token or more")

    def once(model: nn.Module, own: dict) -> dict[str, float]:
        spent = walk_stages(model, own, new_tokens, clock)
        decode = spent["decode"] / new_tokens
        ttft = sum(spent[stage] for stage in ("vision", "connector", "prefill"))
        return spent | {"decode": decode, "ttft": ttft, "tokens_per_s": 1e3 * len(own["input_ids"]) / decode}

    return interleaved({name: functools.partial(once, m, cast(m, inputs)) for name, m in models.items()}, repeats, warmup)


def cast(model: nn.Module, inputs: Mapping) -> dict:
    """The inputs on the model's device, floating ones in the dtype of its first floating parameter.
    >>> cast(nn.Linear(2, 2).bfloat16(), {"x": torch.ones(1, 2)})["x"].dtype
    torch.bfloat16
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def to(v: object) -> object:
        return v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v

    return {k: to(v) for k, v in inputs.items()}


def interleaved(runs: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int) -> dict[str, dict[str, dict]]:
    """ "median", "low" and "high" (the quartiles) of each number that each run returns; rounds in rotating order, no garbage
    collection. Raises UserError for no repeats.
    """
    if repeats < 1 or warmup < 0:
        raise UserError(f"timing: repeats={repeats}, warmup={warmup}: give at least 1 repeat and 0 warm-ups")
    names, samples, was_on = list(runs), {name: [] for name in runs}, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            turn = i % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                samples[name].append(runs[name]())
    finally:
        if was_on:
            gc.enable()
    return {name: {key: _spread([s[key] for s in drawn[warmup:]]) for key in drawn[0]} for name, drawn in samples.items()}


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def clock() -> float:
    """Milliseconds of a monotonic clock, read once the GPU, if one is used, has finished.
    >>> clock() <= clock()
    True
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def timed(fn: Callable) -> float:
    """Seconds that `fn` takes."""
    begin = clock()
    fn()
    return (clock() - begin) / 1e3


def generation_steps(model: nn.Module, inputs: Mapping) -> tuple[Callable[[], Tensor], Callable[[Tensor | int], Tensor]]:
    """`prefill()` and `step(token ids (B, 1))`, each giving the logits (B, V) of the next token, with the KV cache in between."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}  # as generate()
    state = {"mask": inputs.get("attention_mask")}
    if (
        state["mask"] is not None and state["mask"].all()
    ):  # a Qwen-VL makes of a mask the positions of all tokens, not of the new one
        state["mask"] = None

    def forward(**given: object) -> Tensor:
        out = model(**given, use_cache=True)
        state["cache"] = out.past_key_values
        return out.logits[:, -1]

    def step(token: Tensor | int) -> Tensor:
        mask = state["mask"]
        state["mask"] = mask if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = torch.as_tensor(token, device=inputs["input_ids"].device).reshape(-1, 1)
        return forward(input_ids=token, attention_mask=state["mask"], past_key_values=state["cache"])

    return lambda: forward(**inputs, **keep), step


def walk_stages(model: nn.Module, inputs: dict, new_tokens: int, read: Callable[[], float | np.ndarray]) -> dict:
    """Greedy generation at any batch size: how far `read()`, a clock or a counter, went on in each of the STAGES.

    Raises UserError where the model does not generate.
    """
    if not getattr(model, "can_generate", bool)():
        raise UserError(f"measure: {type(model).__name__} does not generate text; time its parts with measure.wall instead")
    stack, spent = ["prefill"], dict.fromkeys(STAGES, 0.0)

    def charge() -> None:
        nonlocal last
        now = read()
        spent[stack[-1]] += now - last
        last = now

    def enter(stage: str, *_: object) -> None:
        charge()
        stack.append(stage)

    def leave(*_: object) -> None:
        charge()
        stack.pop()

    inside = [(module, functools.partial(enter, part)) for part, module in nested_parts(model) if part in STAGES]
    hooks = [h for m, go in inside for h in (m.register_forward_pre_hook(go), m.register_forward_hook(leave))]
    prefill, step = generation_steps(model, inputs)
    try:
        with torch.no_grad():
            last = read()
            token = prefill().argmax(-1)
            charge()
            stack[0] = "decode"
            for _ in range(new_tokens):
                token = step(token).argmax(-1)
            charge()
    finally:
        for hook in hooks:
            hook.remove()
    return spent
