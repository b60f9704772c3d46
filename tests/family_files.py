"""Writes a model family's directory as the hub has it: config, weights, tokenizer, image processor and chat template."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from tests import tiny

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}IMAGE"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
) + CHATML.removeprefix("{% for message in messages %}").replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
QWEN3 = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS2 = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MISTRAL = (  # BOS is in the template, and the tokenizer adds one, too
    "START{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}IMAGE"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEXT_ONLY = (  # the processor itself places the image
    "{% for message in messages %}{% for item in message['content'] %}{% if item['type'] == 'text' %}"
    "{{ item['text'] }}{% endif %}{% endfor %}{% if not loop.last %} {% endif %}{% endfor %}"
)
PALIGEMMA = (  # the published ones have none
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
) + TEXT_ONLY


@dataclasses.dataclass
class Family:
    """What a directory is written from. `config` and the rest may hold tokens as `Token("<image>")`: the id is put there."""

    config: dict
    processor: str  # the class that the files name
    images: dict  # preprocessor_config.json
    settings: dict = dataclasses.field(default_factory=dict)  # processor_config.json
    tokens: dict = dataclasses.field(default_factory=dict)  # of the tokenizer: bos_token, eos_token, image_token, ...
    more_tokens: tuple = ()
    template: str | None = None
    adds_bos: bool = False
    stop: tuple = ()  # tokens besides the tokenizer's own that end an answer
    auto: str = "AutoModelForImageTextToText"


class Token(str):
    """Stands for its id."""


def write(family: Family, out: Path) -> Path:
    """Write the directory `out` of a family with seeded random weights."""
    import transformers

    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(out)
    config = with_ids(family.config, tokenizer)
    kind = transformers.CONFIG_MAPPING[config.pop("model_type")]
    torch.manual_seed(0)
    auto = getattr(transformers, family.auto)
    model = auto.from_config(kind(**config)).eval()
    spread(model)
    if family.auto == "AutoModelForImageTextToText":
        stops = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, *family.stop])
        model.generation_config.update(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
        model.generation_config.update(eos_token_id=stops if len(stops) > 1 else stops[0])
    model.save_pretrained(out)
    _write_json(out / "preprocessor_config.json", family.images | {"processor_class": family.processor})
    if family.settings:
        _write_json(out / "processor_config.json", family.settings | {"processor_class": family.processor})
    if family.template:
        (out / "chat_template.jinja").write_text(family.template)
    return out


def make_tokenizer(family: Family):  # -> transformers.PreTrainedTokenizerFast
    """The house tokenizer with the family's special tokens, and with BOS where the family's adds one."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny.processor().tokenizer.backend_tokenizer.to_str())
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"} | family.tokens
    spoken = [t for t in family.more_tokens if t.startswith(("<loc", "<seg"))]  # PaliGemma's answers hold them: not special
    backend.add_special_tokens(sorted({t for t in [*tokens.values(), *family.more_tokens] if t} - set(spoken)))
    backend.add_tokens(spoken)
    dual = family.auto == "AutoModel"  # CLIP is read at its EOS, and pads, as SigLIP does, on the right
    if family.adds_bos and dual:
        ends = [tokens["bos_token"], tokens["eos_token"]]
        ids = [(token, backend.token_to_id(token)) for token in ends]
        backend.post_processor = processors.TemplateProcessing(f"{ends[0]} $A {ends[1]}", special_tokens=ids)
    elif family.adds_bos:
        bos = tokens["bos_token"]
        pair = f"{bos}:0 $A:0 {bos}:1 $B:1"
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos}:0 $A:0", pair, ids)
    own = {k: v for k, v in tokens.items() if k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    named = {k: v for k, v in tokens.items() if k not in own}
    own |= {"extra_special_tokens": named} if named else {}
    own |= {"padding_side": "right" if dual else "left", "model_max_length": 2048}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own)


def with_ids(tree, tokenizer):
    """`tree` with each `Token` in it replaced by its id, and the vocabulary's size where it says "VOCABULARY"."""
    if isinstance(tree, dict):
        return {k: with_ids(v, tokenizer) for k, v in tree.items()}
    if isinstance(tree, Token):
        return tokenizer.get_vocab()[str(tree)]
    return len(tokenizer) if tree == "VOCABULARY" else tree


@torch.no_grad()
def spread(model) -> None:
    """Random weights large enough that answers depend on the images and hardly repeat one token; biases that are not zero."""
    noise = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        if p.ndim >= 2:
            std = 0.6 if "embed" in key or "position" in key else 1.2 / p[0].numel() ** 0.5
            if "embed_tokens" in key:  # small: where they are also the head, each token would repeat itself; Gemma scales them
                std = 0.15 / getattr(model.get_submodule(key.removesuffix(".weight")), "scalar_embed_scale", 1)
            p.normal_(std=std, generator=noise)
        elif key.endswith("bias"):
            p.normal_(std=0.1, generator=noise)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
