"""Tiny random models of many architectures, of one or two layers, for tests of logic. Nothing here is trained."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from mmrecipes.mini.model import CHAT_TEMPLATE, make_model, make_processor

IMAGE_TOKEN = "<image>"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


@functools.cache
def processor():
    """The house processor; its tokenizer serves all the models here. Seconds to make, so made once. Do not change it."""
    return make_processor()


def text_config(**more) -> dict:
    """A decoder of one layer, width 32, for the house tokenizer."""
    tokenizer = processor().tokenizer
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    return config | {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("pad", "bos", "eos")} | more


def _image_id() -> int:
    return processor().tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def house(seed: int = 0, width: int = 128, layers: int = 1):
    """A `mini-vlm` of one layer a tower, untrained, with its real processor: 128 px pictures, answers in (random) text."""
    model = make_model(processor().tokenizer, width, layers, layers, seed=seed).eval()
    model.processor = processor()
    return model


def idefics3():
    return house()


def idefics2():
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    resampler = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    resampler |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    text = text_config(model_type="mistral")
    config = Idefics2Config(image_token_id=_image_id(), vision_config=VISION, text_config=text, perceiver_config=resampler)
    return _seeded(Idefics2ForConditionalGeneration, config)


def llava(layers: int = 1):
    """LLaVA with its real processor (CLIP pictures of 32 px, 16 visual tokens): the foreign model that can chat."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config = LlavaConfig(
        image_token_index=_image_id(),
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config=text_config(model_type="llama", num_hidden_layers=layers),
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = _seeded(LlavaForConditionalGeneration, config)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.processor = LlavaProcessor(
        images,
        processor().tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = QWEN_VISION | {"depth": 1, "spatial_merge_size": 2, "fullatt_block_indexes": [0], "window_size": 32}
    text = text_config(rope_parameters=MROPE)
    config = Qwen2_5_VLConfig(image_token_id=_image_id(), vision_config=vision, text_config=text)
    return _seeded(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = QWEN_VISION | {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = text_config(head_dim=16, rope_parameters=MROPE)
    config = Qwen3VLConfig(image_token_id=_image_id(), vision_config=vision, text_config=text)
    return _seeded(Qwen3VLForConditionalGeneration, config)


def minicpm():
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    text = text_config(model_type="qwen3_5_text", head_dim=16, layer_types=["full_attention"])
    vision = VISION | {"num_hidden_layers": 2}
    config = MiniCPMV4_6Config(
        image_token_id=_image_id(), insert_layer_id=0, image_size=32, vision_config=vision, text_config=text
    )
    return _seeded(MiniCPMV4_6ForConditionalGeneration, config)


def blip2():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "vocab_size": len(processor().tokenizer), "ffn_dim": 64, "word_embed_proj_dim": 32} | small
    parts = {"vision_config": VISION, "qformer_config": small | {"encoder_hidden_size": 32}, "text_config": text}
    config = Blip2Config(image_token_index=_image_id(), **parts)
    return _seeded(Blip2ForConditionalGeneration, config)


def _tower(**more) -> dict:  # a text tower of a dual encoder
    config = text_config(**more)
    return {k: v for k, v in config.items() if k != "num_key_value_heads"} | {"max_position_embeddings": 64}


def siglip():
    """SigLIP with its real processor: pictures of 32 px and the house tokenizer."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

    model = _seeded(SiglipModel, SiglipConfig(vision_config=VISION, text_config=_tower(projection_size=32)))
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    model.processor = SiglipProcessor(images, processor().tokenizer)
    return model


def siglip_128(seed: int = 0):
    """A `mini-siglip` of one layer a tower, untrained, with its real processor."""
    from mmrecipes.mini import siglip as mini_siglip

    made = mini_siglip.make_processor()
    model = mini_siglip.make_siglip(len(made.tokenizer), 64, 1, 1, seed=seed).eval()
    model.processor = made
    return model


def clip_128(layers: int = 1):
    """CLIP for scenes: pictures of 32 px, the house tokenizer, padded and masked as CLIP does."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    model, images = clip(layers), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = make_processor().tokenizer
    tokenizer.model_max_length, tokenizer.padding_side = 64, "right"
    model.processor = CLIPProcessor(images, tokenizer)
    return model


def clip(layers: int = 1):
    from transformers import CLIPConfig, CLIPModel

    deep = {"num_hidden_layers": layers}
    return _seeded(CLIPModel, CLIPConfig(projection_dim=16, vision_config=VISION | deep, text_config=_tower() | deep))


def llama():
    """A text-only model: not multimodal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(LlamaForCausalLM, LlamaConfig(**text_config()))


def bert():
    """An encoder of text: not multimodal."""
    from transformers import BertConfig, BertModel

    return _seeded(BertModel, BertConfig(**_tower()))


def _seeded(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def save(model, out: Path) -> Path:
    """Write `model`, and its processor if it has one, in the hub's format, as the library itself does."""
    model.save_pretrained(out)
    if hasattr(model, "processor"):
        model.processor.save_pretrained(out)
    return out


def weight_and_hessian(seed: int, outputs: int = 12, inputs: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (outputs, inputs), and the Hessian of inputs that differ in size and correlate, as real ones do."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=g)
    x = torch.randn(400, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    x = x * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=g)]
    return w, x.T @ x / len(x)
