"""llama.cpp's files of an Idefics3 or Qwen2.5-VL checkpoint: the language model, and the vision encoder with its connector (its
"mmproj").

Runs in .venv-peers (`make peers`), without PyTorch. Layout and metadata are those of llama.cpp's own converter; the language
model is then quantized by llama.cpp itself, so that the mix of types is what its users get.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

QWEN = "qwen2_5_vl"  # its model_type
F16, F32, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F16", "F32", "Q8_0"))


def write(checkpoint: Path, folder: Path, how: str) -> str:
    """model.gguf, quantized as `how` says (q8_0, q4_0, q4_k_m), and vision.gguf in `folder`. Returns the `types` of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, small = folder / "whole.gguf", folder / "model.gguf"
    write_vision(checkpoint, folder / "vision.gguf")
    write_language(checkpoint, whole)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{how.upper()}")
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), ctypes.byref(options))
    whole.unlink()
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize to {how}: {failed}")
    return types(small)


def types(path: Path) -> str:
    """Such as "150 Q5_0, 60 Q4_K": the types of the matrices in a GGUF file, most frequent first."""
    counts = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def write_language(checkpoint: Path, path: Path) -> None:
    """The decoder, matrices in fp16."""
    whole = json.loads((checkpoint / "config.json").read_text())
    config, qwen = whole["text_config"], whole["model_type"] == QWEN
    heads, kv_heads, layers = config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "qwen2vl" if qwen else "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    if qwen:
        writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, checkpoint, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL if qwen else gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in tensors(checkpoint):
        if part(name) != "language":
            continue
        if not qwen and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = neighbours(weight, heads if name.endswith("q_proj.weight") else kv_heads)
        _add(writer, names, name.replace("text_model.", "").replace("language_model.", ""), weight, F16)
    _finish(writer)


def part(name: str) -> str:
    """The file that a tensor of the checkpoint goes to.
    >>> part("model.connector.modality_projection.proj.weight"), part("lm_head.weight")
    ('vision', 'language')
    """
    return "vision" if any(mark in name for mark in ("vision_model", "connector", "visual.")) else "language"


def write_vision(checkpoint: Path, path: Path, kind: gguf.GGMLQuantizationType = Q8_0) -> None:
    """The vision encoder and the connector, matrices of `kind`; embeddings stay in fp32, as llama.cpp's converter leaves them."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision, qwen = config["vision_config"], config["model_type"] == QWEN
    layers = vision["depth" if qwen else "num_hidden_layers"]
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if qwen:
        images = json.loads((checkpoint / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(560 if qwen else vision["image_size"])  # Qwen's encoder has no size; its converter says 560
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision["num_heads" if qwen else "num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(1e-6 if qwen else vision["layer_norm_eps"])
    if qwen:
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)  # one layer in so many sees the whole image
    else:
        writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
        writer.add_vision_preproc_image_size(vision["image_size"])
        writer.add_vision_projector_scale_factor(config["scale_factor"])
        writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for name, weight in tensors(checkpoint):
        if part(name) == "vision":
            for its_name, piece in vision_pieces(name, weight):
                _add(writer, names, its_name, piece, F32 if ".embeddings." in name or "patch_embed" in name else kind)
    _finish(writer)


def vision_pieces(name: str, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor of the vision encoder as llama.cpp has it: queries, keys and values apart; and the convolution over two frames
    (D, 3, 2, P, P) as one for each. Its names are those of the hub's files."""
    name = name.removeprefix("model.") if "visual." in name else name
    if ".qkv." in name:
        yield from ((name.replace("qkv", one), piece) for one, piece in zip("qkv", np.split(weight, 3), strict=True))
    elif "patch_embed.proj" in name:
        ending = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_EMBD_PATCH] + ".weight"
        yield from ((ending + more, weight[:, :, frame]) for frame, more in ((0, ""), (1, ".1")))
    else:
        yield name, weight


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and weights, as float32, of a bfloat16 model.safetensors: NumPy has no bfloat16, the upper half of a float32."""
    with open(checkpoint / "model.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}; expected BF16")
            first, end = entry["data_offsets"]
            file.seek(8 + length + first)
            upper = np.frombuffer(file.read(end - first), np.uint16).astype(np.uint32)
            yield name, (upper << 16).view(np.float32).reshape(entry["shape"])


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection (heads * D, ...) in llama.cpp's order: its rotary embedding turns entries 2i and 2i + 1
    of a head together, where transformers turns i and i + D / 2."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict) -> None:
    """The byte-level BPE, filled up to the width of the head with unused tokens. mtmd looks up a token for a blank line."""
    saved = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in saved["added_tokens"]}
    tokens = [f"[unused {i}]" for i in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, i in saved["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for token, i in special.items():
        tokens[i], kinds[i] = token, gguf.TokenType.CONTROL
    blank_line = "\u010a\u010a"  # two line feeds, as byte-level BPE writes them
    if blank_line not in tokens:
        tokens[-1], kinds[-1] = blank_line, gguf.TokenType.NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        if (number := config.get(f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)


def _add(writer: gguf.GGUFWriter, names: gguf.TensorNameMap, name: str, weight: np.ndarray, kind) -> None:
    """One tensor by llama.cpp's name for it, vectors always in fp32. ValueError for one that llama.cpp does not know."""
    its_name = name if name.startswith("v.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
    if its_name is None:
        raise ValueError(f"llama.cpp knows no tensor {name}")
    kind = kind if weight.ndim > 1 else F32
    if kind == Q8_0 and weight.shape[-1] % 32:  # no whole blocks: as llama.cpp's own converter does
        kind = F16
    writer.add_tensor(its_name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
