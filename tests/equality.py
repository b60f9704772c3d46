"""Whether an exported model answers as its source does: the same greedy tokens, on images of many shapes, none, two and turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmrecipes.errors import UserError
from mmrecipes.evaluate.generation import eos_token_ids
from mmrecipes.models.prompts import batch_inputs

QUESTION, SECOND = "What colour is the large circle?", "And what is left of it?"
SHAPES = {"landscape": (96, 48), "portrait": (40, 100), "square": (64, 64), "small": (20, 12), "wide": (128, 32)}
PLACE = {"type": "image"}


@dataclass(frozen=True)
class Case:
    """One conversation: its images in order, and messages with a place for each."""

    name: str
    images: list[Image.Image]
    messages: list[dict]


@dataclass(frozen=True)
class Outcome:
    """What the source and another model answered in one case, as token ids; the relative error of the first token's logits."""

    case: str
    wanted: list[int]
    found: list[int]
    error: float


def drawn(width: int, height: int) -> Image.Image:
    """An image of smooth random colours, the same one for the same size."""
    coarse = np.random.default_rng(width * 1000 + height).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def turn(text: str, images: int = 0, role: str = "user") -> dict:
    return {"role": role, "content": [PLACE] * images + [{"type": "text", "text": text}]}


def cases() -> list[Case]:
    """Five shapes of one image, two images, none, and two turns: the second asks on without a new image, or shows another."""
    one = [Case(name, [drawn(*size)], [turn(QUESTION, 1)]) for name, size in SHAPES.items()]
    landscape, portrait = (drawn(*SHAPES[name]) for name in ("landscape", "portrait"))
    talk = [turn(QUESTION, 1), turn("Blue.", role="assistant")]
    return [
        *one,
        Case("two images", [landscape, portrait], [turn(QUESTION, 2)]),
        Case("no image", [], [turn(QUESTION)]),
        Case("two turns", [landscape], [*talk, turn(SECOND)]),
        Case("an image a turn", [landscape, portrait], [*talk, turn(SECOND, 1)]),
    ]


def source_inputs(model: nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """What the source's own processor makes of the conversation."""
    text = model.processor.apply_chat_template(case.messages, add_generation_prompt=True)
    return dict(batch_inputs(model, [case.images] if case.images else None, [text]))


@torch.inference_mode()
def source_answer(model: nn.Module, case: Case, n: int = 12) -> tuple[list[int], np.ndarray]:
    """The source's greedy tokens, at most `n`, without what ends them; and the logits (V) of the first."""
    inputs = source_inputs(model, case)
    logits = model(**inputs).logits[0, -1].float().numpy()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=n)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = eos_token_ids(model)
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))], logits


def compare(model: nn.Module, loaded: Any, n: int = 12) -> Iterator[Outcome]:
    """Each case that the source itself takes, asked of it and of the exported model `loaded`."""
    for case in cases():
        try:
            wanted, logits = source_answer(model, case, n)
        except UserError:  # PaliGemma answers nothing without an image
            continue
        inputs = loaded.inputs(case.images or None, case.messages)
        found = list(loaded.tokens(inputs, n))
        error = np.linalg.norm(loaded.prefill(inputs) - logits) / np.linalg.norm(logits)
        yield Outcome(case.name, wanted, found, float(error))
