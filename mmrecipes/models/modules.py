"""The only place that knows the parts of a model: vision encoder, connector, language model, head; layers, FFNs, attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmrecipes.errors import UserError

if TYPE_CHECKING:
    pass


def block_of(name: str) -> str:
    """The numbered block that a layer belongs to (`...layers.3`), or its own name."""
    words = name.split(".")
    numbers = [i for i, w in enumerate(words) if w.isdigit()]
    return ".".join(words[: numbers[0] + 1]) if numbers else name


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of the weights that shares the processor, which compression never touches."""
    processor = getattr(model, "processor", None)
    return copy.deepcopy(model, {id(processor): processor})


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer, without an output head that is tied to the word embeddings."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in tied:
            yield name, module


# what libraries call the parts of a multimodal model; the first that is there counts
VISION = ("vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder", "vpm")


CONNECTOR = ("connector", "multi_modal_projector", "mm_projector", "merger", "aligner", "resampler", "language_projection")


HELPERS = ("deepstack_merger_list", "qformer")  # further weights of the connector


LANGUAGE = ("language_model", "text_model", "text_decoder", "llm")


# ---- parts


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules called "vision", "connector", "language" and "head" of a multimodal model; UserError for any other.

    The connector may sit inside the vision tower (Qwen's merger). A dual encoder (CLIP, SigLIP) has neither connector nor head.
    """
    core = getattr(model, "model", model)
    found = {"vision": _first(core, VISION), "language": _first(core, LANGUAGE)}
    if not all(found.values()):
        given = type(model).__name__
        raise UserError(f"{given} is not a vision-language model: no vision tower or no language model was found in it")
    connector = _first(core, CONNECTOR) or _first(found["vision"], CONNECTOR)
    head = getattr(model, "lm_head", None) or getattr(found["language"], "lm_head", None)
    found |= {"connector": connector, "head": head}
    return {k: found[k] for k in ("vision", "connector", "language", "head") if found[k] is not None}


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for m in (getattr(module, n, None) for n in names) if isinstance(m, nn.Module)), None)


def part_of(model: nn.Module) -> dict[str, str]:
    """The part of each parameter: {name: "vision", "connector", "language", "head" or "other"}; tied weights count once."""
    found = parts(model)
    kind = {id(module): part for part, module in found.items()}
    helpers = (getattr(m, n, None) for m in (getattr(model, "model", model), found["vision"]) for n in HELPERS)
    kind |= {id(m): "connector" for m in helpers if m is not None}
    prefixes = {name: kind[id(m)] for name, m in model.named_modules() if id(m) in kind}
    # the longest prefix is the innermost module: the connector wins over the tower around it
    inner = sorted(prefixes, key=len, reverse=True)
    return {name: next((prefixes[p] for p in inner if name.startswith(p + ".")), "other") for name, _ in model.named_parameters()}


def nested_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(part, module), largest first, so that the innermost wins: a Qwen-VL's connector lies inside its vision tower."""
    found = parts(model)
    within = (getattr(model, "model", model), found["vision"])
    helpers = [m for w in within for n in HELPERS if (m := getattr(w, n, None)) is not None]
    helpers = [m for h in helpers for m in (h if isinstance(h, nn.ModuleList) else [h])]  # a list is never called itself
    return sorted([*found.items(), *(("connector", h) for h in helpers)], key=lambda p: -len(list(p[1].modules())))


class VisionWithConnector(nn.Module):
    """Vision tower and connector of a VLM: pictures to visual tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        found = parts(model)
        self.vision, self.connector = found["vision"], found["connector"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, H, W) -> visual tokens (B, N, D), as the language model gets them."""
        return self.connector(self.vision(pixel_values).last_hidden_state)


TOWERS = ("vision", "language")


FFN = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))  # what libraries call the matrices into and out of it


OUT = ("o_proj", "out_proj")


# ---- where things are


def layers(model: nn.Module, names: Sequence[str] = TOWERS) -> dict[str, nn.ModuleList]:
    """The transformer layers of "vision" and "language", or of some parts' `names`. Raises UserError where one has none."""
    found = {}
    for part in names:
        lists = [m for n, m in parts(model)[part].named_modules() if n.split(".")[-1] in ("layers", "blocks")]
        if not lists:
            raise UserError(f"{type(model).__name__}: no list of layers in its {part} part; give a transformer")
        found[part] = lists[0]
    return found


def ffn(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The matrices into the columns of a layer's FFN (two where it is gated), and the one out of them."""
    for into, out in FFN:
        if hasattr(layer.mlp, out):
            return [getattr(layer.mlp, n) for n in into], getattr(layer.mlp, out)
    raise UserError(f"{type(layer.mlp).__name__}: no {' or '.join(out for _, out in FFN)} in it; its columns cannot be told")


def attention(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output matrix of a layer's attention."""
    own = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
    out = next((getattr(own, n) for n in OUT if hasattr(own, n)), None)
    if out is None or not hasattr(own, "q_proj"):
        raise UserError(f"{type(own).__name__}: no q_proj, k_proj, v_proj and o_proj in it; its heads cannot be told")
    return own.q_proj, own.k_proj, own.v_proj, out


def config_of(model_or_config: object, part: str) -> object:
    """The part of the config that says how large the part is."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.vision_config if part == "vision" else config.get_text_config()


def head_dim(model: nn.Module, part: str) -> int:
    """Width of one attention head."""
    config = config_of(model, part)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---- cuts


def checkpoint_with_config(model: nn.Module, config: object) -> nn.Module:
    """A fresh model of `config` with the weights of `model`, whose modules were cut: what `from_pretrained` would build.

    Raises UserError where a weight does not fit: then the config cannot say what was cut, and no checkpoint could be loaded.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        fresh = type(model)._from_config(config, dtype=next(model.parameters()).dtype)
    fresh.tie_weights()
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as e:
        raise UserError(f"{type(model).__name__}: what was cut does not fit its config ({str(e).splitlines()[1].strip()})") from e
    if model.can_generate():
        fresh.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(model, "processor"):
        fresh.processor = model.processor
    return fresh.to(model.device).train(model.training)
