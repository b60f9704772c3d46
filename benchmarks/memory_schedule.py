"""Peak memory of a model of SmolVLM2-500M's dimensions (random weights, fp32, 2.03 GB) by how its weights come into memory.

A fresh process each: IMAGES images, a prompt of PROMPT tokens of text, STEPS decode steps; ROUNDS of them in rotating order. All
ways must give the same tokens. "peak_mb" is VmHWM, which counts file-backed pages (mapped weights that were touched, libraries),
too; "anon_mb" and "file_mb" are the peaks of RssAnon and RssFile, read every 2 ms.
`python benchmarks/memory_schedule.py` writes results/memory_schedule.json after every round; ten minutes on two cores, 2 GB of
disk, 4.5 GB of memory.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, Idefics3ForConditionalGeneration
from transformers.initialization import no_init_weights

from mmrecipes import measure, models
from mmrecipes.measure.process import run_fresh
from mmrecipes.mini.model import real_size

ROOT = Path(__file__).resolve().parent.parent
NAME, BUDGET_MB, IMAGES, PROMPT, STEPS = "smolvlm2-500m", 2000, 2, 20, 4
ROUNDS = int(os.environ.get("ROUNDS", 2))
WAYS = ["read, then copied", "from_pretrained", "mapped", "read in parts", "mapped in parts", "mapped in layers"]
VISION, LANGUAGE = ("model.vision_model.", "model.connector."), ("model.text_model.", "lm_head.")


def resident() -> dict[str, float]:
    """{"anon", "file", "all"}: MB of this process that are in memory, of its own and of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kb = {key: int(lines[name].split()[0]) for key, name in (("anon", "RssAnon"), ("file", "RssFile"), ("all", "VmRSS"))}
    return {key: value * 1024 / 1e6 for key, value in kb.items()}


class Peaks(threading.Thread):
    """The largest RssAnon and RssFile since `start`, and of what `mark` saw."""

    def __init__(self):
        super().__init__(daemon=True)
        self.anon = self.file = 0.0
        self.stages: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        while True:
            now = resident()
            self.anon, self.file = max(self.anon, now["anon"]), max(self.file, now["file"])
            time.sleep(0.002)

    def mark(self, stage: str) -> None:
        self.stages[stage] = {key: round(mb, 1) for key, mb in resident().items()}


def fill(model: nn.Module, file: str, prefixes: tuple[str, ...], copy: bool = False) -> None:
    """The weights whose names begin so, mapped from the file; with `copy` read into memory of the process."""
    with safe_open(file, "pt") as weights:
        found = {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(prefixes)}  # noqa: SIM118
    if copy:
        found = {name: each.clone() for name, each in found.items()}
    model.load_state_dict(found, strict=False, assign=True)


def drop(module: nn.Module) -> None:
    """Weights without memory; where nobody else holds them, a map is taken back by the system at once."""
    for own in module.modules():
        for name, p in own.named_parameters(recurse=False):
            setattr(own, name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))


def stream(model: nn.Module, file: str) -> None:
    """Each layer of the language model is mapped when it is called, and dropped when it is done."""
    for i, layer in enumerate(model.model.text_model.layers):
        prefix = (f"model.text_model.layers.{i}.",)
        layer.register_forward_pre_hook(lambda layer, args, prefix=prefix: fill(model, file, prefix))
        layer.register_forward_hook(lambda layer, args, out: drop(layer))


def whole(folder: str, how: str) -> nn.Module:
    """The model; with its weights, unless they come in parts."""
    file, config = f"{folder}/model.safetensors", AutoConfig.from_pretrained(folder)
    if how == "from_pretrained":
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if how == "read, then copied":
        state = load(Path(file).read_bytes())
        with no_init_weights():
            model = Idefics3ForConditionalGeneration._from_config(config)
        model.load_state_dict(state)
        return model
    with init_empty_weights(include_buffers=False):
        model = Idefics3ForConditionalGeneration(config)
    if how == "mapped":
        fill(model, file, VISION + LANGUAGE)
    return model


def encode(model: nn.Module, pixels: Tensor, at_once: bool) -> Tensor:
    """Visual tokens (N, D): of all images in one batch, or of one after the other."""
    groups = [pixels] if at_once else pixels.split(1, 1)
    found = [torch.cat([*model.get_image_features(pixel_values=each).pooler_output]) for each in groups]
    return torch.cat(found).view(-1, found[0].shape[-1])


def answer(model: nn.Module, ids: Tensor, seen: Tensor, all_logits: bool, mark: Callable) -> list[int]:
    """Greedy tokens."""
    language, cache = model.model.text_model, DynamicCache(config=model.config.text_config)
    x = language.embed_tokens(ids[None])
    x[0, ids == model.config.image_token_id] = seen
    found = []
    for _ in range(STEPS):
        hidden = language(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        logits = model.lm_head(hidden if all_logits else hidden[:, -1:])
        found.append(int(logits[0, -1].argmax()))
        if len(found) == 1:
            mark("prefill")
        x = language.embed_tokens(torch.tensor([found[-1:]]))
    mark("decode")
    return found


@torch.no_grad()
def one(folder: str, how: str, images: int = IMAGES) -> None:
    """Runs in the fresh process, and prints what it found."""
    peaks, file, in_parts, copy = Peaks(), f"{folder}/model.safetensors", " in " in how, how == "read in parts"
    peaks.start()
    peaks.mark("imports")
    model = whole(folder, how).eval()
    if in_parts:
        fill(model, file, VISION, copy)
    peaks.mark("loaded")
    vision, noise = model.config.vision_config, torch.Generator().manual_seed(0)
    per_image = (vision.image_size // vision.patch_size // model.config.scale_factor) ** 2
    text = torch.randint(100, 400, (PROMPT,), generator=noise)
    ids = torch.cat([torch.full((images * per_image,), model.config.image_token_id), text])
    pixels = torch.randn(1, images, 3, vision.image_size, vision.image_size, generator=noise)
    seen = encode(model, pixels, at_once=not in_parts)
    peaks.mark("images")
    if in_parts:
        drop(model.model.vision_model)
        drop(model.model.connector)
        peaks.mark("vision dropped")
    if how == "mapped in layers":
        fill(model, file, ("model.text_model.embed_tokens.", "model.text_model.norm.", "lm_head."))
        stream(model, file)
    elif in_parts:
        fill(model, file, LANGUAGE, copy)
    tokens = answer(model, ids, seen, not in_parts, peaks.mark)
    row = {"peak_mb": measure.peak_mb(), "anon_mb": peaks.anon, "file_mb": peaks.file}
    print(json.dumps({key: round(value, 1) for key, value in row.items()} | {"tokens": tokens, "stages": peaks.stages}))


def write_model(folder: str, name: str = NAME) -> None:
    """Runs in a process of its own: a model takes more than its weights to make."""
    real_size(name).save_pretrained(folder)
    print(json.dumps({"file_mb": Path(folder, "model.safetensors").stat().st_size / 1e6}))


def fresh(call: str) -> dict:
    """What a call of this module prints, in a fresh process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import memory_schedule\nmemory_schedule.{call}"
    return run_fresh(code, call)


def write(found: dict[str, list[dict]], weights: float, rounds: int) -> None:
    """What so many complete rounds found. AssertionError where two ways gave other tokens."""
    assert len({tuple(row["tokens"]) for rows in found.values() for row in rows}) == 1
    rows = []
    for how, own in found.items():
        row = {"way": how, "stages": own[0]["stages"]}
        for key in ("peak_mb", "anon_mb", "file_mb"):
            values = [each[key] for each in own]
            row[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        rows.append(row)
    settings = {"model": NAME, "weights_mb": weights, "budget_mb": BUDGET_MB, "images": IMAGES, "prompt": PROMPT, "steps": STEPS}
    content = {"environment": measure.environment(), **settings, "rounds": rounds, "rows": rows}
    models.write_json(ROOT / "results" / "memory_schedule.json", content)


def main() -> None:
    found: dict[str, list[dict]] = {how: [] for how in WAYS}
    with tempfile.TemporaryDirectory(prefix="mmrecipes-") as folder:
        weights = fresh(f"write_model({folder!r})")["file_mb"]
        for i in range(ROUNDS):
            for how in WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]:
                found[how].append(fresh(f"one({folder!r}, {how!r})"))
                print(how, found[how][-1], flush=True)
            write(found, weights, i + 1)


if __name__ == "__main__":
    main()
