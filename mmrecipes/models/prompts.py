"""Images and questions as a model's inputs: one chat turn, or batches with their answers."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from mmrecipes.errors import ParityError, UserError, one_line
from mmrecipes.models.images import load_image
from mmrecipes.models.messages import content, processed
from mmrecipes.models.modules import parts, refuse_encoder_decoder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

Rows: TypeAlias = "Dataset"  # with columns image, question and answer
PIXEL_VALUES = 2**23  # numbers that the vision encoder gets at once: it takes about a hundred times their bytes


def chat_prompts(processor: "ProcessorMixin", questions: Sequence[str], images: int = 1) -> list[str]:
    """The text of one chat turn for each question, after places for its images, up to where the answer begins.
    Raises UserError for a question that contains the processor's image token, which would be taken for a second image.
    >>> chat_prompts(model.processor, ["What is {}?"])[0].endswith("What is {}?<end_of_utterance>\\nAssistant:")
    True
    """
    turns = [[{"role": "user", "content": content(processor, images, q)}] for q in questions]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def batch_inputs(model: nn.Module, images: Sequence[Image.Image | list] | None, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """`processed` on the model's device, pixels in the vision encoder's dtype. UserError as it does, and for a long prompt."""
    dtypes = (p.dtype for p in parts(model)["vision"].parameters() if p.is_floating_point())  # a model may mix them
    inputs, text = processed(model.processor, images, texts), model.config.get_text_config()
    length, most = inputs["input_ids"].shape[1], getattr(text, "max_position_embeddings", None)
    if most and length >= most:
        visual = (inputs["input_ids"] == (getattr(model.processor, "image_token_id", None) or -1)).sum(1).max()
        cure = "shorten it, or give fewer or smaller images" if visual else "shorten it"
        raise UserError(f"the prompt has {length} tokens, {visual} of them for images, and the model takes {most}: {cure}")
    return inputs.to(model.device, next(dtypes, torch.float32))


def rows_at_once(model: nn.Module, rows: "Rows | Mapping[str, Sequence]", most: int) -> int:
    """How many of `rows` (image, ...) make a batch, at most `most`: fewer where the processor makes large images or many tiles.
    >>> rows_at_once(model, rows, 4)
    4
    """
    images = rows["image"][:] if "image" in getattr(rows, "column_names", rows) else []
    if not images or most == 1:
        return most
    largest = max(images, key=lambda image: image.width * image.height)
    inputs = batch_inputs(model, [largest], chat_prompts(model.processor, ["?"]))
    return max(1, min(most, PIXEL_VALUES // inputs["pixel_values"].numel()))


def teacher_forced(model: nn.Module, rows: Rows, batch_size: int = 50) -> Iterator[tuple[Mapping[str, Tensor], list[int]]]:
    """Batches of `rows` (image, question, answer) as inputs, each prompt followed by its answer; with each batch, how many
    tokens each answer has: with the end of sequence, they are the last of their row. Without a column `image`: text alone.
    >>> [len(lengths) for _, lengths in teacher_forced(model, rows, 2)]
    [2, 2]
    """
    refuse_encoder_decoder(model)
    tokenizer, seen = model.processor.tokenizer, "image" in rows.column_names
    for i in range(0, len(rows), batch_size):
        batch = rows[i : i + batch_size]
        answers = [f" {answer}{tokenizer.eos_token}" for answer in batch["answer"]]
        texts = [p + a for p, a in zip(chat_prompts(model.processor, batch["question"], int(seen)), answers, strict=True)]
        inputs = batch_inputs(model, batch["image"] if seen else None, texts)
        yield inputs, [len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]


def chat(model: nn.Module, images: Image.Image | str | Path | list | None, question: str) -> Mapping[str, Tensor]:
    """Inputs of one turn, images first, then the question, on the model's device, pixels in its dtype. None: no image.
    Warns of images that show nothing. UserError for a model that does not chat, no chat template, a prompt refused or too long.
    >>> sorted(chat(model, rows[0]["image"], "What is there?"))
    ['attention_mask', 'input_ids', 'pixel_attention_mask', 'pixel_values']
    """
    if "head" not in parts(model):
        raise UserError(f"{type(model).__name__} compares images with texts and does not answer questions; give a VLM")
    refuse_encoder_decoder(model)
    images = [load_image(i) for i in (images if isinstance(images, list | tuple) else [] if images is None else [images])]
    for w, h in (i.size for i in images):
        if min(w, h) < 8 or max(w, h) > 50 * min(w, h):
            warnings.warn(f"an image of {w} x {h} px shows nothing, too small or narrow: answers are guesses", stacklevel=2)
    return batch_inputs(model, [images] if images else None, chat_prompts(model.processor, [question], len(images)))


@torch.inference_mode()
def greedy(model: nn.Module, inputs: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
    """Token ids (B, new) of greedy answers. Raises ParityError that names the first module whose output is not finite when logits
    are not, and UserError where parts of several dtypes meet."""

    def finite(_: Tensor, logits: Tensor) -> Tensor:
        if not (logits < torch.inf).all():  # NaN is not; -inf is a token that is ruled out
            where = first_not_finite(model, inputs) or "its head"
            cure = "fp16 ends at 65504, load bf16" if model.dtype == torch.float16 else "check the step that made it"
            raise ParityError(f"the model's logits are not finite: it is broken, not lossy; first in {where}: {cure}")
        return logits

    try:
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, logits_processor=[finite])
    except RuntimeError as e:
        dtypes = {name: {str(p.dtype) for p in m.parameters() if p.is_floating_point()} for name, m in parts(model).items()}
        if len(set().union(*dtypes.values())) < 2 or "type" not in str(e):
            raise
        raise UserError(f"parts of several dtypes meet ({dtypes}: {one_line(e, 80)}); load the model with one dtype") from e
    return ids[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def first_not_finite(model: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """The name of the first module whose output is not finite when `model` runs on `inputs`; None if all are."""
    bad: list[str] = []

    def see(name: str, out: object) -> None:
        tensors = out if isinstance(out, tuple | list) else [out]
        bad.extend(name for t in tensors if isinstance(t, Tensor) and not torch.isfinite(t).all())

    hooks = [m.register_forward_hook(lambda _, __, out, name=name: see(name, out)) for name, m in model.named_modules()]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return next(iter(bad), None)


@torch.inference_mode()
def ask(model: nn.Module, image: Image.Image | str | Path | list | None, question: str, max_new_tokens: int = 16) -> str:
    """The model's answer to `question` about `image`, decoded greedily, without special tokens, stripped. Raises as `greedy`.
    >>> ask(model, rows[0]["image"], rows[0]["question"]) == rows[0]["answer"]
    True
    """
    ids = greedy(model, chat(model, image, question), max_new_tokens)[0]
    return model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
