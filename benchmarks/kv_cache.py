"""A smaller KV cache on long chats with many images: `mini-vlm` with keys and values in few bits, and with fewer tokens.

CHATS chats of validation scenes, each of IMAGES turns with a new image and a question about it; earlier answers are right ones.
- "formats": every answer of every chat, whose cache is in the format all along. An answer is right where each of its tokens is
  the likeliest one. "kl" is the divergence of the next token from fp32's, mean over the tokens of answers.
- "evictions": the last question of every chat, from a cache of BUDGET tokens.
`python benchmarks/kv_cache.py` writes results/kv-cache.json after every chat and goes on from it; half an hour on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

from mmrecipes import data, evaluate, measure, models, prune, quantize
from mmrecipes.data import families, scenes

PATH = Path(__file__).resolve().parent.parent / "results" / "kv-cache.json"
CHATS, IMAGES, BUDGET, SINKS, LAST = 40, 6, 96, 4, 16
FORMATS = {
    "fp32": lambda config: transformers.DynamicCache(config=config.get_text_config()),
    "bf16": lambda config: quantize.quantized_cache(config, 16),
    "fp8, a scale a tensor": lambda config: transformers.QuantizedCache("fp8", config),
}
for _bits, _keys, _values in (
    *((bits, "channel", "token") for bits in (8, 4, 2)),
    *((4, "token", "token"), (2, "token", "token"), (2, "channel", "channel"), (2, "token", "channel")),
):
    _name = f"{_bits} bits, keys per {_keys}, values per {_values}"
    FORMATS[_name] = lambda config, how=(_bits, _keys, _values): quantize.quantized_cache(config, *how)


def chat(model, i: int) -> tuple[Tensor, Tensor, list[int]]:
    """Ids (T,) and embeddings (T, D) of a whole chat, and where its pieces end: image, question and answer of each turn."""
    messages, images, tokenizer = [], [], model.processor.tokenizer
    for k in range(IMAGES):
        scene = scenes.make_scene(data.SPLITS["validation"][1000 + i * IMAGES + k])
        start = (i + k) % len(families.FAMILIES)
        order = [*families.FAMILIES[start:], *families.FAMILIES[:start]]
        question = next(q for q in (families.ask(scene, family, scene.seed) for family in order) if q)
        messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        images.append(scenes.render(scene))
    inputs = model.processor(text=[model.processor.apply_chat_template(messages)], images=[images], return_tensors="pt")
    ids = inputs["input_ids"][0]
    is_image = ids == model.config.image_token_id
    x = model.get_input_embeddings()(ids)
    pixels = {name: value for name, value in inputs.items() if name.startswith("pixel")}
    x[is_image] = torch.cat([*model.get_image_features(**pixels).pooler_output]).view(-1, x.shape[-1])
    image_ends = ((is_image[:-1] & ~is_image[1:]).nonzero()[:, 0] + 2).tolist()
    turn_ends = (ids == tokenizer.eos_token_id).nonzero()[:, 0].tolist()  # a question's, an answer's, ...
    opening = len(tokenizer.encode("\nAssistant:", add_special_tokens=False))
    ends = zip(image_ends, turn_ends[::2], turn_ends[1::2], strict=True)
    return ids, x, [end for image, asked, answered in ends for end in (image, asked + 1 + opening, answered)]


def answers(model, found: tuple[Tensor, Tensor, list[int]], cache) -> tuple[list[bool], Tensor]:
    """Which turns are answered right, and the log-probabilities (tokens of answers, V)."""
    ids, x, ends = found
    right, logits, start, asked = [], [], 0, None
    for i, end in enumerate(ends):
        piece = model(inputs_embeds=x[None, start:end], past_key_values=cache, use_cache=True).logits[0]
        if i % 3 == 1:
            asked = piece[-1:]
        if i % 3 == 2:
            logits.append(torch.cat([asked, piece]))
            right.append(bool((logits[-1].argmax(-1) == ids[start : end + 1]).all()))
        start = end
    return right, torch.cat(logits).log_softmax(-1)


def policies(attention: list[Tensor], is_image: Tensor, newest_image: Tensor) -> dict[str, list[Tensor]]:
    """{policy: which positions (KV heads, kept) each layer keeps}. `attention` (query heads, T, T) of each layer."""
    heads, length = attention[0].shape[0] // 2, attention[0].shape[-1]  # two query heads share a key-value head
    grouped = [a.view(heads, 2, length, length).mean(1) for a in attention]
    heavy = [a.sum(1) for a in grouped]
    recent = [torch.nn.functional.max_pool1d(a[:, -LAST:].sum(1), 7, 1, 3) for a in grouped]  # neighbours stay together
    age = [torch.arange(length).float().expand(heads, -1)] * len(attention)
    sinks = torch.arange(length) < SINKS
    noise = [torch.rand(heads, length, generator=torch.Generator().manual_seed(k)) for k in range(len(attention))]

    def kept(scores: list[Tensor], newest: int, protected: Tensor | None = None) -> list[Tensor]:
        return [prune.kept_positions(s, BUDGET, newest, protected) for s in scores]

    found = {"everything": [torch.arange(length).expand(heads, -1)] * len(attention)}
    found |= {"sliding window": kept(age, 1), "window and sinks": kept(age, 1, sinks), "random": kept(noise, 1)}
    found |= {"H2O": kept(heavy, BUDGET // 2), "SnapKV": kept(recent, LAST)}
    found |= {"H2O, newest image protected": kept(heavy, 8, newest_image)}
    found |= {"SnapKV, newest image protected": kept(recent, 8, newest_image)}
    found |= {"window and sinks, newest image protected": kept(age, 1, sinks | newest_image)}
    return found


def evictions(model, eager, found: tuple[Tensor, Tensor, list[int]]) -> dict[str, dict]:
    """Of each policy: is the last question answered right, and how much of the newest image was kept (mean of layers, heads)?"""
    ids, x, ends = found
    asked, answered = ends[-2], ends[-1]
    before = ends[-4]  # the last turn is read by a cache that was made smaller after its image
    length = ends[-3]
    out = eager(inputs_embeds=x[None, :length], use_cache=True, output_attentions=True)
    is_image = ids[:length] == model.config.image_token_id
    newest_image = is_image & (torch.arange(length) >= before)
    rows = {}
    for name, kept in policies([a[0] for a in out.attentions], is_image, newest_image).items():
        cache = transformers.DynamicCache(config=model.config.text_config)
        for k, (layer, positions) in enumerate(zip(out.past_key_values.layers, kept, strict=True)):
            where = positions[None, :, :, None].expand(1, -1, -1, layer.keys.shape[-1])
            cache.update(layer.keys.gather(2, where), layer.values.gather(2, where), k)
        logits, start = [], length
        for end in (asked, answered):
            positions = torch.arange(start, end)[None]
            piece = model(inputs_embeds=x[None, start:end], past_key_values=cache, position_ids=positions).logits[0]
            logits.append(piece[-1:] if end == asked else piece)
            start = end
        right = bool((torch.cat(logits).argmax(-1) == ids[asked : answered + 1]).all())
        share = sum(newest_image[p].float().sum(-1).mean().item() for p in kept) / len(kept) / newest_image.sum().item()
        rows[name] = {"right": right, "newest_image": round(share, 4)}
    return rows


def one(model, eager, i: int) -> dict:
    """A chat in every format and by every policy."""
    found, row, reference = chat(model, i), {"tokens": 0, "formats": {}}, None
    for name, make in FORMATS.items():
        cache = make(model.config)
        right, logp = answers(model, found, cache)
        reference = logp if reference is None else reference
        kl = (reference.exp() * (reference - logp)).sum(-1).mean().item()
        same = (reference.argmax(-1) == logp.argmax(-1)).float().mean().item()
        row["formats"][name] = {"right": right, "kl": round(kl, 7), "same": round(same, 4), "bytes": held(cache)}
    return row | {"tokens": found[2][-1], "evictions": evictions(model, eager, found)}


def held(cache) -> int:
    """Bytes of all that a cache holds."""
    found = 0
    for layer in cache.layers:
        if isinstance(layer, quantize.QuantizedLayer):
            found += layer.nbytes
        elif hasattr(layer, "_quantized_keys"):
            found += sum(codes.nbytes + scale.nbytes for codes, scale in (layer._quantized_keys, layer._quantized_values))
        else:
            found += layer.keys.nbytes + layer.values.nbytes
    return found


@torch.no_grad()
def main() -> None:
    model = models.load("mini-vlm")
    eager = models.clone(model)
    eager.set_attn_implementation("eager")  # the one that returns its weights
    settings = {"images": IMAGES, "budget": BUDGET, "sinks": SINKS, "last": LAST}
    rows: list[dict] = []
    if PATH.is_file():
        old = json.loads(PATH.read_text())
        rows = old["chats"] if all(old.get(key) == value for key, value in settings.items()) else []
    for i in range(len(rows), CHATS):
        rows.append(one(model, eager, i))
        models.write_json(PATH, {"environment": measure.environment(), **settings, "chats": rows})
        print(i, {name: sum(row["right"]) for name, row in rows[-1]["formats"].items()}, flush=True)
    base = [right for row in rows for right in row["formats"]["fp32"]["right"]]
    for name in FORMATS:
        own = [row["formats"][name] for row in rows]
        flat = [right for each in own for right in each["right"]]
        kl, same = (sum(each[key] for each in own) / len(own) for key in ("kl", "same"))
        print(f"{name:45s} {evaluate.wilson(sum(flat), len(flat))} {evaluate.paired(base, flat)} kl {kl:.5f} same {same:.4f}")
    for name in rows[0]["evictions"]:
        right = [row["evictions"][name]["right"] for row in rows]
        print(f"{name:45s} {evaluate.wilson(sum(right), len(right))}")


if __name__ == "__main__":
    main()
