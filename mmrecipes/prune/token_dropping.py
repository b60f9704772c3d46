"""Fewer visual tokens, without training: those that a question does not need are dropped. Built by hand in notebook 22.

For models whose language model is Llama-like and gets its image as tokens (Idefics3, LLaVA, Qwen-VL, Gemma 3). The model runs as
it always does, with its own positions and masks; hooks let its later layers see fewer tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.data.datasets import majority_floor
from mmrecipes.errors import ParityError, UserError
from mmrecipes.evaluate import generation
from mmrecipes.families import family_of
from mmrecipes.models.modules import parts, refuse_encoder_decoder
from mmrecipes.models.prompts import Rows, batch_inputs, chat_prompts
from mmrecipes.prune.layer_hooks import dropping
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
    length: int  # T, where the next token is
    position: Tensor | None = None  # [B, 1] or, M-RoPE's, [3, B, 1]: what it is counted as; None: T


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
    """What the language model reads: embeddings (B, T, D), and which are visual (B, T). UserError unless prompts are alike, and
    for a model that reads more than embeddings.
    """
    _language(model, by_embeddings=True)  # refused before its vision encoder runs
    visual = visual_places(model, inputs)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return embeddings.masked_scatter(visual[..., None], features(model, inputs, merge)), visual


def visual_places(model: nn.Module, inputs: Mapping) -> Tensor:
    """Which tokens of the prompts are visual, (B, T). Raises UserError where they are padded, or not as many in each prompt."""
    visual = inputs["input_ids"] == getattr(model.config, "image_token_id", -1)
    if not inputs.get("attention_mask", torch.ones(1)).all():
        raise UserError("token dropping: the prompts are padded; give prompts of one length, or one at a time (see `prompts`)")
    counts = visual.sum(1)
    if not counts.all() or counts.unique().numel() > 1:
        raise UserError(f"token dropping: visual tokens a prompt: {counts.tolist()}; expected one image's, and as many in each")
    return visual


def received(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], asking: Tensor) -> Tensor:
    """Attention that each token gets in decoder layer `block`, mean of its heads, the most that one of `asking` gives: (B, T).
    `x` (B, T, D) goes into the layer, `rope` are cosines and sines (B, T, d), `asking` (A,) are positions. Text looks back, here
    without a sliding layer's window, which would make far tokens all alike.
    """
    from transformers.models.llama.modeling_llama import rotate_half

    attention, normed = block.self_attn, block.input_layernorm(x)

    def heads(kind: str, at: Tensor) -> Tensor:  # [B, heads, A, d]
        own = getattr(attention, f"{kind}_proj")(normed[:, at]).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3's and Gemma 3's
        own = (own if norm is None else norm(own)).transpose(1, 2)
        cos, sin = (r[:, None, at] for r in rope)
        return own * cos + rotate_half(own) * sin

    everywhere = torch.arange(x.shape[1], device=x.device)
    q, keys = heads("q", asking), heads("k", everywhere)
    scores = q @ keys.repeat_interleave(q.shape[1] // keys.shape[1], 1).mT * attention.scaling
    return scores.masked_fill(everywhere > asking[:, None], -torch.inf).softmax(-1).mean(1).amax(1)


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
    language = _language(model, by_embeddings=True)

    def run(cache: DynamicCache) -> Tensor:
        states = language(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return parts(model)["head"](states[:, -1])

    return _prefilled(language, visual, run, keep, layer, how)


def _prefilled(
    language: nn.Module, visual: Tensor, run: Callable[[DynamicCache], Tensor], keep: float, layer: int, how: str
) -> Prefilled:
    """What `run(cache)`, the logits (B, V) of a prompt's next token, leaves behind when `language` drops tokens in it."""
    from transformers import DynamicCache

    depth, least = len(language.layers), int(how in BY_ATTENTION)
    if how not in HOW or not 0 < keep <= 1 or not least <= layer < depth:
        wanted = f"one of {', '.join(HOW)}, 0 < keep <= 1, and a layer from 0 (after attention: from 1)"
        raise UserError(f"token dropping: {how=}, {keep=}, {layer=}; expected {wanted} to {depth - 1}")
    cache, count = DynamicCache(config=language.config), int(visual[0].sum())
    n = max(1, round(keep * count))

    def choose(seen: Mapping[str, Any]) -> Tensor:
        return keep_positions(_scores(language, visual, seen, n, layer, how), visual, n)

    with dropping(language, layer if n < count else depth, choose) as seen:
        logits = run(cache)
    last = seen["positions"][..., -1:]  # text, which M-RoPE counts alike in its three directions
    position = last.expand(*last.shape[:-2], len(visual), 1) + 1
    everything = torch.arange(visual.shape[1], device=visual.device).expand(visual.shape)
    return Prefilled(logits, cache, seen.get("kept", everything), visual.shape[1], position)


def _scores(language: nn.Module, visual: Tensor, seen: Mapping[str, Any], n: int, layer: int, how: str) -> Tensor:
    """How much each visual token is worth by what `dropping` has `seen`, (B, number of visual tokens)."""
    x, (batch, length) = seen["first"], visual.shape
    image, behind = x[visual].view(batch, -1, x.shape[-1]), int(visual[0].nonzero().max()) + 1
    if how in BY_ATTENTION:
        asking = torch.arange(length - 1 if how == "attention" else behind, length, device=x.device)
        return received(language.layers[layer - 1], *seen["before"], asking)[visual].view(batch, -1)
    if how == "words":
        return likeness(image, x[:, behind:])
    if how == "distinct":
        return distinctness(image)
    shape = image.shape[:2]
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return (noise if how == "random" else evenly(n, shape[1]).expand(shape)).to(x.device)


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
    if merge != 0:
        return read(model, *embed(model, inputs, merge), keep, layer, how)

    def run(cache: DynamicCache) -> Tensor:
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    language = _language(model)
    return _prefilled(language, visual_places(model, inputs), run, keep, layer, how)


@torch.inference_mode()
def decode(model: nn.Module, start: Prefilled, max_new_tokens: int = 8) -> Tensor:
    """Greedy continuation (B, at most `max_new_tokens`), filled up with the padding token. It uses up `start.cache`."""
    language, head, settings = _language(model), parts(model)["head"], model.generation_config
    eos = torch.tensor(settings.eos_token_id, device=start.logits.device).flatten()
    pad = int(eos[0]) if settings.pad_token_id is None else settings.pad_token_id
    tokens = [start.logits.argmax(-1)]  # [B] each
    done = torch.isin(tokens[0], eos)
    # what follows the whole prompt: a cache that lost tokens knows a smaller position
    position = torch.full_like(tokens[0], start.length)[:, None] if start.position is None else start.position

    def see(i: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:  # a model makes one mask for layers of several lengths
        return args, kwargs | {"attention_mask": _window(start, i, len(tokens) - 1, args[0].dtype)}

    with contextlib.ExitStack() as hooks:
        for i, block in enumerate(language.layers):
            hook = block.register_forward_pre_hook(lambda _, args, kwargs, i=i: see(i, args, kwargs), with_kwargs=True)
            hooks.enter_context(hook)
        while len(tokens) < max_new_tokens and not done.all():
            given = {"past_key_values": start.cache, "position_ids": position + len(tokens) - 1, "use_cache": True}
            states = language(input_ids=tokens[-1][:, None], **given).last_hidden_state
            tokens.append(head(states[:, -1]).argmax(-1).masked_fill(done, pad))
            done = done | torch.isin(tokens[-1], eos)
    return torch.stack(tokens, 1)


def _window(start: Prefilled, i: int, step: int, dtype: torch.dtype) -> Tensor | None:
    """The mask (B, 1, 1, keys) of new token `step` in layer `i`, or None where it sees all that the cache has."""
    held, now = start.cache.layers[i], start.length + step
    window = getattr(held, "sliding_window", None)
    if window is None or held.get_seq_length() == now:  # nothing was dropped: a sliding layer's cache is its window
        return None
    places = torch.cat([start.kept, torch.arange(start.length, now + 1, device=start.kept.device).expand(len(start.kept), -1)], 1)
    hidden = places[:, -window:] <= now - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)[:, None, None]


def _language(model: nn.Module, by_embeddings: bool = False) -> nn.Module:
    """The language model. UserError where it drops no tokens, or, `by_embeddings`, reads more than those."""
    refuse_encoder_decoder(model)
    language, name = parts(model)["language"], type(model).__name__
    stack = getattr(language, "layers", [])
    if any(not hasattr(block, "self_attn") for block in stack):
        states = "keeps recurrent states, in which tokens cannot be told apart"
        raise UserError(f"token dropping: {name}'s decoder {states}; give a model whose layers all attend")
    if not len(stack) or not hasattr(stack[0].self_attn, "q_proj") or not hasattr(language, "rotary_emb"):
        raise UserError(f"token dropping: no Llama-like language model in {name}; give an Idefics3 or LLaVA")
    family = family_of(name)
    if by_embeddings and family is not None and (family.positions or family.masks):
        raise UserError(f"token dropping: {name} makes positions or masks from token ids; use `prefill`, without merging")
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
