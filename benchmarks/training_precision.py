"""One training step of `mini-resampler` in fp32 and in bf16 autocast, with and without gradient checkpointing.

Forward, backward and update on the CPU, 16 images of 256 px with their questions. Each measurement is a fresh process; ROUNDS of
them, interleaved. "activations_mb" is what autograd keeps for the backward pass, "peak_mb" the most that the process takes in a
step. `python benchmarks/training_precision.py` writes results/training-precision.json; about three minutes on two cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from mmrecipes import data, measure, models, train
from mmrecipes.data import scenes
from mmrecipes.measure.process import run_fresh
from mmrecipes.mini import resampler

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = int(os.environ.get("ROUNDS", 3))
BATCH, SIDE, STEPS = 16, 256, 3  # images; px; timed steps a process, behind one that warms up
VARIANTS = [(precision, checkpointing) for precision in ("fp32", "bf16 autocast") for checkpointing in (False, True)]


@contextlib.contextmanager
def saved_bytes(model: torch.nn.Module):
    """A list that gets the bytes of all that autograd keeps in this block, weights not counted and each storage once."""
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    alive, found = [], []  # a freed storage's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.append(sum(kept.values()))


def one(precision: str, checkpointing: bool) -> None:
    """Prints milliseconds a step, and the MB that it takes."""
    torch.manual_seed(0)
    model = resampler.make_resampler(models.load("mini-vlm")).train()
    drawn = resampler.ResizedChats(data.block("mini-resampler/chat"), 1, BATCH, model.processor.tokenizer)
    images = resampler.normalized([scenes.render(scene, SIDE) for scene in drawn.draw(0)])
    batch = drawn[0]._replace(images=images)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    steppers = train.optimizers([model], 1e-4, 1e-4)

    def loss_of() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            return resampler.loss(model, batch)[0]

    def step() -> float:
        begin = time.perf_counter()
        loss_of().backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        return 1e3 * (time.perf_counter() - begin)

    step()  # warm-up
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    row = {"idle_mb": measure.peak_mb(), "step_ms": statistics.median(step() for _ in range(STEPS)), "peak_mb": measure.peak_mb()}
    with saved_bytes(model) as kept:
        loss = loss_of()
    print(json.dumps(row | {"activations_mb": kept[0] / 1e6, "loss": loss.item()}))


def main() -> None:
    found: dict[tuple[str, bool], list[dict]] = {variant: [] for variant in VARIANTS}
    for i in range(ROUNDS):
        for precision, checkpointing in VARIANTS[i % len(VARIANTS) :] + VARIANTS[: i % len(VARIANTS)]:
            code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import training_precision\n"
            row = run_fresh(f"{code}training_precision.one({precision!r}, {checkpointing})", precision)
            found[precision, checkpointing].append(row)
            print(f"{precision:14s} checkpointing {checkpointing!s:6s}", {k: round(v, 2) for k, v in row.items()}, flush=True)
    rows = []
    for (precision, checkpointing), own in found.items():
        row = {"precision": precision, "gradient checkpointing": checkpointing}
        for key in own[0]:
            values = [o[key] for o in own]
            row[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        rows.append(row)
    settings = {"batch": BATCH, "side": SIDE, "rounds": ROUNDS, "steps": STEPS}
    content = {"environment": measure.environment(), **settings, "rows": rows}
    models.write_json(ROOT / "results" / "training-precision.json", content)


if __name__ == "__main__":
    main()
