"""Two ONNX graphs put back into a PyTorch model, so that `generate` and every evaluation work on them (notebook 11)."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import modeling_outputs

from mmrecipes.errors import UserError
from mmrecipes.export.onnx.graphs import to_onnx
from mmrecipes.export.wrappers import Idefics3Vision, LanguageWithoutCache, check_float32
from mmrecipes.inference.backends import PARTS, onnx_session
from mmrecipes.interrupt import temporary_directory


def tensor_session(path: str | Path, threads: int | None = None, as_written: bool = False) -> Callable[..., Tensor]:
    """A function that runs the graph at `path` on tensors, in its inputs' order, and returns its first output.
    With as many `threads` as PyTorch uses, unless told otherwise; else as `inference.onnx_session`.
    """
    session = onnx_session(path, threads or torch.get_num_threads(), as_written)
    names = [i.name for i in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )


def export_parts(model: nn.Module, folder: str | Path) -> dict[str, Path]:
    """`vision.onnx` and `language.onnx` of a float32 Idefics3-class VLM (SmolVLM, `mini-vlm`) in `folder`, both or neither.
    Batch and text length are free; images are whole and of the model's own size. Raises UserError for another architecture,
    another dtype, or weights that one file cannot hold; ImportError where onnx or onnxscript is missing.
    """
    core = getattr(model, "model", None)
    vision = getattr(core, "vision_model", None)
    if not (hasattr(vision, "post_layernorm") and hasattr(core, "connector") and hasattr(core, "text_model")):
        raise UserError(f"export: {type(model).__name__} is not built like Idefics3; export its parts with onnx.graphs.to_onnx")
    check_float32(model)
    modules = {"vision": Idefics3Vision(model), "language": LanguageWithoutCache(model)}
    size = vision.config.image_size
    images, embeds = torch.randn(2, 3, size, size), torch.randn(2, 12, core.text_model.config.hidden_size)
    mask = torch.arange(12) >= torch.tensor([[0], [3]])  # the second text is padded
    examples = {"vision": {"pixel_values": images}, "language": {"inputs_embeds": embeds, "attention_mask": mask.long()}}
    free = {"pixel_values": {0: "batch"}} | {k: {0: "batch", 1: "tokens"} for k in examples["language"]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with temporary_directory(folder, ".export-") as aside:
        written = {part: to_onnx(modules[part], examples[part], aside / f"{part}.onnx", free) for part in PARTS}
        return {part: path.replace(Path(folder, path.name)) for part, path in written.items()}


class _AttachedVision(nn.Module):
    """Stands where the vision encoder was. The connector is in the graph, so nothing is left for the module of that name."""

    def __init__(self, graph: str | Path):
        super().__init__()
        self.run = tensor_session(graph)

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **_: object):
        if patch_attention_mask is not None and not patch_attention_mask.all():
            raise UserError("attach: an image is padded; the graph takes whole images of the model's size: resize them to it")
        return modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=self.run(pixel_values))


class _AttachedLanguage(nn.Module):
    """Stands where the language model was. Each call reads the whole text anew: the graph has no KV cache."""

    def __init__(self, graph: str | Path, embed_tokens: nn.Module):
        super().__init__()
        self.embed_tokens, self.run = embed_tokens, tensor_session(graph)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, past_key_values=None, **_: object):
        if past_key_values is not None and past_key_values.get_seq_length():
            raise UserError("attach: this language model keeps no KV cache; call the model with use_cache=False")
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask.long()
        return modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.run(inputs_embeds, mask))


def attach(model: nn.Module, graphs: Mapping[str, str | Path]) -> nn.Module:
    """A copy of `model` that computes in ONNX Runtime where `graphs` has a "vision" or a "language" file, else as before.
    `generate` works on it. Without a KV cache each new token reads the whole text again; the image is encoded once an answer.
    """
    if unknown := set(graphs) - set(PARTS):
        raise UserError(f"attach: graphs for {', '.join(sorted(unknown))}; expected {' and '.join(PARTS)}, as export gives them")
    core = model.model
    kept = {id(getattr(model, "processor", None)): getattr(model, "processor", None)}
    if "vision" in graphs:  # what is left out of the copy is never copied
        kept |= {id(core.vision_model): _AttachedVision(graphs["vision"]), id(core.connector): nn.Identity()}
    if "language" in graphs:  # `kept` then also knows the copied embeddings, which a tied head must share
        kept[id(core.text_model)] = _AttachedLanguage(graphs["language"], copy.deepcopy(core.text_model.embed_tokens, kept))
    twin = copy.deepcopy(model, kept)
    if "language" in graphs:
        twin.generation_config.use_cache = twin.config.use_cache = False
    return twin.eval()
