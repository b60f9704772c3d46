"""The gated delta rule of hybrid decoders in one formula: as transformers computes it, token by token and chunk by chunk."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5 as source

from mmrecipes.families import gated_delta
from tests import families

HEADS, KEY, VALUE = 3, 16, 24


def drawn(length: int, alike: bool = False) -> list[torch.Tensor]:
    """query, key, value, decay, beta and a state for two rows. `alike`: keys nearly the same, written whole and kept, where
    powers of the system that is solved grow beyond float32."""
    draw = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(2, length, HEADS, width, generator=draw) for width in (KEY, VALUE))
    query = torch.randn(2, length, HEADS, KEY, generator=draw)
    decay, beta = (torch.rand(2, length, HEADS, generator=draw) for _ in range(2))
    if alike:
        keys, decay, beta = keys[:, :1] + 0.01 * keys, 1e-3 * decay, 1 - 0.01 * beta
    return [query, keys, values, -decay, beta, torch.randn(2, HEADS, KEY, VALUE, generator=draw)]


def found_by(given: list[torch.Tensor], piece: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `chunk` makes of them, `piece` tokens at a time, as transformers lays it out."""
    query, key, value, decay, beta, state = given
    query, key = source.l2norm(query) * KEY**-0.5, source.l2norm(key)
    outs = []
    for start in range(0, query.shape[1], piece):
        part = [x[:, start : start + piece].transpose(1, 2) for x in (query, key, value, decay, beta)]
        out, state = gated_delta.chunk(*part, state)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1), state


def wanted_by(rule, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, decay, beta, state = given
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return rule(query, key, value, g=decay, beta=beta, **options)


def assert_close(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() / y.norm() < 1e-5


@pytest.mark.parametrize("alike", [False, True], ids=["any keys", "keys alike"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 33, 63, 64])
def test_one_formula_is_the_recurrence(length, alike):
    given = drawn(length, alike)
    assert_close(found_by(given, gated_delta.CHUNK), wanted_by(source.torch_recurrent_gated_delta_rule, given))


@pytest.mark.parametrize("piece", [5, 64])
def test_pieces_are_the_whole(piece):
    given = drawn(150)
    assert_close(found_by(given, piece), wanted_by(source.torch_chunk_gated_delta_rule, given))


@torch.no_grad()
def test_a_layer_with_its_states():
    """A prompt, then one token: as the layer itself, whose states begin where they are not."""
    model = families.load("qwen3_5").model.language_model
    layer, draw = model.layers[0].linear_attn, torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, model.config.hidden_size, generator=draw)
    own, ours = (DynamicCache(config=model.config) for _ in range(2))
    states = ours.layers[layer.layer_idx]
    states.conv_states[0] = torch.zeros(2, layer.conv_dim, layer.conv_kernel_size)
    states.recurrent_states[0] = torch.zeros(2, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    for tokens in (hidden[:, :2], hidden[:, 2:8], hidden[:, 8:]):
        wanted, found = layer(tokens, cache_params=own), gated_delta.forward(layer, tokens, cache_params=ours)
        assert_close([found], [wanted])
    kept = own.layers[layer.layer_idx]
    assert_close([states.conv_states[0], states.recurrent_states[0]], [kept.conv_states[0], kept.recurrent_states[0]])
