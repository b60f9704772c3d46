"""`mini-vlm` before training: the library's own classes and real files, with random weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mmrecipes.data import families, scenes
from mmrecipes.data.families import FAMILIES
from mmrecipes.data.scenes import ALPHABET, COLOURS, SHAPES, SIZES
from mmrecipes.errors import UserError
from mmrecipes.mini.clevr import sort_of_clevr
from mmrecipes.models.loading import as_dtype, data_dir
from mmrecipes.models.preflight import check_memory

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
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL + tiles, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_text(3000), trainer)
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[5]}
    special["additional_special_tokens"] = SPECIAL[2:5] + tiles
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=4096, **special)


def _text(n: int) -> Iterable[str]:
    words = " ".join((*COLOURS, *SHAPES, *SIZES, "yes no", *ALPHABET, *"0123456789"))
    for seed in range(n):
        scene = scenes.make_scene(seed)
        asked = (families.ask(scene, family, seed) for family in FAMILIES)
        yield from (f"User:{q.text}\nAssistant: {q.answer}" for q in asked if q)
        yield f"{families.caption(scene, full=True)} {words}"
        yield "\n".join(q.text for q in sort_of_clevr(seed)[1])


def make_processor(tokenizer=None, side: int = IMAGE_SIZE):  # -> transformers.Idefics3Processor
    """The real Idefics3 processor for images of `side` px, 64 tokens each; larger ones are split when `size` is raised."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    tile, tokenizer = {"longest_edge": side}, tokenizer or make_tokenizer()
    images = Idefics3ImageProcessorPil(size=tile, max_image_size=tile, do_image_splitting=True)
    return Idefics3Processor(images, tokenizer, image_seq_len=VISUAL_TOKENS, chat_template=CHAT_TEMPLATE)


def _config(tokenizer, vision: dict, text: dict, scale_factor: int, tied: bool):  # -> transformers.Idefics3Config
    from transformers import Idefics3Config

    shared = {"tie_word_embeddings": tied}
    image, text = tokenizer.convert_tokens_to_ids("<image>"), {"model_type": "llama"} | shared | text | _special_ids(tokenizer)
    return Idefics3Config(image_token_id=image, scale_factor=scale_factor, vision_config=vision, text_config=text, **shared)


def _special_ids(tokenizer) -> dict[str, int]:
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}


def make_model(tokenizer, width: int = 256, vision_layers: int = 4, language_layers: int = 4, seed: int = 0):
    """A `mini-vlm` with random weights, float32, in training mode."""
    from transformers import Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    heads = {"hidden_size": width, "num_attention_heads": width // 64}
    vision = {"intermediate_size": 4 * width, "num_hidden_layers": vision_layers, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    text = {"intermediate_size": 2 * width, "num_hidden_layers": language_layers, "num_key_value_heads": width // 128}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    model = Idefics3ForConditionalGeneration(_config(tokenizer, heads | vision, heads | text, SHUFFLE, tied=True))
    with torch.no_grad():  # positions that attention can use from the first step (Beyer et al. 2022, arXiv:2205.01580)
        model.model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(GRID, width))
    model.generation_config.update(do_sample=False, max_new_tokens=16, **_special_ids(tokenizer))
    return model.train()


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine and cosine position vectors, (side * side, width), in row-major order, each entry in [-0.5, 0.5]."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1) / 2  # (side, width / 2)
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], 1)


# name -> parameters; the language model's width, intermediate size, layers, heads, key-value heads. Both have one vision encoder
REAL_SIZES = {"smolvlm-256m": (256_484_928, (576, 1536, 30, 9, 3)), "smolvlm2-500m": (507_482_304, (960, 2560, 32, 15, 5))}
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def real_size(name: str = "smolvlm-256m", dtype: torch.dtype | str = torch.float32, seed: int = 0):  # -> PreTrainedModel
    """A model of SmolVLM's published dimensions (arXiv:2504.05299) and random weights, `.processor` attached; `name` is one of
    REAL_SIZES. For speed and memory only. One image is one tile of 512 px, 64 tokens. UserError for other names or too little
    memory.
    """
    from transformers import AutoTokenizer, Idefics3ForConditionalGeneration
    from transformers.initialization import no_init_weights

    dtype = torch.float32 if as_dtype(dtype) == "auto" else as_dtype(dtype)
    if name not in REAL_SIZES:
        raise UserError(f"no real-size model {name!r}: there are {', '.join(REAL_SIZES)}")
    parameters, own = REAL_SIZES[name]
    check_memory(name, parameters * dtype.itemsize, dtype, torch.device("cpu"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(data_dir() / "models" / "mini-vlm")
    except (UserError, OSError, ValueError):  # not trained yet: the same one, made again in a few seconds
        tokenizer = make_tokenizer()
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 512, "patch_size": 16}
    text = dict(zip(TEXT_SIZES, own, strict=True)) | {"vocab_size": 49280, "max_position_embeddings": 8192}
    text |= {"rms_norm_eps": 1e-5, "rope_theta": 100_000.0}
    config = _config(tokenizer, vision, text, scale_factor=4, tied=False)
    with no_init_weights():  # the library's own takes ten times as long as this one
        model = Idefics3ForConditionalGeneration._from_config(config, dtype=dtype)
    noise = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(0 if key.endswith("bias") else 1)
        else:
            p.data.normal_(std=0.02, generator=noise)
    model.processor = make_processor(tokenizer, 512)
    return model.eval()
