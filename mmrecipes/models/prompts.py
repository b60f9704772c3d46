"""Images and questions as a model's inputs: one chat turn, or batches with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmrecipes.errors import UserError
from mmrecipes.models.images import load_image
from mmrecipes.models.modules import parts

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel


def teacher_forced(model: torch.nn.Module, rows: Dataset, batch_size: int = 50) -> Iterator[tuple[BatchFeature, list[int]]]:
    """Batches of `rows` (image, question, answer) as the model's inputs, each prompt followed by its answer.

    With each batch, how many tokens each answer has: with their end, they are the last ones of their row. Rows without a
    column `image` become prompts of text alone.
    """
    processor = model.processor
    processor.tokenizer.padding_side = "left"
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    seen = "image" in rows.column_names
    content = [*([{"type": "image"}] if seen else []), {"type": "text", "text": "{}"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    eos = processor.tokenizer.eos_token
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        tails = [f" {a}{eos}" for a in part["answer"]]
        texts = [prompt.replace("{}", q) + t for q, t in zip(part["question"], tails, strict=True)]
        pictures = {"images": [[image.convert("RGB")] for image in part["image"]]} if seen else {}
        inputs = processor(**pictures, text=texts, padding=True, return_tensors="pt").to(model.device, dtype)
        yield inputs, [len(processor.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in tails]


# ---- a picture and a question


def chat(model: PreTrainedModel, pictures: Image.Image | str | Path | list, question: str) -> BatchFeature:
    """Inputs of one turn, pictures first, then the question, on the model's device, pixels in its dtype.

    Raises UserError when the model does not chat (CLIP, SigLIP) or its processor has no chat template.
    """
    if "head" not in parts(model):
        raise UserError(f"{type(model).__name__} compares pictures with texts and does not answer questions; give a VLM")
    if not getattr(model.processor, "chat_template", None):
        raise UserError(
            f"{model.name_or_path or type(model).__name__}: the processor has no chat template; add chat_template.jinja"
        )
    pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
    content = [{"type": "image", "image": load_image(p)} for p in pictures] + [{"type": "text", "text": question}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    dtypes = (p.dtype for p in parts(model)["vision"].parameters() if p.is_floating_point())
    return inputs.to(model.device, next(dtypes, torch.float32))  # the tower's: a model may mix them


@torch.inference_mode()
def ask(model: PreTrainedModel, picture: Image.Image | str | Path | list, question: str, max_new_tokens: int = 16) -> str:
    """The model's answer to `question` about `picture`, decoded greedily, without special tokens, stripped."""
    inputs = chat(model, picture, question)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
