"""A checkpoint of Qwen2.5-VL-3B's dimensions with random weights, in bf16 (7.5 GB), and its real processor: for bench.py.

The tokenizer is `mini-vlm`'s with Qwen's special tokens, of ids within Qwen's vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bench_row import ROOT

sys.path.insert(0, str(ROOT))  # tests/ writes the families' directories
TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "tie_word_embeddings": True}
TEXT |= {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
VISION = {"hidden_size": 1280, "out_hidden_size": 2048, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
VISION |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}


def write(out: Path) -> None:
    """The directory `out` in the hub's format, weights in one file."""
    import transformers

    from tests import families, family_files

    family = families._qwen2_5_vl()
    family.config["vision_config"] = VISION
    family.config["text_config"] |= TEXT
    family.config["tie_word_embeddings"] = True
    family.images |= {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    tokenizer = family_files.make_tokenizer(family)
    config = family_files.with_ids(family.config, tokenizer)
    kind = transformers.CONFIG_MAPPING[config.pop("model_type")]
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(kind(**config), dtype=torch.bfloat16)
    model.tie_weights()
    noise = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(0 if key.endswith("bias") else 1)
        else:
            p.data.normal_(std=0.02, generator=noise)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(out)
    family_files._write_json(out / "preprocessor_config.json", family.images | {"processor_class": family.processor})
    (out / "chat_template.jinja").write_text(family.template)
    model.save_pretrained(out, max_shard_size="100GB")
