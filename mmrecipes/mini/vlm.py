"""Trains the house model `mini-vlm` from nothing: one command, on two CPU cores or a GPU, resumable.

In stages, as the field does it (LLaVA, arXiv:2304.08485; SmolVLM, arXiv:2504.05299), told in notebook 02:
1. `vision`: the vision encoder alone learns, patch by patch, what the scene's ground truth says is there; then
   `reading`: the same on images with much printed on them, the characters weighted up, since they come last;
2. `align`: connector and language model learn to answer, with the vision encoder frozen, helped by aligned visual tokens,
   attention supervision and probes (`mini.losses`), since answers alone teach too little in a few hours;
3. `joint`: everything is trained, at a lower rate; the vision encoder keeps its first task, too, so that it does not forget.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrecipes.data.splits import block
from mmrecipes.errors import UserError
from mmrecipes.mini.batches import MANY, ChatBatches, VisionBatches
from mmrecipes.mini.losses import Probes, answer_loss
from mmrecipes.mini.model import make_model, make_processor
from mmrecipes.models import saving
from mmrecipes.train.loop import Loss, TrainConfig, fit, main_process

STAGES = {
    "vision": TrainConfig(1000, 64, 0.005, 1.5e-3),
    "reading": TrainConfig(2200, 64, 0.004, 1e-3),
    "align": TrainConfig(1700, 16, 0.004, 1e-3),
    "joint": TrainConfig(500, 16, 0.0007, 2e-4),
}
DENSE = ("vision", "reading")  # the stages that train the vision encoder alone, patch by patch


def train_mini_vlm(
    out: Path,
    work: Path = Path("runs/mini-vlm"),
    stages: Mapping[str, TrainConfig] | None = None,
    device: str | None = None,
    model: nn.Module | None = None,
) -> Path:
    """Train `mini-vlm` from nothing into directory `out`; a killed run goes on where its last checkpoint in `work` was.
    `model`, one of its class with four layers in its language model, is trained in place instead. Returns `out`. Raises
    UserError when `out` holds something that is not a model, before any work, and as `train.fit` does.
    """
    kind, expected = type(model).__name__, "Idefics3ForConditionalGeneration"
    if model is not None and (kind != expected or model.config.text_config.num_hidden_layers != 4):
        raise UserError(f"train: a {kind}; expected an {expected} with four layers in its language model")
    saving.check_replaceable(out)
    processor, stages = make_processor(), stages or STAGES
    model = make_model(processor.tokenizer) if model is None else model.requires_grad_(True)
    probes = Probes(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    both, log, size = nn.ModuleDict({"model": model, "probes": probes}), [], sum(p.numel() for p in model.parameters())
    for name, config in stages.items():
        model.model.vision_model.requires_grad_(name != "align")
        batches = stage_batches(name, config, processor.tokenizer)
        config = replace(config, device=device or config.device, about=f"{name} of {size} parameters")
        fit(both, batches, _stage_loss(name, batches), config, work / name)
        rows = (work / name / "log.jsonl").read_text().splitlines()
        log += [{"stage": name} | json.loads(row) for i, row in enumerate(rows) if i % 10 == 0 or i + 1 == len(rows)]
    if not main_process():
        return out
    return saving.save(model.eval(), processor, out, dtype=torch.bfloat16, extra={"training.json": json.dumps(log)})


def stage_batches(name: str, config: TrainConfig, tokenizer) -> VisionBatches | ChatBatches:
    """What one of `STAGES` trains on, from a block of scenes of its own."""
    seeds = block(f"mini-vlm/{name}")
    if name in DENSE:
        return VisionBatches(seeds, config.steps, config.batch, printed=MANY if name == "reading" else 0)
    return ChatBatches(seeds, config.steps, config.batch, tokenizer)


def _stage_loss(name: str, batches: VisionBatches | ChatBatches) -> Loss:
    def loss(both: nn.ModuleDict, batch: Any) -> tuple[Tensor, dict[str, float]]:
        if name not in DENSE:
            return answer_loss(both["model"], batch, batches.word_ids, 0.1, both["probes"])
        features = both["model"].model.vision_model(batch[0]).last_hidden_state
        return both["probes"].patches(features, *batch[1:], 3.0 if name == "reading" else 1.0)  # printed characters come last

    return loss
