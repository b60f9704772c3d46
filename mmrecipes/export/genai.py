"""`export.export` for OpenVINO GenAI: the files that its pipelines for LLaVA read, which schedule many requests at once.

Three graphs and a tokenizer: `vision_embeddings` (pixels to visual tokens), `text_embeddings` (token ids to embeddings),
`language` (embeddings, mask and positions to logits of every position; the KV cache is its state). A model whose images or tiles
all have one size, and become visual tokens one by one, fits in there as LLaVA does: each tile is an image of its own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from mmrecipes import quiet
from mmrecipes.errors import ParityError, require
from mmrecipes.export import wrappers
from mmrecipes.export.openvino import _quantized, _vision, shared_heads
from mmrecipes.families import Family
from mmrecipes.inference import genai
from mmrecipes.inference.exported import Exported, generation_rules
from mmrecipes.inference.genai import TAG
from mmrecipes.models import modules

LIKE_LLAVA = ("tiles", "idefics3")  # families
LENGTH, CLOSE = 8, 1e-2  # tokens of each answer that are checked; how near to the likeliest each must be


class VisualTokens(nn.Module):
    """pixel_values (1, 3, H, W) -> visual tokens (1, T, D)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.encoder(pixel_values=pixel_values)
        return tokens.reshape(1, -1, tokens.shape[-1])


class Words(nn.Module):
    """input (B, T), token ids -> embeddings (B, T, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input: Tensor) -> Tensor:
        return self.embed_tokens(input)


class Decoder(nn.Module):
    """inputs_embeds (B, T, D), attention_mask (B, S), position_ids (B, T), a cache -> logits (B, T, V), the cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        parts = modules.parts(model)
        self.decoder, self.head = parts["language"], parts["head"]

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: object) -> dict:
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.decoder(**given, past_key_values=past_key_values, use_cache=True)
        return {"logits": self.head(out.last_hidden_state), "past_key_values": out.past_key_values}


def obstacle(model: nn.Module, family: Family) -> str | None:
    """Why a model cannot be laid out as LLaVA, or not be answered by it; None where it can."""
    config, rules = model.config.get_text_config(), generation_rules(model.generation_config)
    if family.masks:
        return "its image tokens see each other, and the pipeline for LLaVA only looks back"
    if family.name not in LIKE_LLAVA:
        return "its images are not tiles of one size that stand, each alone, for one row of visual tokens, as LLaVA's do"
    if model.config.model_type == "internvl":
        return "its tiles follow one another without text between them, and GenAI takes what does for one image"
    if wrappers.windows(config):
        return f"layers of its decoder look back only {config.sliding_window} tokens"
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are capped"
    return f"its generation config has {', '.join(rules)}, which GenAI applies to no prompt with images" if rules else None


def write_genai(
    model: nn.Module, folder: Path, precisions: Mapping[str, str], runs: Sequence[Mapping[str, np.ndarray]], batches: bool = False
) -> None:
    """Write the graphs and the tokenizer to `folder`. Embeddings have the precision of the language model. Raises as `export`."""
    require("openvino", "nncf", "openvino_tokenizers", extra="genai")
    import openvino as ov

    for part, name in (("vision", "vision_embeddings"), ("language", "text_embeddings"), ("language", "language")):
        with quiet.library_logs(), torch.no_grad():
            graph = {"vision_embeddings": _visual_tokens, "text_embeddings": _words, "language": _decoder}[name](model)
            ov.save_model(_quantized(graph, precisions[part], ()), folder / f"openvino_{name}_model.xml", compress_to_fp16=False)
        del graph
    _write_tokenizer(model, folder)


def _visual_tokens(model: nn.Module):
    encoder, image, _ = wrappers.vision_graph(model)
    return _named(_vision(VisualTokens(encoder).eval(), image, {}), "pixel_values", "last_hidden_state")


def _words(model: nn.Module):
    free = {"input": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)}
    return _named(_vision(Words(model).eval(), {"input": torch.zeros(2, 3, dtype=torch.int64)}, free), "input", "inputs_embeds")


def _named(graph, given: str, made: str):
    graph.inputs[0].get_tensor().set_names({given})
    graph.outputs[0].get_tensor().set_names({made})
    return graph


def _decoder(model: nn.Module):
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    module, cache, width = Decoder(model).eval(), DynamicCache(), model.config.get_text_config().hidden_size
    module.decoder(inputs_embeds=torch.randn(2, 5, width), past_key_values=cache, use_cache=True)  # as the decoder makes it
    example = {"inputs_embeds": torch.randn(2, 3, width), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    example |= {"position_ids": torch.arange(5, 8).expand(2, -1).contiguous(), "past_key_values": cache}
    first, tokens, grows = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1), torch.export.Dim.DYNAMIC
    axes = {"inputs_embeds": {0: first, 1: tokens}, "attention_mask": {0: first, 1: grows}, "position_ids": {0: first, 1: tokens}}
    axes["past_key_values"] = [{0: first, 2: grows}] * (2 * len(cache.layers))
    graph = shared_heads(OpenVINOExporter().export(module, example, OpenVINOConfig(dynamic_shapes=axes)).program)
    graph.reshape({"inputs_embeds": [-1, -1, width]})
    return graph


def _write_tokenizer(model: nn.Module, folder: Path) -> None:
    """The pipeline writes a line break behind each image, whether the model's prompt has one there or not, and knows images as
    TAG alone: the tokenizer takes the one back out, and reads the other as the model's own token."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep

    known = model.processor.tokenizer
    tokenizer, detokenizer = convert_tokenizer(known, with_detokenizer=True)
    own = known.convert_ids_to_tokens(model.config.image_token_id)
    text = next(node for node in tokenizer.get_ordered_ops() if node.get_type_name() == "StringTensorUnpack")
    readers = [list(port.get_target_inputs()) for port in text.outputs()]
    made = text.outputs()
    for pattern, instead in ((f"{TAG}\n", TAG), (TAG, own)):
        made = RegexNormalizationStep(pattern, instead).get_ov_subgraph(list(made))
    for old, new in zip(readers, made, strict=True):
        for reader in old:
            reader.replace_source_output(new)
    ov.save_model(tokenizer, folder / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, folder / "openvino_detokenizer.xml")


def write_configs(model: nn.Module, folder: Path) -> None:
    """What the pipeline reads of a LLaVA: kind of model, width, image token; mean, deviation and size of its images. What the
    model's own image processor is then stands in processor_config.json alone, which transformers reads first."""
    shown, own = model.processor.image_processor, folder / "processor_config.json"
    known = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    known = {"image_processor": shown.to_dict(), "processor_class": type(model.processor).__name__} | known
    own.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    height, width = wrappers.vision_graph(model)[1]["pixel_values"].shape[2:]
    config = {"model_type": "llava", "hidden_size": model.config.get_text_config().hidden_size}
    images = {"image_mean": list(shown.image_mean), "image_std": list(shown.image_std)}
    images |= {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    for name, content in (
        ("config", config | {"image_token_id": model.config.image_token_id}),
        ("preprocessor_config", images),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_pipeline(folder: Path, loaded: Exported, shown: Sequence[Sequence[Image.Image]]) -> None:
    """ParityError where the pipeline, asked about all lists of images in `shown` at once, answers a token that `loaded`, the same
    graphs one conversation at a time, rates lower than its likeliest by more than CLOSE, a share of the norm of its logits."""
    cases = [(list(images), "What is in this picture?") for images in shown]
    stops = loaded.manifest["eos_token_ids"]
    for (images, text), tokens in zip(cases, genai.load_genai(folder).tokens(cases, LENGTH), strict=True):
        logits = loaded.prefill(loaded.inputs(images, text))
        for token in tokens if len(tokens) == LENGTH else [*tokens, *stops[:1]]:
            rated = logits[stops].max() if token in stops else logits[token]
            if not logits.max() - rated <= CLOSE * np.linalg.norm(logits):
                raise ParityError("GenAI's pipeline answers otherwise than the graphs it runs: it is broken, and was not kept")
            logits = loaded.graphs.step(np.array([[token]]))
