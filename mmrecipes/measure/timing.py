"""How long a model takes, stage by stage, interleaved with others (notebook 01). Times are milliseconds unless said otherwise."""

import functools
import gc
import inspect
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
    "vision" and "connector" exclude each other; "prefill" is the rest of the first forward pass; "ttft" is all three (without
    image processor and tokenizer); "decode" is one further token with the KV cache, the mean of `new_tokens`; "tokens_per_s"
    is the decode stage's rate, over the whole batch. Inputs are cast to each variant's dtype. UserError for no models or tokens.
    >>> list(latency({"fp32": model}, inputs, new_tokens=1, repeats=1, warmup=0)["fp32"])
    ['vision', 'connector', 'prefill', 'decode', 'ttft', 'tokens_per_s']
    """
    if not models or new_tokens < 1:
        raise UserError(f"latency: {len(models)} models, new_tokens={new_tokens}: give one model and one token or more")

    def once(model: nn.Module, own: dict) -> dict[str, float]:
        spent = walk_stages(model, own, new_tokens, clock)
        decode, ttft = spent["decode"] / new_tokens, sum(spent[stage] for stage in STAGES[:3])
        return spent | {"decode": decode, "ttft": ttft, "tokens_per_s": 1e3 * len(own["input_ids"]) / decode}

    return interleaved({name: functools.partial(once, m, cast(m, inputs)) for name, m in models.items()}, repeats, warmup)


def cast(model: nn.Module, inputs: Mapping) -> dict:
    """The inputs on the model's device, floating ones in the dtype of its first floating parameter.
    >>> cast(nn.Linear(2, 2).bfloat16(), {"x": torch.ones(1, 2)})["x"].dtype
    torch.bfloat16
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    moved = {k: v.to(first.device) for k, v in inputs.items() if isinstance(v, Tensor)}
    return {**inputs, **{k: v.to(first.dtype) if v.is_floating_point() else v for k, v in moved.items()}}


def interleaved(runs: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int) -> dict[str, dict[str, dict]]:
    """{"median", "low", "high"} (the quartiles) of each number that each run returns; rounds in rotating order, without garbage
    collection. Raises UserError for no repeats."""
    if repeats < 1 or warmup < 0:
        raise UserError(f"timing: repeats={repeats}, warmup={warmup}: give at least 1 repeat and 0 warm-ups")
    order, samples, was_on = list(runs), {name: [] for name in runs}, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup + repeats):
            for name in order:
                samples[name].append(runs[name]())
            order = order[1:] + order[:1]
    finally:
        if was_on:
            gc.enable()

    def spread(values: list[float]) -> dict[str, float]:
        return dict(zip(("median", "low", "high"), np.quantile(values, (0.5, 0.25, 0.75)).tolist(), strict=True))

    return {name: {key: spread([s[key] for s in drawn[warmup:]]) for key in drawn[0]} for name, drawn in samples.items()}


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
    mask = inputs.get("attention_mask")
    state = {"mask": None if mask is None or mask.all() else mask}  # a Qwen-VL makes of it the positions of all tokens

    def forward(**given: object) -> Tensor:
        out = model(**given, use_cache=True)
        state["cache"] = out.past_key_values
        return out.logits[:, -1]

    def step(token: Tensor | int) -> Tensor:
        if (mask := state["mask"]) is not None:
            state["mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = torch.as_tensor(token, device=inputs["input_ids"].device).reshape(-1, 1)
        return forward(input_ids=token, attention_mask=state["mask"], past_key_values=state["cache"])

    return lambda: forward(**inputs, **keep), step


def walk_stages(model: nn.Module, inputs: dict, new_tokens: int, read: Callable[[], float | np.ndarray]) -> dict:
    """Greedy generation at any batch size: how far `read()`, a clock or a counter, went on in each of the STAGES.
    Raises UserError where the model does not generate."""
    if not getattr(model, "can_generate", bool)():
        raise UserError(f"measure: {type(model).__name__} does not generate text; time its parts with measure.wall instead")
    stack, spent = ["prefill"], dict.fromkeys(STAGES, 0.0)

    def charge(*_: object, then: str | None = None) -> None:
        """Charge what was spent to the running stage; `then` enter another within it or, None, leave it."""
        nonlocal last
        now = read()
        spent[stack[-1]] += now - last
        last = now
        stack[:] = [*stack, then] if then else stack[:-1]

    inside = [(module, functools.partial(charge, then=part)) for part, module in nested_parts(model) if part in STAGES]
    hooks = [h for m, enter in inside for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(charge))]
    prefill, step = generation_steps(model, inputs)
    try:
        with torch.no_grad():
            last = read()
            token = prefill().argmax(-1)
            charge(then="decode")
            for _ in range(new_tokens):
                token = step(token).argmax(-1)
            charge()
    finally:
        for hook in hooks:
            hook.remove()
    return spent
