"""What the book's models are trained to do better: see, answer, and attend to the right place."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.data.families import FAMILIES
from mmrecipes.mini.labels import PATCH_TARGETS, ChatBatch
from mmrecipes.mini.model import GRID


class LanguagePass(NamedTuple):
    """One pass through the language model: what went into each layer (B, T, D), and its mask."""

    model: nn.Module
    hidden: Sequence[Tensor]
    positions: Tensor  # (B, T)
    mask: Tensor  # (B, 1, T, T), True where a token may attend


class Probes(nn.Module):
    """Auxiliary linear heads, thrown away after training, for features `vision` and `language` (by default the same) wide."""

    def __init__(self, vision: int, language: int | None = None):
        super().__init__()
        language = language or vision
        self.classes = nn.Linear(vision, sum(PATCH_TARGETS.values()))
        self.centre = nn.Linear(vision, 2)
        self.point = nn.Linear(language, 3)
        self.between = nn.Linear(language, 2)
        self.middle = nn.Linear(language, 1)
        self.classes.use_adamw = self.centre.use_adamw = self.point.use_adamw = True

    def places(self, hidden_states: Sequence[Tensor], is_image: Tensor, batch: ChatBatch) -> tuple[Tensor, dict[str, float]]:
        """Where things are, asked of the language model's hidden states (B, T, D): the sum of the losses, and how well it does.
        After layer 1 each patch must tell whether it holds the middle of an object (so that objects can be counted); after
        layer 2 each name whether its object is there, and its x and y; after layer 3 the token before the answer how far the
        last named object lies from the first.
        """
        points, hidden = batch.points, [F.layer_norm(h.float(), h.shape[-1:]) for h in hidden_states[:4]]
        cell = (batch.centres * GRID).long()
        own = cell[..., 1] * GRID + cell[..., 0] == torch.arange(GRID * GRID, device=cell.device)
        middle = (own & (batch.labels[..., 0] == 1)).float()
        guess = self.middle(hidden[1][is_image]).view(middle.shape)
        loss = 5 * F.binary_cross_entropy_with_logits(guess, middle)
        logs = {"middle": (guess > 0)[middle > 0].float().mean().item()}
        guess = self.point(hidden[2])
        asked, located = points[..., 0] >= 0, points[..., 1] >= 0
        there = points[asked][:, 0]
        off = guess[located][:, 1:] - points[located][:, 1:3]
        present = F.binary_cross_entropy_with_logits(guess[asked][:, 0], there, reduction="sum") / max(1, len(there))
        loss = loss + present + 10 * off.pow(2).sum() / max(1, off.numel())  # a small batch may ask none
        right = (guess[asked][:, 0] > 0) == (there > 0)
        logs |= {"there": right.float().mean().item(), "off": off.abs().mean().item()}
        before, first, last = name_positions(batch)
        xy = points[..., 1:3]
        start, end = (xy.gather(1, at[..., None].expand_as(xy)) for at in (first, last))
        row, at = (before & (first < last) & (start[..., 0] >= 0) & (end[..., 0] >= 0)).nonzero(as_tuple=True)
        apart = self.between(hidden[3][row, at]) - (end - start)[row, at]
        return loss + 10 * apart.pow(2).sum() / max(1, apart.numel()), logs | {"apart": apart.abs().mean().item()}

    def patches(self, hidden: Tensor, labels: Tensor, centres: Tensor, char: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Features (B, 64, D) against `patch_labels`: loss, characters with weight `char`, and the accuracy of each target."""
        total, accuracy = torch.zeros((), device=hidden.device), {}
        heads = self.classes(hidden).flatten(0, 1).split(list(PATCH_TARGETS.values()), -1)
        for name, logits, want in zip(PATCH_TARGETS, heads, labels.flatten(0, 1).unbind(-1), strict=True):
            weight = {"near": 0.3, "char": char}.get(name[:4], 1.0)
            total = total + weight * F.cross_entropy(logits.float(), want)
            right = logits.argmax(-1) == want
            accuracy[name] = right[want >= 0].float().mean().item()
            if name == "char0":  # reading is scored where there is something to read
                accuracy["read"] = right[want > 0].float().mean().item()
        off = (self.centre(hidden).float() - centres)[labels[..., 0] == 1]
        return total + 10 * off.pow(2).mean(), accuracy | {"off": off.abs().mean().item()}


def answer_loss(
    model: nn.Module, batch: ChatBatch, word_ids: Tensor, align: float, probes: Probes | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers' tokens, in nats, with helpers -> loss, and the share of right answers per family.
    Added are `align` x the alignment of each visual token with the words for what it shows; with `probes`, what they and the
    supervised attention heads miss; and their patch loss where the vision encoder learns.
    """
    core, ids, segments = model.model, batch.ids, batch.segments
    frozen = not any(p.requires_grad for p in core.vision_model.parameters())
    with torch.no_grad() if frozen else torch.enable_grad():
        features = core.vision_model(batch.images).last_hidden_state
    visual = core.connector(features)
    out, mask = packed_pass(core, visual, batch, hidden=probes is not None)
    here = batch.answers[:, 1:] >= 0  # the token before an answer's token predicts it
    logits, want = model.lm_head(out.last_hidden_state[:, :-1][here]), batch.answers[:, 1:][here]
    loss = F.cross_entropy(logits.float(), want)
    logs = {"answer": loss.item(), **family_accuracy(logits.argmax(-1) == want, here, segments[:, 1:], batch.kinds)}
    if align:
        table = F.normalize(core.get_input_embeddings().weight[word_ids.to(ids.device)].float(), dim=-1)
        match = 16 * F.normalize(visual.float(), dim=-1) @ table.T - 5
        aligned = F.binary_cross_entropy_with_logits(match, batch.words, reduction="sum") / batch.words.sum()
        logs["align"] = aligned.item()
        loss = loss + align * aligned
    if probes is not None:
        is_image = ids == model.config.image_token_id
        placed, places = probes.places(out.hidden_states, is_image, batch)
        run = LanguagePass(core.text_model, out.hidden_states, batch.positions, mask)
        attended, heads = attention_supervision(run, is_image, batch)
        loss, logs = loss + placed + attended, logs | places | heads
        if not frozen:  # the vision encoder keeps its first task, so that it does not forget
            kept, accuracy = probes.patches(features, batch.labels, batch.centres, char=3.0)
            loss, logs = loss + 0.2 * kept, logs | {f"patch_{k}": v for k, v in accuracy.items()}
    return loss, logs


def packed_pass(core: nn.Module, visual: Tensor, batch: ChatBatch, hidden: bool = False) -> tuple[Any, Tensor]:
    """The language model over packed questions, with visual tokens (B, N, D) in their places: its output, with all its hidden
    states if asked for, and the mask (B, 1, T, T): a question's tokens see the image and their own past, no other question."""
    ids, segments = batch.ids, batch.segments
    embeds = core.get_input_embeddings()(ids)
    at = (ids == core.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(at, visual.to(embeds.dtype))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    mask = (causal & (same | (segments == 0)[:, None, :]))[:, None]
    settings = {"position_ids": batch.positions, "use_cache": False, "output_hidden_states": hidden}
    return core.text_model(inputs_embeds=embeds, attention_mask=mask, **settings), mask


def name_positions(batch: ChatBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens (B, T) precede an answer's token in a question that names an object, and where its first and last name end."""
    named, segments = batch.points[..., 3] >= 0, batch.segments
    own = (named[:, None] & (segments[:, :, None] == segments[:, None, :])).int()  # (B, T, T): names in a token's question
    before = F.pad(batch.answers[:, 1:] >= 0, (0, 1)) & (segments > 0) & own.any(-1)
    return before, own.argmax(-1), own.shape[-1] - 1 - own.flip(-1).argmax(-1)


def attention_supervision(run: LanguagePass, is_image: Tensor, batch: ChatBatch) -> tuple[Tensor, dict[str, float]]:
    """Seven attention heads are told where to look (attention supervision, as in Qiao et al. 2018, arXiv:1709.06308).
    Returns the sum of the mean negative log shares, and how much of the attention each head puts where it should.
    """
    before, first, last = name_positions(batch)
    points, segments, tokens = batch.points, batch.segments, torch.arange(batch.ids.shape[1], device=batch.ids.device)
    reads = (batch.kinds == FAMILIES.index("reading")).gather(1, (segments - 1).clamp(0)) & (segments > 0)
    related = (points[..., 0] == -3)[:, None] & (segments[:, :, None] == segments[:, None, :])

    def patches(row: Tensor, at: Tensor) -> Tensor:
        on = torch.zeros(len(row), len(tokens), dtype=torch.bool, device=tokens.device)
        on[is_image[row]] = batch.marks[row, at].flatten()
        return on

    heads = {  # name: layer, head, from which tokens, and at which (N, T) of those that are not masked
        # from a name's last word ("circle") at its other words ("large", "red")
        "gathers": (0, 0, points[..., 3] > 0, lambda r, t: (tokens < t[:, None]) & (tokens >= (t - points[r, t, 3])[:, None])),
        # from the token before an answer's at the word for the relation ("left"), and at the first and last name
        "relates": (0, -1, before & related.any(-1), lambda r, t: related[r, t]),
        # from a name at its object's patches; from "red objects" at the middle of each, and as much at the first token
        "looks": (1, 0, points[..., 1] >= 0, patches),
        "counts": (1, -1, points[..., 0] == -2, lambda r, t: patches(r, t) | (tokens == 0)),
        "first": (2, 0, before, lambda r, t: tokens == first[r, t, None]),
        "last": (2, -1, before, lambda r, t: tokens == last[r, t, None]),
        # from each token before a printed code's at the patches of its object
        "spells": (3, 0, before & reads, lambda r, t: patches(r, last[r, t])),
    }
    total, logs = torch.zeros((), device=tokens.device), {}
    for name, (layer, head, where, target) in heads.items():
        row, at = where.nonzero(as_tuple=True)
        if not len(row) or layer >= len(run.model.layers):  # nothing asked, or a model with fewer layers
            continue
        share, on = head_attention(run, layer, head, row, at), target(row, at)
        if name == "counts":  # the same share for each: Kullback-Leibler divergence from the even one
            missed = -(share.masked_fill(~on, 0).sum(-1) / on.sum(-1) + on.sum(-1).log()).mean()
        else:
            missed = -share.masked_fill(~on, -torch.inf).logsumexp(-1).mean()
        total, logs[name] = total + missed, math.exp(-missed.item())
    return total, logs


def head_attention(run: LanguagePass, layer: int, head: int, row: Tensor, at: Tensor) -> Tensor:
    """Log of the attention that tokens (row, at) pay to all tokens, (N, T), in one layer's first (0) or last (-1) head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    block = run.model.layers[layer]
    attention, x = block.self_attn, block.input_layernorm(run.hidden[layer])
    projections = [m.weight.view(-1, attention.head_dim, x.shape[-1])[head] for m in (attention.q_proj, attention.k_proj)]
    q, k = (F.linear(x, weight)[:, None] for weight in projections)
    q, k = apply_rotary_pos_emb(q, k, *run.model.rotary_emb(x, run.positions))
    scores = torch.einsum("nd,ntd->nt", q[row, 0, at], k[row, 0]).float() * attention.scaling
    return scores.masked_fill(~run.mask[row, 0, at], -torch.inf).log_softmax(-1)


def family_accuracy(right: Tensor, here: Tensor, segments: Tensor, kinds: Tensor) -> dict[str, float]:
    """Share of questions of each family with every answer token right. Batches are never seen twice: this is held-out."""
    row = torch.arange(len(here), device=here.device)[:, None].expand_as(here)
    question = (row * kinds.shape[1] + segments - 1)[here]
    whole = torch.ones(kinds.numel(), device=here.device)
    whole.scatter_reduce_(0, question, right.float(), "amin")
    return {f: whole[kinds.flatten() == i].mean().item() for i, f in enumerate(FAMILIES) if (kinds == i).any()}
