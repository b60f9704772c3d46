"""The only place that knows the parts of a model: vision encoder, connector, language model, head; layers, FFNs, attention."""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mmrecipes.errors import UserError

# what libraries call the parts of a multimodal model, and the matrices into and out of an FFN; the first that is there counts
VISION = ("vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder", "vpm")
CONNECTOR = ("connector", "multi_modal_projector", "mm_projector", "merger", "aligner", "resampler", "language_projection")
HELPERS = ("deepstack_merger_list", "qformer")  # further weights of the connector
LANGUAGE = ("language_model", "text_model", "text_decoder", "llm")
LAYERS = ("layers", "blocks", "layer")
TOWERS = ("vision", "language")  # the parts that are transformers
FFN = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("linear_fc1",), "linear_fc2"), (("linear_1",), "linear_2"))
OUT = ("o_proj", "out_proj", "projection_layer")


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules called "vision", "connector", "language" and "head" of a multimodal model; UserError for any other.
    The connector may sit inside the vision encoder (Qwen's merger). A dual encoder (CLIP, SigLIP) has neither connector nor head.
    >>> list(parts(model))
    ['vision', 'connector', 'language', 'head']
    """
    core = getattr(model, "model", model)
    vision, language = _first(core, VISION), _first(core, LANGUAGE)
    if vision is None or language is None:
        given = type(model).__name__
        raise UserError(f"{given} is not a vision-language model: no vision encoder or no language model was found in it")
    connector = _first(core, CONNECTOR) or _first(vision, CONNECTOR)
    head = getattr(model, "lm_head", None) or getattr(language, "lm_head", None)
    found = {"vision": vision, "connector": connector, "language": language, "head": head}
    return {part: module for part, module in found.items() if module is not None}


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for m in (getattr(module, n, None) for n in names) if isinstance(m, nn.Module)), None)


def nested_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(part, module), largest first, so that the innermost wins: a Qwen-VL's connector lies inside its vision encoder."""
    found = parts(model)
    within = (getattr(model, "model", model), found["vision"])
    helpers = [getattr(module, name) for module in within for name in HELPERS if getattr(module, name, None) is not None]
    helpers = [m for h in helpers for m in (h if isinstance(h, nn.ModuleList) else [h])]  # a list is never called itself
    return sorted([*found.items(), *(("connector", h) for h in helpers)], key=lambda p: -len(list(p[1].modules())))


def owners(model: nn.Module) -> dict[nn.Module, str]:
    """The part that each module lies in, the innermost one: {module: part}; modules outside all parts are missing."""
    return {module: part for part, top in nested_parts(model) for module in top.modules()}


def part_of(model: nn.Module) -> dict[str, str]:
    """The part of each parameter: {name: "vision", "connector", "language", "head" or "other"}; tied weights count once.
    >>> sorted(set(part_of(model).values()))  # the head is tied to the token embeddings
    ['connector', 'language', 'vision']
    """
    owner = owners(model)
    return {name: owner.get(model.get_submodule(name.rpartition(".")[0]), "other") for name, _ in model.named_parameters()}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer that is called and has a weight of its own: without an output head tied to the
    token embeddings, and without `nn.MultiheadAttention.out_proj`, whose weight is read past it and which torch marks by a class.
    >>> [name for name, _ in linears(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
    ['0']
    """
    tied = set(tied_heads(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear) and name not in tied:
            yield name, module


def tied_heads(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weight is that of the token embeddings, too.
    >>> tied_heads(model)
    ['lm_head']
    """
    lookup = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in lookup]


def block_of(name: str) -> str:
    """The numbered block that a layer belongs to, or its own name.
    >>> block_of("language.layers.3.mlp.fc1")
    'language.layers.3'
    """
    return re.sub(r"(^|\.)(\d+)\..*", r"\1\2", name)


def clone(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy of the weights, but for `shared` ones, that shares the processor, which compression never touches.
    >>> clone(model).processor is model.processor
    True
    """
    processor = getattr(model, "processor", None)
    return copy.deepcopy(model, {id(each): each for each in (processor, *shared)})


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raises UserError for a model whose text goes through an encoder and a decoder (Florence-2)."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder, and only decoders are supported; give another model")


class VisionWithConnector(nn.Module):
    """Vision encoder and connector of a VLM: images (B, 3, H, W) to visual tokens (B, N, D), as the language model gets them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        found = parts(model)
        self.vision, self.connector = found["vision"], found["connector"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.connector(self.vision(pixel_values).last_hidden_state)


def layers(model: nn.Module, names: Sequence[str] = TOWERS) -> dict[str, nn.ModuleList]:
    """The transformer layers of "vision" and "language", or of `names`. UserError where one has none, and for an encoder-decoder.
    >>> len(layers(model)["language"]) == config_of(model, "language").num_hidden_layers
    True
    """
    refuse_encoder_decoder(model)
    found = {}
    for part in names:
        lists = [m for n, m in parts(model)[part].named_modules() if n.split(".")[-1] in LAYERS and isinstance(m, nn.ModuleList)]
        if not lists:
            raise UserError(f"{type(model).__name__}: no list of layers in its {part} part; give a transformer")
        found[part] = lists[0]
    return found


def ffn(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The matrices into a layer's FFN neurons (two where it is gated), and the one out of them. UserError where unknown.
    >>> len(ffn(layers(model)["language"][0])[0])
    2
    """
    held = _first(layer, ("mlp", "feed_forward")) or layer
    for into, out in FFN:
        if all(hasattr(held, n) for n in (*into, out)):
            return [getattr(held, n) for n in into], getattr(held, out)
    raise UserError(f"{type(held).__name__}: no {' or '.join(out for _, out in FFN)} in it; its neurons cannot be told")


def attention(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Query, key, value and output matrix of a layer's attention. UserError where they are not told apart.
    >>> [type(m).__name__ for m in attention(layers(model)["vision"][0])]
    ['Linear', 'Linear', 'Linear', 'Linear']
    """
    own = _first(layer, ("self_attn", "attn", "attention")) or layer
    out = next((getattr(own, n) for n in OUT if hasattr(own, n)), None)
    if out is None or not hasattr(own, "q_proj") or own.q_proj.out_features != out.in_features:  # Qwen3.5's also makes a gate
        raise UserError(f"{type(own).__name__}: no q_proj, k_proj, v_proj and o_proj of its heads alone; they cannot be told")
    return own.q_proj, own.k_proj, own.v_proj, out


def config_of(model_or_config: object, part: str) -> object:
    """The config of "vision" or "language" in a model's config.
    >>> config_of(model, "vision").image_size
    128
    """
    config = getattr(model_or_config, "config", model_or_config)
    return config.vision_config if part == "vision" else config.get_text_config()


def head_dim(model: nn.Module, part: str) -> int:
    """Width of one attention head.
    >>> head_dim(model, "language")
    64
    """
    config = config_of(model, part)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def checkpoint_with_config(model: nn.Module, config: object) -> nn.Module:
    """A new model of `config` with the weights of `model`, whose modules were cut: what `from_pretrained` would build.
    Raises UserError where a weight does not fit: then the config cannot say what was cut, and no checkpoint could be loaded.
    >>> checkpoint_with_config(model, model.config) is model
    False
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
