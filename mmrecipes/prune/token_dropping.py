"""Fewer visual tokens, without training: those that a question does not need are dropped. Built by hand in notebook 22.

For models whose language model is Llama-like and gets its image as tokens (Idefics3, SmolVLM, LLaVA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.data.datasets import majority_floor
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate import generation
from mmrecipes.models.modules import parts
from mmrecipes.models.prompts import Rows, batch_inputs, chat_prompts
from mmrecipes.prune.token_merging import merged_vision

if TYPE_CHECKING:
    from transformers import BatchFeature, DynamicCache

BY_ATTENTION = ("attention", "question")  # need a language layer to have run
HOW = (*BY_ATTENTION, "words", "distinct", "random", "uniform")
Budget = float | Callable[[str], float]  # the share of visual tokens that is kept, or a function of the question that says it


class Prefilled(NamedTuple):
    """Prompts that were read, for `decode` to go on from: B prompts of T tokens, K of them kept."""

    logits: Tensor  # [B, V], of the next token
    cache: DynamicCache  # T keys in the layers before the drop, K in those after it
    kept: Tensor  # [B, K]: positions of the kept tokens, ascending
    length: int  # T, which is the position of the next token


def features(model: nn.Module, inputs: Mapping, merge: float = 0.0) -> Tensor:
    """Visual tokens (number in all, D) from a processor's `inputs`, a share `merge` of patches merged. Raises UserError."""
    seen = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")  # of tiles: how large the image was
    given = {k: inputs[k] for k in seen if k in inputs}
    if merge == 0:
        return torch.cat([f.flatten(0, -2) for f in model.get_image_features(**given).pooler_output])
    if not 0 < merge < 1:
        raise UserError(f"token dropping: merge={merge}; expected a share of the patches, 0 <= merge < 1")
    if not given.get("pixel_attention_mask", torch.ones(1)).all():
        raise UserError("token dropping: merging needs images that fill their tiles; crop or resize them to whole tiles")
    x = merged_vision(model, given["pixel_values"].flatten(0, -4), merge)
    return parts(model)["connector"](x).flatten(0, 1)


def embed(model: nn.Module, inputs: Mapping, merge: float = 0.0) -> tuple[Tensor, Tensor]:
    """What the language model reads: embeddings (B, T, D), and which are visual (B, T). UserError unless prompts are alike."""
    ids, _ = inputs["input_ids"], _language(model)  # refused before its vision encoder runs
    visual = ids == getattr(model.config, "image_token_id", -1)
    if not inputs.get("attention_mask", torch.ones(1)).all():
        raise UserError("token dropping: the prompts are padded; give prompts of one length, or one at a time (see `prompts`)")
    counts = visual.sum(1)
    if not counts.all() or counts.unique().numel() > 1:
        raise UserError(f"token dropping: visual tokens a prompt: {counts.tolist()}; expected one image's, and as many in each")
    return model.get_input_embeddings()(ids).masked_scatter(visual[..., None], features(model, inputs, merge)), visual


def received(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, asking: Tensor) -> Tensor:
    """Attention that each token gets in decoder layer `block`, mean of its heads, the most that one of `asking` gives: (B, T).
    `x` (B, T, D) goes into the layer, `keys` (B, H, T, d) are what it left in the cache, `asking` (A,) are positions.
    """
    from transformers.models.llama.modeling_llama import rotate_half

    attention, (cos, sin) = block.self_attn, (r[:, None, asking] for r in rope)
    q = attention.q_proj(block.input_layernorm(x[:, asking])).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q = q * cos + rotate_half(q) * sin  # [B, heads, A, d]
    scores = q @ keys.repeat_interleave(q.shape[1] // keys.shape[1], 1).mT * attention.scaling
    future = torch.arange(x.shape[1], device=x.device) > asking[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1).mean(1).amax(1)


def likeness(x: Tensor, text: Tensor) -> Tensor:
    """How much each of the visual tokens `x` (B, N, D) is like one of the question's tokens `text` (B, W, D): (B, N)."""
    cosine = F.normalize(x, dim=-1) @ F.normalize(text, dim=-1).mT
    return (cosine - cosine.mean(1, keepdim=True)).amax(-1)  # what a text token finds everywhere says nothing


def distinctness(x: Tensor) -> Tensor:
    """How little each of the visual tokens `x` (B, N, D) is like the image's mean: (B, N). It knows nothing of the question."""
    unit = F.normalize(x, dim=-1)
    return -(unit @ unit.mean(1)[..., None])[..., 0]


def evenly(n: int, count: int) -> Tensor:
    """(count,) with 1 at `n` even distances and 0 elsewhere."""
    return torch.zeros(count).index_fill(0, ((torch.arange(n) + 0.5) * count / n).long(), 1)


@torch.inference_mode()
def read(model: nn.Module, x: Tensor, visual: Tensor, keep: float = 0.5, layer: int = 2, how: str = "attention") -> Prefilled:
    """`prefill` from embeddings `x` (B, T, D) of which `visual` (B, T) are the image's, as `embed` makes them."""
    from transformers import DynamicCache
    from transformers.masking_utils import create_causal_mask

    language, least = _language(model), int(how in BY_ATTENTION)
    if how not in HOW or not 0 < keep <= 1 or not least <= layer < len(language.layers):
        wanted = f"one of {', '.join(HOW)}, 0 < keep <= 1, and a layer from 0 (after attention: from 1)"
        raise UserError(f"token dropping: {how=}, {keep=}, {layer=}; expected {wanted} to {len(language.layers) - 1}")
    length, count, last = x.shape[1], int(visual[0].sum()), int(visual[0].nonzero().max())
    n = max(1, round(keep * count))
    positions, cache = torch.arange(length, device=x.device).expand(len(x), -1), DynamicCache(config=language.config)
    image, text, before, rope = x[visual].view(len(x), count, -1), x[:, last + 1 :], None, None
    for i, block in enumerate(language.layers):
        if i == layer and n < count:
            if how in BY_ATTENTION:
                asking = positions[0, -1:] if how == "attention" else positions[0, last + 1 :]
                score = received(language.layers[i - 1], before, rope, cache.layers[i - 1].keys, asking)[visual].view(len(x), -1)
            elif how in ("words", "distinct"):
                score = likeness(image, text) if how == "words" else distinctness(image)
            else:
                noise = torch.rand(len(x), count, generator=torch.Generator().manual_seed(0))
                score = (noise if how == "random" else evenly(n, count).expand(len(x), -1)).to(x.device)
            positions = keep_positions(score, visual, n)
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        if i in (0, layer):  # the kept tokens' own positions, and a causal mask of their number
            rope = language.rotary_emb(x, position_ids=positions)
            mask = create_causal_mask(config=language.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        before = x
        x = block(x, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=True)
    return Prefilled(model.lm_head(language.norm(x[:, -1])), cache, positions, length)


def keep_positions(score: Tensor, visual: Tensor, n: int) -> Tensor:
    """Positions (B, K), ascending, of all text tokens and the `n` best visual ones by `score` (B, number of visual tokens)."""
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(n).indices, True)
    return (~visual).masked_scatter(visual, chosen).nonzero()[:, 1].view(len(score), -1)


@torch.inference_mode()
def prefill(
    model: nn.Module, inputs: Mapping, keep: float = 0.5, layer: int = 2, how: str = "attention", merge: float = 0.0
) -> Prefilled:
    """Read prompts of one length, dropping visual tokens: layers before `layer` see them all, the others a share `keep`.
    Ranked by the "attention" of the prompt's last token in the layer before (FastV, arXiv:2403.06764); "question": the most that
    any token after the image gave; "words": `likeness` to those; "distinct": `distinctness`; "random"; "uniform". `merge`: as in
    `features`. UserError for options or a model that do not fit.
    """
    return read(model, *embed(model, inputs, merge), keep, layer, how)


@torch.inference_mode()
def decode(model: nn.Module, start: Prefilled, max_new_tokens: int = 8) -> Tensor:
    """Greedy continuation (B, at most `max_new_tokens`), filled up with the padding token. It uses up `start.cache`."""
    language, settings = _language(model), model.generation_config
    eos = torch.tensor(settings.eos_token_id, device=start.logits.device).flatten()
    pad = int(eos[0]) if settings.pad_token_id is None else settings.pad_token_id
    tokens = [start.logits.argmax(-1)]  # [B] each
    done = torch.isin(tokens[0], eos)
    for position in range(start.length, start.length + max_new_tokens - 1):
        if done.all():
            break
        x = model.get_input_embeddings()(tokens[-1][:, None])
        # the position that follows the whole prompt: a cache that lost tokens knows a smaller one
        rope = language.rotary_emb(x, position_ids=torch.full_like(tokens[-1], position)[:, None])
        for block in language.layers:
            x = block(x, attention_mask=None, position_embeddings=rope, past_key_values=start.cache, use_cache=True)
        tokens.append(model.lm_head(language.norm(x[:, -1])).argmax(-1).masked_fill(done, pad))
        done = done | torch.isin(tokens[-1], eos)
    return torch.stack(tokens, 1)


def _language(model: nn.Module) -> nn.Module:
    language = parts(model)["language"]
    attention = getattr(next(iter(getattr(language, "layers", [])), None), "self_attn", None)
    rope = getattr(language.config, "rope_parameters", None) or {}
    if not hasattr(attention, "q_proj") or hasattr(attention, "q_norm") or "mrope_section" in rope:
        raise UserError(f"token dropping: no Llama-like language model in {type(model).__name__}; give an Idefics3 or LLaVA")
    return language


def prompts(
    model: nn.Module, images: Sequence, questions: Sequence[str], kinds: Sequence | None = None, batch_size: int = 50
) -> Iterator[tuple[list[int], BatchFeature]]:
    """Batches without padding: which questions, and the processor's inputs. One length, image size and kind a batch."""
    texts = chat_prompts(model.processor, questions)
    lengths = [len(ids) for ids in model.processor.tokenizer(texts)["input_ids"]]
    alike = list(zip(kinds or [0] * len(texts), lengths, [image.size for image in images], strict=True))
    for kind in sorted(set(alike)):
        same = [i for i, a in enumerate(alike) if a == kind]
        for rows in (same[j : j + batch_size] for j in range(0, len(same), batch_size)):
            yield rows, batch_inputs(model, [images[i] for i in rows], [texts[i] for i in rows])


def answers(model: nn.Module, images: Sequence, questions: Sequence[str], keep: Budget = 0.5, **options) -> list[str]:
    """As `evaluate.answers`, with fewer visual tokens; `options` are `prefill`'s. ParityError when logits are not finite."""
    budgets, texts = [keep(q) if callable(keep) else keep for q in questions], [""] * len(questions)
    for rows, inputs in prompts(model, images, questions, budgets):
        start = prefill(model, inputs, budgets[rows[0]], **options)
        if not torch.isfinite(start.logits).all():
            raise ParityError("the model's logits are not finite: it is broken, not lossy; check the step that made it")
        for i, text in zip(rows, model.processor.batch_decode(decode(model, start), skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    return texts


def vqa(model: nn.Module, rows: Rows, keep: Budget = 0.5, **options) -> generation.Result:
    """`evaluate.vqa` with fewer visual tokens: the same questions in the same order, so that the two compare in pairs."""
    texts = answers(model, rows["image"][:], rows["question"][:], keep, **options)
    return generation.score(texts, rows["answer"][:], rows["family"][:], majority_floor(rows))
