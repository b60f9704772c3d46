"""What counts least in a VLM's transformers: FFN neurons, heads, layers, hidden channels. Built by hand in notebook 21."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrecipes.errors import UserError
from mmrecipes.models.modules import attention, ffn, head_dim, layers
from mmrecipes.models.prompts import Rows, teacher_forced
from mmrecipes.quantize.calibration import watched


def taylor_importance(model: nn.Module, rows: Rows, batch_size: int = 10) -> dict[str, dict[str, Tensor]]:
    """How much the loss of the right answers would change, to first order, were a structure cut: |activation x gradient|.
    For each part: "neurons" (L, F), "heads" (L, H), "layers" (L,) and "hidden" (D,), means over `rows` (arXiv:1611.06440;
    of heads: arXiv:1905.10650).
    """
    totals: dict[tuple[str, str], list[Tensor]] = {}
    stacks, places = layers(model), {}
    seen: dict[tuple[str, str, int], tuple[Tensor, Tensor]] = {}  # where the gradient is taken, what a cut takes away there
    for part, stack in stacks.items():
        for i, layer in enumerate(stack):
            places |= {ffn(layer)[1]: (part, "neurons", i), attention(layer)[3]: (part, "heads", i), layer: (part, "layers", i)}

    def see(place: tuple[str, str, int], x: Tensor, y: Tensor) -> None:
        part, kind, i = place
        if kind == "layers":  # y - x: what the layer adds to the residual stream
            seen[place], seen[part, "hidden", i] = (y, y - x), (y, y)
        else:
            seen[place] = x, x

    with watched(places, see):
        for inputs, lengths in teacher_forced(model, rows, batch_size):
            with torch.enable_grad():
                logits, ids = model(**inputs, use_cache=False).logits.float(), inputs["input_ids"]
                loss = sum(F.cross_entropy(logits[r, -k - 1 : -1], ids[r, -k:], reduction="sum") for r, k in enumerate(lengths))
            gradients = torch.autograd.grad(loss, [at for at, _ in seen.values()], allow_unused=True)  # LLaVA may skip a layer
            for (part, kind, _), (at, x), gradient in zip(seen, seen.values(), gradients, strict=True):
                effect = x.detach() * (torch.zeros_like(at) if gradient is None else gradient)
                effect = effect.flatten(1, -2).sum(1)  # [B, features]: over an example's tokens
                if kind == "heads":
                    effect = effect.unflatten(1, (-1, head_dim(model, part))).sum(-1)
                elif kind == "layers":
                    effect = effect.sum(1, keepdim=True)
                totals.setdefault((part, kind), []).append(effect.abs().sum(0))
            seen.clear()
    scores: dict[str, dict[str, Tensor]] = {part: {} for part in stacks}
    for (part, kind), effects in totals.items():  # batch after batch, layer after layer
        per_layer = torch.stack(effects).unflatten(0, (-1, len(stacks[part]))).sum(0) / len(rows)
        scores[part][kind] = {"hidden": per_layer.mean(0), "layers": per_layer[:, 0]}.get(kind, per_layer)
    return scores


@torch.no_grad()
def magnitude_importance(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The same shapes as `taylor_importance`, from the weights alone: the norm of all weights that would go with a structure; of
    a head those of its query and output, as keys and values may be shared (GQA). Without "heads" and "hidden" where queries, keys
    and values are not told apart (Qwen-VL's vision encoder)."""
    scores = {}
    for part, stack in layers(model).items():
        size, neurons, heads, hidden = head_dim(model, part), [], [], 0.0
        for layer in stack:
            into, out = ffn(layer)
            neurons.append(sum(m.weight.square().sum(1) for m in into) + out.weight.square().sum(0))
            try:
                q, k, v, o = attention(layer)
            except UserError:
                continue
            heads.append((q.weight.square().sum(1) + o.weight.square().sum(0)).unflatten(0, (-1, size)).sum(1))
            hidden += sum(m.weight.square().sum(0) for m in (*into, q, k, v))
            hidden += sum(m.weight.square().sum(1) for m in (o, out))
        whole = torch.stack([sum(p.square().sum() for p in layer.parameters()) for layer in stack])
        squares = {"neurons": torch.stack(neurons)} | ({"heads": torch.stack(heads)} if heads else {}) | {"layers": whole}
        squares |= {"hidden": hidden} if heads else {}
        scores[part] = {kind: total.sqrt() for kind, total in squares.items()}
    return scores


@torch.no_grad()
def similarity(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Mean cosine of each layer's input with its output, (L,) a part; 1 less this is ShortGPT's influence (arXiv:2403.03853)."""
    stacks = layers(model)
    total = {layer: torch.zeros(()) for stack in stacks.values() for layer in stack}
    count = dict.fromkeys(total, 0)

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        cosines = F.cosine_similarity(x.float(), y.float(), dim=-1)
        total[layer] += cosines.sum()
        count[layer] += cosines.numel()

    with watched({layer: layer for layer in total}, see):
        for inputs, _ in teacher_forced(model, rows, batch_size=1):  # one at a time: no padding
            model(**inputs, use_cache=False)
    return {p: torch.stack([total[layer] / max(1, count[layer]) for layer in s]) for p, s in stacks.items()}


def strongest(scores: Tensor, count: int) -> list[list[int]]:
    """Of each row of `scores` (L, F) the indices of its `count` largest, in rising order."""
    return [row.topk(count).indices.sort().values.tolist() for row in scores]
