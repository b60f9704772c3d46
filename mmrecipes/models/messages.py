"""Messages as a processor's inputs, without PyTorch: exported models need them, too."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmrecipes.errors import UserError, one_line
from mmrecipes.models.images import load_image

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def content(processor: "ProcessorMixin", n_images: int, question: str) -> list[dict] | str:
    """The content of a turn: places for images, then the question; a string where the template takes only strings. UserError
    for a question with the image token, and where there is no template."""
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{type(processor).__name__}: no chat template; add chat_template.jinja if the model answers questions")
    token = getattr(processor, "image_token", None)
    if n_images and token and str(token) in question:
        raise UserError(f"{question!r:.80}: contains {token}, which stands for an image; ask without it")
    parts = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    try:
        if "{'type'" not in processor.apply_chat_template([{"role": "user", "content": parts}]):
            return parts
    except TypeError:  # it joined the content to a string
        pass
    return f"{getattr(processor, 'image_token', '<image>')}\n" * n_images + question


def processed(
    processor: "ProcessorMixin", images: Sequence | None, texts: Sequence[str], tensors: str = "pt"
) -> Mapping[str, Any]:
    """`texts` (B) with an image or several each, padded on the left to input_ids (B, T). One BOS, also where the template writes
    it and the tokenizer adds it. `tensors`: "pt" or "np". UserError where refused."""
    options = {"padding": True, "return_tensors": tensors}
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


def conversation(processor: "ProcessorMixin", images: Any, text: str | Sequence[dict]) -> Mapping[str, Any]:
    """One conversation as NumPy arrays: `images`, None, one or a list, for the places in messages `text`, or before a question.
    Raises UserError for other messages, and where there are more or fewer places than images.
    """
    images = [] if images is None else [*images] if isinstance(images, list | tuple) else [images]
    if isinstance(text, str):
        text = [{"role": "user", "content": content(processor, len(images), text)}]
        shown = images
    else:
        if not isinstance(text, list | tuple) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in text):
            raise UserError(f"text: {text!r:.80}; expected a question, or a list of messages with a role and a content each")
        text = [t | {"content": [{"type": "text", "text": c}] if isinstance(c := t["content"], str) else c} for t in text]
        places = [part for turn in text for part in turn["content"] if part.get("type") == "image"]
        given = iter(images)
        shown = [part["image"] if "image" in part else next(given, None) for part in places]
        if None in shown or next(given, None) is not None:
            raise UserError(f"{len(images)} images, and {len(places)} places for them in the messages: give as many")
    prompt = processor.apply_chat_template(text, add_generation_prompt=True)
    return processed(processor, [[load_image(image) for image in shown]] if shown else None, [prompt], "np")
