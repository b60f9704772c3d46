"""The house model before training: the library's own classes and real files, with random weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmrecipes import scenes
from mmrecipes.scenes import ALPHABET, COLOURS, FAMILIES, SHAPES, SIZES

IMAGE_SIZE, PATCH, SHUFFLE = 128, 16, 1
GRID = IMAGE_SIZE // PATCH  # patches a side
VISUAL_TOKENS = (GRID // SHUFFLE) ** 2
SPECIAL = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", "<pad>"]
CHAT_TEMPLATE = (  # SmolVLM's
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make_tokenizer():  # -> transformers.PreTrainedTokenizerFast
    """A byte-level BPE trained on the world's text. Capitals and digits of printed codes stay single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    code = pre_tokenizers.Split(Regex("[A-Z0-9](?![a-z])"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([code, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL + tiles,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(3000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[5],
        additional_special_tokens=SPECIAL[2:5] + tiles,
        padding_side="left",
        model_max_length=4096,
    )


def _text(n: int) -> Iterable[str]:
    words = " ".join((*COLOURS, *SHAPES, *SIZES, "yes no", *ALPHABET, *"0123456789"))
    for seed in range(n):
        scene = scenes.make_scene(seed)
        asked = (scenes.ask(scene, family, seed) for family in FAMILIES)
        yield from (f"User:{q.text}\nAssistant: {q.answer}" for q in asked if q)
        yield f"{scenes.caption(scene, full=True)} {words}"
        yield "\n".join(q.text for q in scenes.sort_of_clevr(seed)[1])


def make_processor():  # -> transformers.Idefics3Processor
    """The real Idefics3 processor for 128 px pictures; larger ones are split when `size` is raised."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=True
    )
    return Idefics3Processor(images, make_tokenizer(), image_seq_len=VISUAL_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer, width: int = 256, vision_layers: int = 4, language_layers: int = 4, seed: int = 0):
    """A `mini-vlm` with random weights, float32, in training mode."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": width // 64,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": language_layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 128,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():  # positions that attention can use from the first step (Beyer et al. 2022, arXiv:2205.01580)
        model.model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(GRID, width))
    model.generation_config.update(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.train()


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine and cosine position vectors, (side * side, width), in row-major order, each entry in [-0.5, 0.5]."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1) / 2  # (side, width / 2)
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], 1)
