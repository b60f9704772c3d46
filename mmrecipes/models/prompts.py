"""Images and questions as a model's inputs: one chat turn, or batches with their answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from mmrecipes.errors import UserError, one_line
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
    token = getattr(processor, "image_token", None)
    if with_image and token and (bad := [q for q in questions if token in q]):
        raise UserError(f"{bad[0]!r:.80}: contains {token}, which stands for an image; ask without it")
    turns = [[{"role": "user", "content": _content(processor, int(with_image), q)}] for q in questions]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def _content(processor: "ProcessorMixin", n_images: int, question: str) -> list[dict] | str:
    """The content of a turn: places for images, then the question; a string where the template takes only strings."""
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    try:
        if "{'type'" not in processor.apply_chat_template([{"role": "user", "content": content}]):
            return content
    except TypeError:  # it joined the content to a string
        pass
    return f"{getattr(processor, 'image_token', '<image>')}\n" * n_images + question


def batch_inputs(model: nn.Module, images: Sequence[Image.Image | list] | None, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """`processed` on the model's device, pixels in the vision encoder's dtype. Raises UserError as it does."""
    dtypes = (p.dtype for p in parts(model)["vision"].parameters() if p.is_floating_point())  # a model may mix them
    return processed(model.processor, images, texts).to(model.device, next(dtypes, torch.float32))


def processed(processor: "ProcessorMixin", images: Sequence | None, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """`texts` (B) with an image or several each, padded on the left to input_ids (B, T). One BOS, also where the template writes
    it and the tokenizer adds it. UserError where refused."""
    options = {"padding": True, "return_tensors": "pt"}
    processor.tokenizer.padding_side = "left"  # generation continues at the right end
    if images is not None:
        options["images"] = [[i.convert("RGB") for i in (row if isinstance(row, list) else [row])] for row in images]
    if processor.tokenizer.bos_token and texts[0].startswith(processor.tokenizer.bos_token):
        options["add_special_tokens"] = False
    try:
        inputs = processor(text=list(texts), **options)
    except ValueError as e:  # such as PaliGemma's without an image
        raise UserError(f"{type(processor).__name__} cannot prepare this prompt ({one_line(e)}); give what it asks for") from e
    inputs.pop("labels", None)  # PaliGemma's: with them the model computes a loss
    return inputs


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


def chat(model: nn.Module, images: Image.Image | str | Path | list | None, question: str) -> Mapping[str, Tensor]:
    """Inputs of one turn, images first, then the question, on the model's device, pixels in its dtype. None: no image.
    Raises UserError for a model that does not chat, a processor without chat template, and a prompt refused or too long.
    >>> sorted(chat(model, rows[0]["image"], "What is there?"))
    ['attention_mask', 'input_ids', 'pixel_attention_mask', 'pixel_values']
    """
    if "head" not in parts(model):
        raise UserError(f"{type(model).__name__} compares images with texts and does not answer questions; give a VLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder, and only decoders are supported; give another model")
    if not getattr(model.processor, "chat_template", None):
        raise UserError(f"{model.name_or_path or type(model).__name__}: it has no chat template; add chat_template.jinja")
    images = images if isinstance(images, list | tuple) else [] if images is None else [images]
    turn = {"role": "user", "content": _content(model.processor, len(images), question)}
    text = model.processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = batch_inputs(model, [[load_image(i) for i in images]] if images else None, [text])
    length, most = inputs["input_ids"].shape[1], getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and length >= most:
        raise UserError(f"the prompt has {length} tokens, and the model takes {most}: shorten it")
    return inputs


@torch.inference_mode()
def ask(model: nn.Module, image: Image.Image | str | Path | list | None, question: str, max_new_tokens: int = 16) -> str:
    """The model's answer to `question` about `image`, decoded greedily, without special tokens, stripped.
    >>> ask(model, rows[0]["image"], rows[0]["question"]) == rows[0]["answer"]
    True
    """
    inputs = chat(model, image, question)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return model.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
