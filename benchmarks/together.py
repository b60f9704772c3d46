"""Pruning, fewer visual tokens, distillation and quantization of mini-vlm together: the order and what it gives.

A plan is a sequence of steps: P cuts FFN neurons, L the vision encoder's last layer, T takes a pixel shuffle of 2 (a quarter of
the visual tokens), D trains with the first model as teacher, Q rounds all linear weights in groups of 32 with GPTQ. After a Q, D
is quantization-aware, and P rounds cut matrices anew, since a group that lost inputs has none of its old levels. Each D has the
same steps, images and rates, D2 twice the steps.

`python benchmarks/together.py [teach NAME ... | PART ...]`: `teach` trains what the named plans need and measures nothing;
parts: grid (accuracy of each plan in PyTorch), exports (of the deployed ones), times, real (at SmolVLM-256M's size); by default
all. Writes results/together.json; what is done lies in runs/together, and is not done again. About two hours on two cores.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from structured import KEEP, Kept, answers, cut
from torch import nn

from mmrecipes import data, distill, evaluate, export, inference, measure, models, prune, quantize, train
from mmrecipes.data.splits import block
from mmrecipes.mini import batches, losses
from mmrecipes.mini import model as mini_model
from mmrecipes.prune.token_merging import coarser
from mmrecipes.quantize.groups import GROUP, on_grid, packed_values

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "together"
CALIBRATION, FACTOR = 64, 2
CONFIG = train.TrainConfig(400, 8, 5e-4, 1.5e-4, checkpoint_every=50)
FEATURES = distill.LossWeights()
LOGITS = distill.LossWeights(hidden=0, vision=0)  # with fewer tokens than the teacher there are no pairs of hidden states
ORDERS = ("P-D-Q", "P-Q-D", "Q-P-D", "D-P-Q", "D-Q-P", "Q-D-P")
# name -> (steps, bits)
PLANS: dict[str, tuple[str, int]] = {"whole": ("", 0)}
PLANS |= {steps: (steps, 0) for steps in ("P", "P-D", "T-D", "T-P-D")}
PLANS |= {f"{steps}, {bits} bits": (steps, bits) for bits in (4, 2) for steps in ("Q", *ORDERS)}
PLANS |= {steps: (steps, 0) for steps in ("T-P-D2", "L-T-P-D2")}
PLANS |= {f"{steps}, 4 bits": (steps, 4) for steps in ("T-P-D2-Q", "L-T-P-D2-Q")}
# name -> (plan, runtime, precision) of what is deployed
FP32 = "whole, PyTorch fp32"
DEPLOYED: dict[str, tuple[str, str, str]] = {
    FP32: ("whole", "torch", "fp32"),
    "whole, PyTorch bf16": ("whole", "torch", "bf16"),
    "whole, fp32": ("whole", "onnx", "fp32"),
    "whole, int8": ("whole", "onnx", "int8"),
    "P-D, fp32": ("P-D", "onnx", "fp32"),
    "P-D, int8": ("P-D", "onnx", "int8"),
    "P-D, int8, vision static": ("P-D", "onnx", "static"),
    "P-D-Q, 4 bits": ("P-D-Q, 4 bits", "onnx", "mixed"),
    "P-Q-D, 4 bits": ("P-Q-D, 4 bits", "onnx", "mixed"),
    "T-P-D2, int8": ("T-P-D2", "onnx", "int8"),
    "T-P-D2-Q, 4 bits": ("T-P-D2-Q, 4 bits", "onnx", "mixed"),
    "L-T-P-D2, int8": ("L-T-P-D2", "onnx", "int8"),
}
ASKED = 2100  # questions for what answers one at a time
NEW_TOKENS, REPEATS = 16, 21
REAL = "smolvlm-256m"
SHARES = {"vision": 384 / 1024, "language": 128 / 512}  # of the neurons that KEEP keeps
REAL_QUESTION = "What is in this picture? Name each of the objects, say what colour it has, how large it is, and where it is."
REAL_ROWS = {  # name -> (cut, fewer tokens, runtime, precision)
    FP32: (False, False, "torch", "fp32"),
    "whole, PyTorch bf16": (False, False, "torch", "bf16"),
    "whole, fp32": (False, False, "onnx", "fp32"),
    "whole, int8": (False, False, "onnx", "int8"),
    "P, fp32": (True, False, "onnx", "fp32"),
    "P, int8": (True, False, "onnx", "int8"),
    "P, int4": (True, False, "onnx", "int4"),
    "T-P, int8": (True, True, "onnx", "int8"),
}


# ---- the steps


class CoarseBatches(batches.ChatBatches):
    """`ChatBatches` for models that see an image in fewer visual tokens, too."""

    def answer_loss(self, model: nn.Module, batch):
        seen = mini_model.VISUAL_TOKENS // model.model.connector.scale_factor**2
        if seen == mini_model.VISUAL_TOKENS:
            return super().answer_loss(model, batch)
        loss, logs = losses.answer_loss(model, fewer(batch, model.config.image_token_id, seen), self.word_ids, align=0.0)
        return loss, int((batch.answers[:, 1:] >= 0).sum()), logs


def fewer(batch, image_token: int, keep: int):
    """The batch with `keep` placeholders of an image, the tokens behind them at their new positions."""
    places = (batch.ids[0] == image_token).nonzero()[:, 0]  # the same in each row: images come first
    gone = places[keep:]
    stay = torch.ones(batch.ids.shape[1], dtype=torch.bool, device=batch.ids.device)
    stay[gone] = False
    positions = batch.positions - len(gone) * (batch.positions > places[-1])
    columns = {k: getattr(batch, k)[:, stay] for k in ("ids", "answers", "segments")}
    return batch._replace(positions=positions[:, stay], **columns)


def model_of(steps: str, bits: int, work: Path, config: train.TrainConfig) -> nn.Module:
    """The first model after `steps`; a training goes on where it was left."""
    if not steps:
        return models.load("mini-vlm")
    before, _, step = steps.rpartition("-")
    model, seen = model_of(before, bits, work, config), data.calibration(CALIBRATION)
    if step == "T":
        return coarser(model, FACTOR)
    if step == "L":
        return prune.keep_layers(model, "vision", range(model.config.vision_config.num_hidden_layers - 1))
    if step == "P":
        return rounded(cut_on_levels(model), bits) if "Q" in before else cut(model, KEEP, seen)
    if step == "Q":
        return quantize.calibrate(model, seen, bits, quantize.gptq_round, GROUP)
    config = replace(config, steps=config.steps * int(step[1:] or 1))
    teacher, name = models.load("mini-vlm"), f"{steps}, {bits} bits" if "Q" in before else steps
    drawn = CoarseBatches(block("recovery/chat"), config.steps, config.batch, teacher.processor.tokenizer)
    weights = LOGITS if "T" in before else FEATURES
    if "Q" in before:
        prepared = quantize.prepare_qat_(model, bits)
        return distill.qat(prepared, drawn, replace(config, about=name), teacher, weights, work / name)
    if "T" in before:
        return distill.distill(model, teacher, drawn, config, weights, work / name)
    return distill.recover(model, drawn, config, teacher, work / name)


def cut_on_levels(model: nn.Module) -> nn.Module:
    """As `structured.cut`, without the refit, which gives weights between levels."""
    scores = prune.magnitude_importance(model)
    for part, n in KEEP.items():
        model = prune.keep_ffn_neurons(model, {part: prune.strongest(scores[part]["neurons"], n)})
    return model


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """All linear weights on levels of their groups, the nearest ones; those that are on levels already stay."""
    for _, layer in models.linears(model):
        layer.weight.copy_(packed_values(layer.weight, bits))
    return model


def size_mb(model: nn.Module, bits: int) -> float:
    """Megabytes of the weights: linear ones of `bits` bits with a 16-bit scale a group, all else in 16 bits; 0 bits: fp32."""
    return (quantize.packed_bytes(model, bits, "group", GROUP) if bits else measure.model_bytes(model)) / 1e6


# ---- what is measured


def grid(kept: Kept, config: train.TrainConfig, n: int | None) -> None:
    rows = data.test_split(n)
    for name, (steps, bits) in PLANS.items():

        def made(steps: str = steps, bits: int = bits) -> dict:
            model = model_of(steps, bits, kept.path.parent, config)
            row = answers(model, rows) | {"mb": size_mb(model, bits), "steps": steps, "bits": bits}
            return row | ({"on levels": all(on_grid(layer.weight, bits) for _, layer in models.linears(model))} if bits else {})

        kept.row(name, made)


def exported(kept: Kept, config: train.TrainConfig, n: int | None) -> None:
    """The deployed ones: written once, then asked."""
    rows, work = data.test_split(n or ASKED), kept.path.parent
    for name, (plan, runtime, precision) in DEPLOYED.items():
        if runtime == "torch":
            found = partial(answers, quantize.bf16(models.load("mini-vlm")), rows)
            kept.row(f"deployed: {name}", found if precision == "bf16" else lambda: kept.rows["whole"])
            continue

        def asked(plan: str = plan, runtime: str = runtime, precision: str = precision, folder=work / "exports" / name) -> dict:
            if not folder.exists():
                images = data.calibration(12)["image"][:] if precision == "static" else ()
                precisions = {"vision": "static", "language": "int8"} if precision == "static" else precision
                export.export(model_of(*PLANS[plan], work, config), folder, runtime, precisions, images)
            loaded = inference.load_exported(folder)
            return answers(loaded, rows) | {"mb": graph_mb(folder)}

        kept.row(f"deployed: {name}", asked)


def graph_mb(folder: Path) -> float:
    """Megabytes of an exported model's graphs and weights."""
    return sum(inference.load_exported(folder).manifest["bytes"].values()) / 1e6


def calls(model: nn.Module | inference.Exported, image, question: str) -> tuple:
    """`prefill` and `step` of a prompt whose inputs are made."""
    if isinstance(model, nn.Module):
        return measure.timing.generation_steps(model, measure.timing.cast(model, models.chat(model, image, question)))
    inputs = model.inputs(image, question)
    return (lambda: model.prefill(inputs), lambda token: model.graphs.step(np.array([[token]])))


def timed(loaded: dict[str, Any], image, question: str, tokens: int, repeats: int) -> dict[str, dict]:
    """Milliseconds to the first token, and tokens a second after it: medians and quartiles, all in turn."""

    def once(prefill, step) -> dict[str, float]:
        with torch.inference_mode():
            first, further, _ = measure.process.time_generation(prefill, step, tokens)
        return {"ttft_ms": first, "tokens_per_s": 1e3 / further}

    runs = {name: partial(once, *calls(model, image, question)) for name, model in loaded.items()}
    return measure.timing.interleaved(runs, repeats, warmup=2)


def peaks(loaded: dict[str, Any], image, question: str, tokens: int) -> dict[str, float]:
    """Megabytes at the peak of a fresh process that answers; an exported model needs no PyTorch in it."""
    found = {}
    for name, model in loaded.items():
        if isinstance(model, nn.Module):
            found[name] = measure.peak_memory(model, models.chat(model, image, question), tokens)["peak_mb"]
        else:
            found[name] = measure.profile_exported(model.folder, image, question, tokens, 1)["peak_mb"]
    return found


def times(work: Path, repeats: int) -> dict:
    row, loaded = data.test_split(1)[0], {}
    for name, (_, runtime, precision) in DEPLOYED.items():
        model = models.load("mini-vlm") if runtime == "torch" else inference.load_exported(work / "exports" / name)
        loaded[name] = quantize.bf16(model) if precision == "bf16" else model
    asked = (row["image"], row["question"], NEW_TOKENS)
    return {"speed": timed(loaded, *asked, repeats), "peak_mb": peaks(loaded, *asked)}


def real(work: Path, repeats: int) -> dict:
    """The same plan on the real size, with random weights: no accuracy, and no training, which changes no time."""
    image, loaded = data.scenes.render(data.scenes.make_scene(5), 512), {}
    for name, (pruned, less, runtime, precision) in REAL_ROWS.items():
        folder = work / "real" / name
        if runtime == "torch" or not folder.exists():
            model = mini_model.real_size(REAL)
            scores = prune.magnitude_importance(model) if pruned else {}
            for part in scores:
                keep = round(SHARES[part] * scores[part]["neurons"].shape[-1])
                model = prune.keep_ffn_neurons(model, {part: prune.strongest(scores[part]["neurons"], keep)})
            model = coarser(model, FACTOR) if less else model
            if runtime == "torch":
                loaded[name] = quantize.bf16(model) if precision == "bf16" else model
                continue
            with export.written(model, folder, runtime, precision, (), False):  # random weights: parity proves nothing
                pass
        loaded[name] = inference.load_exported(folder)
    mb = {n: graph_mb(m.folder) if not isinstance(m, nn.Module) else measure.model_bytes(m) / 1e6 for n, m in loaded.items()}
    asked = (image, REAL_QUESTION, NEW_TOKENS)
    return {"speed": timed(loaded, *asked, repeats), "peak_mb": peaks(loaded, *asked), "mb": mb}


# ---- all of it


def run(parts: tuple[str, ...] = (), work: Path = WORK, n: int | None = None, shrink: int = 1) -> dict:
    """What results/together.json says, of the parts named or of all. Less of it with `n` and `shrink`."""
    kept, config = Kept(work), replace(CONFIG, steps=max(2, CONFIG.steps // shrink))
    wanted, repeats = parts or ("grid", "exports", "times", "real"), max(1, REPEATS // shrink)
    if "grid" in wanted:
        grid(kept, config, n)
    if "exports" in wanted:
        exported(kept, config, n)
    if "times" in wanted:
        kept.row("times", lambda: times(work, repeats) | {"environment": measure.environment()})
    if "real" in wanted:
        kept.row("real", lambda: real(work, max(1, repeats // 3)) | {"environment": measure.environment()})
    return content(kept.rows, work, config)


def content(rows: dict, work: Path, config: train.TrainConfig) -> dict:
    """What is published: each row with its change against fp32 on the same questions, without the answers."""
    base, found = rows["whole"]["right"], {"plans": {}, "deployed": {}}
    for name in (*PLANS, *(f"deployed: {name}" for name in DEPLOYED)):
        if name not in rows:
            continue
        row = rows[name]
        group = "deployed" if name.startswith("deployed: ") else "plans"
        name = name.removeprefix("deployed: ")
        found[group][name] = {k: v for k, v in row.items() if k not in ("right", "parameters")}
        found[group][name]["change"] = evaluate.paired(base[: len(row["right"])], row["right"])
    pairs = {
        f"{order}, {bits} bits": evaluate.paired(*(rows[f"{steps}, {bits} bits"]["right"] for steps in ("P-D-Q", order)))
        for bits in (4, 2)
        for order in ORDERS[1:]
        if {f"P-D-Q, {bits} bits", f"{order}, {bits} bits"} <= rows.keys()
    }
    logs = {path.parent.name: train.read_log(path.parent) for path in sorted(work.glob("*/log.jsonl"))}
    losses = {name: {"step": log["step"][::10], "answers": log["answers"][::10]} for name, log in logs.items()}
    about = (
        f"P keeps {KEEP['vision']} neurons of each of the vision encoder's FFNs and {KEEP['language']} of each of the language"
        f" model's; T a pixel shuffle of {FACTOR}; D {config.steps} steps of {config.batch} images with 13 questions each; Q in"
        f" groups of {GROUP}, GPTQ on {CALIBRATION} images; test questions, paired; one seed each"
    )
    told = {"about": about, "config": vars(config), **found, "against P-D-Q": pairs, "losses": losses}
    return told | {part: rows[part] for part in ("times", "real") if part in rows}


if __name__ == "__main__":
    if sys.argv[1:2] == ["teach"]:
        for plan in sys.argv[2:]:
            model_of(*PLANS[plan], WORK, CONFIG)
    else:
        results = {"environment": measure.environment(), **run(tuple(sys.argv[1:]))}
        models.write_json(ROOT / "results" / "together.json", results)
