"""Rounding, real int8, pruning: bounds on the arithmetic, on any tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrecipes import measure, models, prune, quantize, report
from mmrecipes.errors import ParityError, UserError
from mmrecipes.mini.model import make_model, make_processor

BITS = st.integers(2, 8)
PER = st.sampled_from(["tensor", "channel", "group"])


@pytest.fixture(scope="module")
def tiny():
    processor = make_processor()
    model = make_model(processor.tokenizer, width=128, vision_layers=1, language_layers=1).eval()
    model.processor = processor
    return model


@pytest.fixture(scope="module")
def inputs(tiny):
    from mmrecipes.data import scenes

    return models.chat(tiny, scenes.render(scenes.make_scene(1)), "What colour is the circle?")


@given(st.integers(0, 10**6), BITS, PER, st.floats(1e-4, 1e4))
def test_rounding_errs_by_half_a_step_scales_along_and_settles(seed, bits, per, factor):
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    r = quantize.round_to_nearest(w, bits, per)
    rows = {"tensor": (1, -1), "channel": (6, -1), "group": (-1, 32)}[per]
    step = w.reshape(rows).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((w.reshape(rows) - r.reshape(rows)).abs() <= step / 2 * 1.001).all()
    assert torch.allclose(quantize.round_to_nearest(r, bits, per), r, atol=1e-6)
    assert torch.allclose(
        quantize.round_to_nearest(w * factor, bits, per), r * factor, rtol=1e-3, atol=factor * step.max().item() * 1e-4
    )
    assert len(r.reshape(rows)[0].unique()) <= 2**bits


@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_zero_stays_zero(per):
    w = torch.zeros(4, 64)
    assert torch.equal(quantize.round_to_nearest(w, 4, per), w)
    w[0, 0] = 3.0
    assert torch.equal(quantize.round_to_nearest(w, 4, per), w)


@pytest.mark.parametrize(("w", "kw", "match"), [
    (torch.ones(2, 40), {"bits": 4, "per": "group"}, "40 inputs do not divide into groups of 32"),
    (torch.full((2, 32), float("nan")), {"bits": 4}, "not finite"),
    (torch.ones(2, 32), {"bits": 1}, "1 bits; expected 2 to 8"),
    (torch.ones(2, 32), {"bits": 4, "per": "row"}, "'row'; expected"),
])  # fmt: skip
def test_bad_requests(w, kw, match):
    with pytest.raises(UserError, match=match):
        quantize.round_to_nearest(w, **kw)


def test_finer_groups_and_more_bits_err_less():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    w[:, 3] *= 20  # an outlier input
    err = {
        (b, p): (quantize.round_to_nearest(w, b, p) - w).norm().item() for b in (2, 4, 8) for p in ("tensor", "channel", "group")
    }
    for b in (2, 4, 8):
        assert err[b, "group"] < err[b, "channel"] <= err[b, "tensor"]
    assert err[8, "tensor"] < err[4, "tensor"] < err[2, "tensor"]


def test_copies_leave_the_parent_alone(tiny, inputs):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    for smaller in (quantize.simulate(tiny, 2), quantize.dynamic_int8(tiny), quantize.bf16(tiny), prune.magnitude(tiny, 0.7)):
        assert smaller.processor is tiny.processor
        logits = smaller(**measure.cast(smaller, inputs)).logits
        assert torch.isfinite(logits).all()
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_real_int8_computes_what_its_simulation_does(tiny, inputs):
    int8 = quantize.dynamic_int8(tiny)
    assert report.check_parity(int8, quantize.simulate_dynamic_int8(tiny), [inputs]) < 0.05
    with pytest.raises(ParityError, match="broken, not lossy"):
        report.check_parity(int8, quantize.simulate(tiny, 2, "tensor"), [inputs], tolerance=0.05)
    names = {type(m).__module__ for _, m in int8.named_modules()}
    assert any("quantized.dynamic" in n for n in names)
    with pytest.raises(UserError, match="starts from float32"):
        quantize.dynamic_int8(quantize.bf16(tiny))


def test_the_tied_head_is_left_alone(tiny):
    assert "lm_head" not in dict(models.linears(tiny))
    assert quantize.dynamic_int8(tiny).lm_head.weight.data_ptr() != 0


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_magnitude_zeroes_that_share_and_the_smallest(tiny, sparsity):
    thin = prune.magnitude(tiny, sparsity)
    for (_, old), (_, new) in zip(models.linears(tiny), models.linears(thin), strict=True):
        gone = new.weight == 0
        assert gone.float().mean().item() == pytest.approx(sparsity, abs=0.01)
        if gone.any():
            assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
    with pytest.raises(UserError, match="sparsity is 1"):
        prune.magnitude(tiny, 1)


def test_packed_bytes_counts_bits_and_scales(tiny):
    linear = sum(m.weight.numel() for _, m in models.linears(tiny))
    rest = 2 * (sum(p.numel() for p in tiny.parameters()) - linear)
    assert quantize.packed_bytes(tiny, 4, "group", 32) == linear // 2 + 2 * linear // 32 + rest


def test_attention_that_reads_its_weight_past_the_layer_stays_in_float():
    class Resampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    model, x = Resampler().eval(), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    small = quantize.dynamic_int8(model)
    assert "quantized" in type(small.out).__module__ and "quantized" not in type(small.attention.out_proj).__module__
    with torch.no_grad():
        assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
