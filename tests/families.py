"""Tiny random models of each family of vision-language models, in the hub's format, with the family's real processor.

`FAMILIES[name]()` is the model as `mmrecipes.models.load` gives it; `family_dir(name)` is its directory. Nothing is trained.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests import family_files as files
from tests.family_files import Family, Token

CLIP_IMAGES = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
USUAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
CHATML_TOKENS = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
QWEN_IDS = {"image_token_id": Token("<|image_pad|>"), "video_token_id": Token("<|video_pad|>")}
QWEN_IDS |= {"vision_start_token_id": Token("<|vision_start|>"), "vision_end_token_id": Token("<|vision_end|>")}
QWEN_IMAGES = CLIP_IMAGES | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2}
QWEN_IMAGES |= {"temporal_patch_size": 2, "min_pixels": 1024, "max_pixels": 6144}  # 4 to 24 visual tokens
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}


def text(model_type: str, tokens: dict, **more) -> dict:
    """A decoder of two layers, width 64, with four heads of which two share keys."""
    config = {"model_type": model_type, "vocab_size": "VOCABULARY", "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ids = {f"{kind}_token_id": Token(tokens[f"{kind}_token"]) for kind in ("bos", "eos", "pad") if tokens[f"{kind}_token"]}
    return config | ids | {"bos_token_id": ids.get("bos_token_id")} | more


HOUSE_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"}


def _idefics3(model_type="idefics3", name="Idefics3") -> Family:
    from mmrecipes.mini.model import CHAT_TEMPLATE

    config = {"model_type": model_type, "image_token_id": Token("<image>"), "scale_factor": 2, "tie_word_embeddings": False}
    config |= {"vision_config": VISION, "text_config": text("llama", HOUSE_TOKENS, tie_word_embeddings=False)}
    images = USUAL | HALF | {"image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True, "do_pad": True}
    images |= {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "resample": 1}
    return Family(config, f"{name}Processor", images, {"image_seq_len": 4}, HOUSE_TOKENS, (), CHAT_TEMPLATE)


def _smolvlm() -> Family:
    family = _idefics3("smolvlm", "SmolVLM")
    family.images |= {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 32}}}
    return family


def _idefics2() -> Family:
    resampler = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4}
    resampler |= {"resampler_head_dim": 16, "num_key_value_heads": 2}
    tokens = LLAMA_TOKENS | {"eos_token": "</s>"}
    config = {"model_type": "idefics2", "image_token_id": Token("<image>"), "perceiver_config": resampler}
    config |= {"vision_config": VISION | {"image_size": 64}, "text_config": text("mistral", tokens, sliding_window=None)}
    images = USUAL | HALF | {"image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": True, "do_pad": True}
    images |= {"size": {"longest_edge": 64, "shortest_edge": 32}}
    return Family(
        config, "Idefics2Processor", images, {"image_seq_len": 4}, tokens, (), files.IDEFICS2, True, ("<end_of_utterance>",)
    )


CLIP_VISION = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 3, "projection_dim": 32}
CLIP_PROCESSOR = USUAL | CLIP_IMAGES | {"do_center_crop": True, "size": {"shortest_edge": 32}}
CLIP_PROCESSOR |= {"crop_size": {"height": 32, "width": 32}}
LLAVA_SETTINGS = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
LLAVA_SETTINGS |= {"image_token": "<image>"}


def _llava() -> Family:
    config = {"model_type": "llava", "image_token_index": Token("<image>"), "vision_config": CLIP_VISION}
    config |= {"text_config": text("llama", LLAMA_TOKENS), "image_seq_length": 16}
    images = CLIP_PROCESSOR | {"image_processor_type": "CLIPImageProcessor"}
    return Family(config, "LlavaProcessor", images, LLAVA_SETTINGS, LLAMA_TOKENS, (), files.LLAVA, True)


def _llava_next() -> Family:
    shapes = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = {"model_type": "llava_next", "image_token_index": Token("<image>"), "vision_config": CLIP_VISION}
    config |= {"text_config": text("mistral", LLAMA_TOKENS, sliding_window=None), "image_seq_length": 16}
    config |= {"image_grid_pinpoints": shapes}
    images = CLIP_PROCESSOR | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": shapes}
    template = files.MISTRAL.replace("START", "").replace("[INST]", "[INST] ").replace("[/INST]", " [/INST]")
    template = template.replace("IMAGE", "<image>\n")
    return Family(config, "LlavaNextProcessor", images, LLAVA_SETTINGS, LLAMA_TOKENS, (), template, True)


def _llava_onevision() -> Family:
    shapes = [[32 * h, 32 * w] for h in range(1, 5) for w in range(1, 5)]
    vision = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
    config = {"model_type": "llava_onevision", "image_token_index": Token("<image>"), "video_token_index": Token("<video>")}
    config |= {"vision_config": vision, "text_config": text("qwen2", CHATML_TOKENS), "image_grid_pinpoints": shapes}
    images = USUAL | HALF | {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": shapes}
    images |= {"size": {"height": 32, "width": 32}, "do_pad": True}
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    more = ("<|im_start|>", "<video>")
    return Family(config, "LlavaOnevisionProcessor", images, settings, CHATML_TOKENS, more, files.ONEVISION)


def _qwen2_vl() -> Family:
    vision = {"embed_dim": 64, "hidden_size": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    decoder = text("qwen2_vl_text", CHATML_TOKENS, rope_parameters=MROPE)
    config = {"model_type": "qwen2_vl", **QWEN_IDS, "vision_config": vision, "text_config": decoder}
    return Family(config, "Qwen2VLProcessor", QWEN_IMAGES, {}, CHATML_TOKENS, QWEN_TOKENS, files.QWEN, stop=("<|endoftext|>",))


def _qwen2_5_vl() -> Family:
    vision = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "depth": 3, "num_heads": 4, "patch_size": 8}
    vision |= {"fullatt_block_indexes": [1], "window_size": 32}  # windows of two merged patches a side
    decoder = text("qwen2_5_vl_text", CHATML_TOKENS, rope_parameters=MROPE)
    config = {"model_type": "qwen2_5_vl", **QWEN_IDS, "vision_config": vision, "text_config": decoder}
    return Family(config, "Qwen2_5_VLProcessor", QWEN_IMAGES, {}, CHATML_TOKENS, QWEN_TOKENS, files.QWEN, stop=("<|endoftext|>",))


def _qwen3_vl() -> Family:
    vision = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "depth": 3, "num_heads": 4, "patch_size": 8}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    rope = MROPE | {"mrope_interleaved": True}
    decoder = text("qwen3_vl_text", CHATML_TOKENS, head_dim=16, num_hidden_layers=3, rope_parameters=rope)
    config = {"model_type": "qwen3_vl", **QWEN_IDS, "vision_config": vision, "text_config": decoder}
    images = QWEN_IMAGES | HALF | {"size": {"shortest_edge": 1024, "longest_edge": 6144}}
    images = {k: v for k, v in images.items() if k not in ("min_pixels", "max_pixels")}
    return Family(config, "Qwen3VLProcessor", images, {}, CHATML_TOKENS, QWEN_TOKENS, files.QWEN3, stop=("<|endoftext|>",))


def _qwen3_5() -> Family:
    family = _qwen3_vl()
    vision = {k: v for k, v in family.config["vision_config"].items() if k != "deepstack_visual_indexes"}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e6}
    rope |= {"partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    decoder = text("qwen3_5_text", CHATML_TOKENS, head_dim=16, num_hidden_layers=3, layer_types=kinds, rope_parameters=rope)
    family.config |= {"model_type": "qwen3_5", "vision_config": vision, "text_config": decoder | linear}
    return family


def _internvl() -> Family:
    vision = VISION | {"image_size": [64, 64], "patch_size": [16, 16], "use_mean_pooling": True}
    config = {"model_type": "internvl", "image_token_id": Token("<IMG_CONTEXT>"), "image_seq_length": 4, "vision_config": vision}
    config |= {"text_config": text("qwen2", CHATML_TOKENS), "downsample_ratio": 0.5}
    images = USUAL | CLIP_IMAGES | {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 64, "width": 64}}
    images |= {"crop_to_patches": False, "min_patches": 1, "max_patches": 6}  # the processor splits, whatever this says
    tokens = CHATML_TOKENS | {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokens |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    template = files.CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return Family(config, "InternVLProcessor", images, {"image_seq_length": 4}, tokens, ("<|im_start|>",), template)


def _gemma3() -> Family:
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    decoder = text("gemma3_text", tokens, head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=3)
    decoder |= {"layer_types": kinds, "sliding_window": 16}
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 64, "vision_use_head": False}
    config = {"model_type": "gemma3", "mm_tokens_per_image": 16, "vision_config": vision, "text_config": decoder}
    config |= {"boi_token_index": Token("<start_of_image>"), "eoi_token_index": Token("<end_of_image>")}
    config |= {"image_token_index": Token("<image_soft_token>")}
    images = USUAL | HALF | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 64, "width": 64}}
    images |= {"image_seq_length": 16, "do_pan_and_scan": None}
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    more = ("<start_of_turn>", "<end_of_turn>")
    settings = {"image_seq_length": 16}
    return Family(config, "Gemma3Processor", images, settings, tokens | named, more, files.GEMMA, True, ("<end_of_turn>",))


def _paligemma() -> Family:
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    vision = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False, "projection_dim": 64}
    config = {"model_type": "paligemma", "image_token_index": Token("<image>"), "projection_dim": 64, "hidden_size": 64}
    config |= {"vision_config": vision, "text_config": text("gemma", tokens, head_dim=16)}
    images = USUAL | HALF | {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    images |= {"image_seq_length": 16}
    more = tuple([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])
    return Family(config, "PaliGemmaProcessor", images, {}, tokens, more, files.PALIGEMMA)


def _pixtral_vision() -> dict:
    return {"model_type": "pixtral", **VISION, "image_size": 64, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4}}


PIXTRAL_IMAGES = USUAL | CLIP_IMAGES | {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 64}}
PIXTRAL_SETTINGS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
PIXTRAL_TOKENS = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL_TEMPLATE = files.MISTRAL.replace("START", "{{ bos_token }}").replace("IMAGE", "[IMG]")


def _pixtral() -> Family:
    config = {"model_type": "llava", "image_token_index": Token("[IMG]"), "vision_config": _pixtral_vision()}
    config |= {"text_config": text("mistral", LLAMA_TOKENS, head_dim=16, sliding_window=None)}
    config |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": 1}
    images = PIXTRAL_IMAGES | {"patch_size": {"height": 8, "width": 8}}
    settings = PIXTRAL_SETTINGS | {"patch_size": 8}
    return Family(config, "PixtralProcessor", images, settings, LLAMA_TOKENS, PIXTRAL_TOKENS, PIXTRAL_TEMPLATE, True)


def _mistral3() -> Family:
    config = {"model_type": "mistral3", "image_token_index": Token("[IMG]"), "vision_config": _pixtral_vision()}
    config |= {"text_config": text("mistral", LLAMA_TOKENS, head_dim=16, sliding_window=None), "spatial_merge_size": 2}
    images = PIXTRAL_IMAGES | {"patch_size": 8}
    settings = PIXTRAL_SETTINGS | {"patch_size": 8, "spatial_merge_size": 2}
    return Family(config, "PixtralProcessor", images, settings, LLAMA_TOKENS, PIXTRAL_TOKENS, PIXTRAL_TEMPLATE, True)


def _minicpmv4_6() -> Family:
    linear = _qwen3_5().config["text_config"]
    vision = VISION | {"image_size": 64, "num_hidden_layers": 2}
    config = {"model_type": "minicpmv4_6", "image_token_id": Token("<|image_pad|>"), "video_token_id": Token("<|video_pad|>")}
    config |= {"vision_config": vision, "text_config": linear, "insert_layer_id": 0, "image_size": 64}
    images = USUAL | HALF | {"image_processor_type": "MiniCPMV4_6ImageProcessor", "max_slice_nums": 4, "scale_resolution": 64}
    images |= {"patch_size": 8, "slice_mode": True, "use_image_id": True, "downsample_mode": "16x"}
    tokens = CHATML_TOKENS | {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    for kind in ("image", "slice", "image_id"):
        tokens |= {f"{kind}_start_token": f"<{kind}>", f"{kind}_end_token": f"</{kind}>"}
    template = files.CHATML.replace("IMAGE", "<|image_pad|>\n")
    return Family(config, "MiniCPMV4_6Processor", images, {}, tokens, ("<|im_start|>",), template)


def _lfm2_vl() -> Family:
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    decoder = text("lfm2", tokens, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    decoder |= {"block_auto_adjust_ff_dim": False}
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"model_type": "siglip2_vision_model"}
    vision |= {"num_patches": 16, "vision_use_head": False}
    config = {"model_type": "lfm2_vl", "image_token_id": Token("<image>"), "projector_hidden_size": 128}
    config |= {"vision_config": vision, "text_config": decoder}
    images = USUAL | HALF | {"image_processor_type": "Lfm2VlImageProcessorFast", "encoder_patch_size": 8, "tile_size": 32}
    images |= {"min_image_tokens": 4, "max_image_tokens": 16, "min_tiles": 2, "max_tiles": 4, "do_image_splitting": True}
    more = ("<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    more += tuple(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5))
    template = "{{ bos_token }}" + files.CHATML.replace("IMAGE", "<image>")
    return Family(config, "Lfm2VlProcessor", images, {}, tokens, more, template, True)


def _blip2() -> Family:
    small = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")}
    decoder = text("opt", LLAMA_TOKENS, ffn_dim=128, word_embed_proj_dim=64)
    config = {"model_type": "blip-2", "vision_config": VISION, "qformer_config": small | {"encoder_hidden_size": 64}}
    config |= {"text_config": decoder, "num_query_tokens": 8, "image_token_index": Token("<image>")}
    images = USUAL | CLIP_IMAGES | {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
    return Family(config, "Blip2Processor", images, {"num_query_tokens": 8}, LLAMA_TOKENS, (), files.TEXT_ONLY, True)


def _florence2() -> Family:
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    vision |= {"patch_prenorm": [False, True], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4]}
    vision |= {"window_size": 4, "projection_dim": 64}
    half = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
    decoder = text("bart", LLAMA_TOKENS, d_model=64, decoder_start_token_id=Token("</s>"), forced_eos_token_id=None)
    for side in ("encoder", "decoder"):
        decoder |= {f"{side}_{k}": v for k, v in half.items()}
    decoder = {k: v for k, v in decoder.items() if k not in ("num_attention_heads", "num_key_value_heads", "hidden_size")}
    config = {"model_type": "florence2", "image_token_id": Token("<image>"), "vision_config": vision, "text_config": decoder}
    images = CLIP_PROCESSOR | {"image_processor_type": "CLIPImageProcessor", "image_seq_length": 17}
    tokens = LLAMA_TOKENS | {"image_token": "<image>"}
    return Family(config, "Florence2Processor", images, {}, tokens, (), files.TEXT_ONLY, True)


def _dual(model_type: str, name: str, images: dict) -> Family:
    encoder = {k: v for k, v in text(model_type, LLAMA_TOKENS).items() if k not in ("model_type", "num_key_value_heads")}
    vision = VISION
    if model_type == "siglip2":  # its processor pads all images to 256 patches of 16 px
        vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16, "patch_size": 16}
    config = {"model_type": model_type, "vision_config": vision, "text_config": encoder | {"max_position_embeddings": 64}}
    if model_type == "clip":
        config |= {"projection_dim": 32}
    else:
        config["text_config"] |= {"projection_size": 64}
    images = images | {"image_processor_type": f"{name}ImageProcessor"}
    tokens = LLAMA_TOKENS | {"unk_token": "<pad>"}  # SigLIP 2's tokenizer wants one
    return Family(config, f"{name}Processor", images, {}, tokens, (), adds_bos=model_type == "clip", auto="AutoModel")


def _clip() -> Family:
    return _dual("clip", "CLIP", CLIP_PROCESSOR)


def _siglip() -> Family:
    return _dual("siglip", "Siglip", USUAL | HALF | {"size": {"height": 32, "width": 32}})


def _siglip2() -> Family:
    return _dual("siglip2", "Siglip2", USUAL | HALF | {"patch_size": 16, "max_num_patches": 256})


@functools.cache
def family_dir(name: str) -> Path:
    """The directory of the family `name` in the hub's format. Written once a process; do not change it."""
    family = globals()[f"_{name}"]()
    return files.write(family, Path(tempfile.mkdtemp(prefix=f"{name}-")))


def load(name: str):
    """The family's model with its processor, as users load it."""
    from mmrecipes.models import load as load_model

    return load_model(family_dir(name))


CHATS = ("idefics3", "smolvlm", "idefics2", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CHATS += ("qwen3_5", "internvl", "gemma3", "paligemma", "pixtral", "mistral3")
CHATS += ("minicpmv4_6",)
DUALS = ("clip", "siglip", "siglip2")
REFUSED = ("lfm2_vl", "blip2", "florence2")  # the first for its image processor, which only torchvision has
FAMILIES = {name: functools.partial(load, name) for name in CHATS + DUALS + REFUSED}
