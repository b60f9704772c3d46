"""Images and questions as a model's inputs: one chat turn, or batches with their answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.images import load_image
from mmrecipes.models.modules import parts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

Rows: TypeAlias = "Dataset"  # with columns image, question and answer


def chat_prompts(processor: "ProcessorMixin", questions: Sequence[str], with_image: bool = True) -> list[str]:
    """The text of one chat turn for each question, after a place for one image, up to where the answer begins.
    Raises UserError for a question that contains the processor's image token, which would be taken for a second image.
    >>> chat_prompts(model.processor, ["What is {}?"])[0].endswith("What is {}?<end_of_utterance>\\nAssistant:")
    True
    """
    place = [{"type": "image"}] if with_image else []
    turns = [[{"role": "user", "content": [*place, {"type": "text", "text": q}]}] for q in questions]
    token = getattr(processor, "image_token", None)
    if with_image and token and (bad := [q for q in questions if token in q]):
        raise UserError(f"{bad[0]!r:.80}: contains {token}, which stands for an image; ask without it")
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def batch_inputs(model: nn.Module, images: Sequence[Image.Image] | None, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """`texts` (B) with one image each, padded on the left to input_ids (B, T), on the model's device, pixels in its dtype."""
    model.processor.tokenizer.padding_side = "left"  # generation continues at the right end
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pixels = {} if images is None else {"images": [[image.convert("RGB")] for image in images]}
    return model.processor(**pixels, text=list(texts), padding=True, return_tensors="pt").to(model.device, dtype)


def teacher_forced(model: nn.Module, rows: Rows, batch_size: int = 50) -> Iterator[tuple[Mapping[str, Tensor], list[int]]]:
    """Batches of `rows` (image, question, answer) as inputs, each prompt followed by its answer; with each batch, how many
    tokens each answer has: with the end of sequence, they are the last of their row. Without a column `image`: text alone.
    >>> [len(lengths) for _, lengths in teacher_forced(model, rows, 2)]
    [2, 2]
    """
    tokenizer, seen = model.processor.tokenizer, "image" in rows.column_names
    for i in range(0, len(rows), batch_size):
        batch = rows[i : i + batch_size]
        answers = [f" {answer}{tokenizer.eos_token}" for answer in batch["answer"]]
        texts = [p + a for p, a in zip(chat_prompts(model.processor, batch["question"], seen), answers, strict=True)]
        inputs = batch_inputs(model, batch["image"] if seen else None, texts)
        yield inputs, [len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]


def chat(model: nn.Module, images: Image.Image | str | Path | list, question: str) -> Mapping[str, Tensor]:
    """Inputs of one turn, images first, then the question, on the model's device, pixels in its dtype.
    Raises UserError when the model does not chat (CLIP, SigLIP), its processor has no chat template, or the prompt is too long.
    >>> sorted(chat(model, rows[0]["image"], "What is there?"))
    ['attention_mask', 'input_ids', 'pixel_attention_mask', 'pixel_values']
    """
    if "head" not in parts(model):
        raise UserError(f"{type(model).__name__} compares images with texts and does not answer questions; give a VLM")
    if not getattr(model.processor, "chat_template", None):
        name = model.name_or_path or type(model).__name__
        raise UserError(f"{name}: the processor has no chat template; add chat_template.jinja")
    images = images if isinstance(images, list | tuple) else [images]
    content = [{"type": "image", "image": load_image(i)} for i in images] + [{"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = model.processor.apply_chat_template([{"role": "user", "content": content}], **options)
    length, most = inputs["input_ids"].shape[1], getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and length >= most:
        raise UserError(f"the prompt has {length} tokens, and the model takes {most}: shorten it")
    dtypes = (p.dtype for p in parts(model)["vision"].parameters() if p.is_floating_point())
    return inputs.to(model.device, next(dtypes, torch.float32))  # the vision encoder's: a model may mix them


@torch.inference_mode()
def ask(model: nn.Module, image: Image.Image | str | Path | list, question: str, max_new_tokens: int = 16) -> str:
    """The model's answer to `question` about `image`, decoded greedily, without special tokens, stripped.
    >>> ask(model, rows[0]["image"], rows[0]["question"]) == rows[0]["answer"]
    True
    """
    inputs = chat(model, image, question)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return model.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
