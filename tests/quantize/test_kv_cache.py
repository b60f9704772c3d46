"""Quantized caches: how far a number may be off, what comes back exactly, and that a model reads them as any other cache."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrecipes import quantize
from mmrecipes.errors import UserError


def drawn(seed: int, tokens: int = 64, spread: float = 1.0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return spread * (torch.randn(1, 2, tokens, 64, generator=noise) + 3 * torch.randn(64, generator=noise))


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(derandomize=True, max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 1.0, 100.0]))
def test_every_number_is_within_half_a_step(bits, per, seed, spread):
    x = drawn(seed, spread=spread)
    found = quantize.quantize_cache(x, bits, per)
    groups = x.unflatten(-2, (-1, 32)) if per == "channel" else x.unflatten(-1, (-1, 32))
    off = (found.values() - x).abs().view(groups.shape)
    assert (off <= 0.5 * found.scale.float() * (1 + 1e-3)).all()
    # a step is what the group's range asks for, up to fp16's rounding of it and of the lowest value
    axis = -2 if per == "channel" else -1
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    exact = ((high - low) / (2**bits - 1)).clamp(min=2**-14)
    slack = 2**-9 * low.abs() / (2**bits - 1) + 1e-7
    assert (found.scale.float() <= 1.003 * exact + slack).all()
    assert found.nbytes == x.numel() * bits // 8 + 4 * x.numel() // 32


def test_a_constant_group_comes_back():
    x = torch.full((1, 1, 32, 32), 0.5)
    assert (quantize.quantize_cache(x, 2, "token").values() - x).abs().max() < 2**-10


@pytest.mark.parametrize(("bits", "per", "shape"), [(3, "token", (1, 1, 32, 32)), (4, "head", (1, 1, 32, 32))])
def test_what_does_not_exist_is_refused(bits, per, shape):
    with pytest.raises(UserError, match="expected 2, 4 or 8 bits"):
        quantize.quantize_cache(torch.zeros(shape), bits, per)


@pytest.mark.parametrize(("per", "shape"), [("channel", (1, 1, 31, 64)), ("token", (1, 1, 32, 40))])
def test_sizes_that_do_not_divide_are_refused(per, shape):
    with pytest.raises(UserError, match="does not divide into groups of 32"):
        quantize.quantize_cache(torch.zeros(shape), 4, per)


def config(layers: int = 2):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)


def test_bf16_numbers_come_back_exactly_at_16_bits():
    cache, x = quantize.quantized_cache(config(), 16), drawn(0).bfloat16().float()
    keys, values = cache.update(x, -x, 0)
    assert torch.equal(keys, x) and torch.equal(values, -x) and keys.dtype == torch.float32
    assert cache.layers[0].nbytes == 2 * 2 * x.numel()


def test_pieces_of_any_length_make_the_same_cache_and_the_newest_stay_exact():
    layer, other, x = quantize.QuantizedLayer(2), quantize.QuantizedLayer(2), drawn(1, 200)
    layer.update(x, -x)
    start = 0
    for end in (1, 33, 40, 161, 200):
        keys, values = other.update(x[..., start:end, :], -x[..., start:end, :])
        assert keys.shape[-2] == values.shape[-2] == other.get_seq_length() == end
        assert torch.equal(keys[..., start:, :], x[..., start:end, :])  # what is new is seen as it is
        start = end
    empty = x[..., :0, :]
    for one, two in zip(layer.update(empty, empty), other.update(empty, empty), strict=True):
        assert torch.equal(one, two)
    assert layer.keys.shape[-2] == 200 % 32 and torch.equal(other.keys, x[..., 192:, :])
    assert other.nbytes == layer.nbytes < 0.2 * 2 * x.nbytes + 2 * x[..., 192:, :].nbytes


@torch.no_grad()
def test_a_model_reads_it_and_eight_bits_change_little():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config()).eval()
    ids = torch.randint(0, 64, (1, 100))
    wanted = model(ids).logits[0, -1]
    for bits, most in ((16, 0.02), (8, 0.02), (2, 1.0)):
        cache = quantize.quantized_cache(model.config, bits)
        for piece in ids.split(17, 1):
            found = model(piece, past_key_values=cache, use_cache=True).logits[0, -1]
        assert cache.get_seq_length() == 100
        assert 0 < (found - wanted).norm() / wanted.norm() < most


def test_crop_goes_back_to_the_last_block_and_no_further():
    layer, x = quantize.QuantizedLayer(4), drawn(2, 70)
    layer.update(x, x)
    layer.crop(-4)
    assert layer.get_seq_length() == 66
    with pytest.raises(UserError, match="2 not quantized"):
        layer.crop(-3)


def test_layers_that_keep_something_else_are_refused():
    sliding = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(UserError, match="SlidingWindow"):
        quantize.quantized_cache(sliding)
