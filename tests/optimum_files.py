"""Writes a tiny model in the files of optimum and transformers.js: real graphs, by PyTorch's and OpenVINO's own converters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class Vision(torch.nn.Module):
    """pixel_values (N, 3, H, W) -> visual tokens (N, T, D); for Idefics3 also the masks that its graphs take."""

    def __init__(self, model):
        super().__init__()
        self.core = model.model

    def forward(self, pixel_values):
        return torch.stack(list(self.core.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))


class Idefics3OpenVino(Vision):
    """pixel_values (N, 3, H, W), which patches are real (N, rows, columns), their positions (N, P) -> visual tokens (N, T, D)."""

    def forward(self, pixel_values, patch_attention_mask, patch_position_ids):
        vision = self.core.vision_model
        hidden = vision.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = hidden + vision.embeddings.position_embedding(patch_position_ids)
        mask = torch.where(patch_attention_mask.flatten(1)[:, None, None], 0.0, -1e9)
        hidden = vision.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return self.core.connector(vision.post_layernorm(hidden))


class Idefics3Onnx(Idefics3OpenVino):
    """pixel_values (1, N, 3, H, W), which pixels are real (1, N, H, W): the same, for whole images."""

    def forward(self, pixel_values, pixel_attention_mask):
        patch = self.core.vision_model.patch_size
        real = pixel_attention_mask[0, :, ::patch, ::patch]
        at = torch.arange(real.shape[1] * real.shape[2])[None]
        return super().forward(pixel_values[0], real, at)


class Past:
    """A KV cache that converters can follow: lists of keys and values (1, heads, S, width) by layer."""

    def __init__(self, past):
        self.held = [list(past[i : i + 2]) for i in range(0, len(past), 2)]

    def get_seq_length(self, layer=0):
        return self.held[layer][0].shape[2]

    def update(self, keys, values, layer, *_):
        self.held[layer] = [torch.cat(pair, dim=2) for pair in zip(self.held[layer], (keys, values), strict=True)]
        return self.held[layer]


class Decoder(torch.nn.Module):
    """inputs_embeds (1, T, D), attention_mask (1, S + T), position_ids (1, T), keys and values by layer -> logits, both again."""

    def __init__(self, model):
        super().__init__()
        self.head = model.lm_head
        self.decoder = getattr(model.model, "language_model", None) or model.model.text_model

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        cache, at = Past(past), torch.arange(attention_mask.shape[1])
        seen = (at[None] <= at[-inputs_embeds.shape[1] :, None]) & (attention_mask > 0)
        given = {"attention_mask": torch.where(seen, 0.0, -1e9)[None, None], "position_ids": position_ids}
        out = self.decoder(inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=True, **given)
        return self.head(out.last_hidden_state), *(tensor for pair in cache.held for tensor in pair)


class Restarting(Decoder):
    """As `Decoder`, but each run counts positions from 0 again: right for a prompt, wrong from the second token on."""

    def forward(self, inputs_embeds, attention_mask, position_ids, *past):
        return super().forward(inputs_embeds, attention_mask, position_ids - position_ids[:, :1], *past)


def parts(model, vision: torch.nn.Module, image: dict[str, torch.Tensor], decoder=Decoder):
    """Of each graph: module, example by name, names of the outputs, and which axes are free."""
    text = model.config.get_text_config()
    heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    names = [f"{i}.{kind}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]
    given = {"inputs_embeds": torch.randn(1, 3, text.hidden_size), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
    given["position_ids"] = torch.arange(4, 7)[None]
    given |= {f"past_key_values.{name}": torch.randn(1, heads, 4, width) for name in names}
    free = {"inputs_embeds": {1: "T"}, "attention_mask": {1: "S"}, "position_ids": {1: "T"}}
    free |= {f"past_key_values.{name}": {2: "P"} for name in names}
    ids = {"input_ids": torch.arange(4)[None]}
    yield vision, image, ["image_features"], {}
    yield model.get_input_embeddings(), ids, ["inputs_embeds"], {"input_ids": {1: "T"}}
    yield decoder(model), given, ["logits", *(f"present.{name}" for name in names)], free


def configs(model, out: Path) -> None:
    for each in (model.config, model.generation_config, model.processor):
        each.save_pretrained(out)


def write_onnx(model, out: Path, subfolder: str = "", decoder=Decoder) -> Path:
    """transformers.js's layout with `subfolder` "onnx", else optimum's."""
    model.set_attn_implementation("eager")
    (out / subfolder).mkdir(parents=True)
    configs(model, out)
    side = model.config.vision_config.image_size
    vision, image = Vision(model), {"pixel_values": torch.randn(1, 3, side, side)}
    if hasattr(model.model, "connector"):
        real = torch.ones(1, 1, side, side, dtype=torch.bool)
        vision, image = Idefics3Onnx(model), {"pixel_values": image["pixel_values"][None], "pixel_attention_mask": real}
    files = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    for name, (module, example, outputs, free) in zip(files, parts(model, vision, image, decoder), strict=True):
        options = {"input_names": list(example), "output_names": outputs, "dynamic_axes": free, "dynamo": False}
        torch.onnx.export(module.eval(), tuple(example.values()), out / subfolder / f"{name}.onnx", opset_version=18, **options)
    return out


def write_openvino(model, out: Path) -> Path:
    """optimum-intel's layout: the cache is the language graph's state, reordered by beam_idx."""
    import openvino as ov

    model.set_attn_implementation("eager")
    out.mkdir(parents=True)
    configs(model, out)
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    vision, image = Vision(model), {"pixel_values": torch.randn(1, 3, side, side)}
    if hasattr(model.model, "connector"):
        n = side // patch
        mask, at = torch.ones(1, n, n, dtype=torch.bool), torch.arange(n * n)[None]
        vision, image = Idefics3OpenVino(model), image | {"patch_attention_mask": mask, "patch_position_ids": at}
    files = ("vision_embeddings", "text_embeddings", "language")
    for name, (module, example, outputs, free) in zip(files, parts(model, vision, image), strict=True):
        graph = ov.convert_model(module.eval(), example_input=tuple(example.values()))
        for port, (key, value) in zip(graph.inputs, example.items(), strict=True):
            port.get_tensor().set_names({key})
            port.get_node().set_partial_shape(
                ov.PartialShape([-1 if i in free.get(key, {}) else n for i, n in enumerate(value.shape)])
            )
        for port, key in zip(graph.outputs, outputs, strict=True):
            port.get_tensor().set_names({key})
        graph.validate_nodes_and_infer_types()
        if name == "language":
            make_stateful(graph)
        ov.save_model(graph, out / f"openvino_{name}_model.xml", compress_to_fp16=False)
    return out


def make_stateful(graph) -> None:
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = op.parameter([-1], np.int32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    past = [port for port in graph.inputs if port.get_any_name().startswith("past_key_values")]
    for port in past:
        readers = port.get_target_inputs()
        reordered = op.gather(port.get_node(), beam, op.constant(np.array(0)))
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    graph.add_parameters([beam])
    graph.validate_nodes_and_infer_types()
    names = [port.get_any_name() for port in past]
    empty = np.zeros([0 if n.is_dynamic else n.get_length() for n in past[0].get_partial_shape()], np.float32)
    apply_make_stateful_transformation(graph, {name: name.replace("past_key_values", "present", 1) for name in names})
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":  # what it holds after a reset
            node.set_arguments([op.constant(empty)])
    graph.validate_nodes_and_infer_types()
