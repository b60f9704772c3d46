"""Static int8: observers against references, folding, and what PT2E and ONNX Runtime make of the house CNN and foreign ones."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmrecipes import data, models, quantize
from mmrecipes.data import scenes
from mmrecipes.errors import UserError
from mmrecipes.export import onnx as onnx_export
from mmrecipes.mini import cnn
from mmrecipes.mini.clevr import sort_of_clevr


@torch.library.custom_op("mmrecipes_test_static::clip6", mutates_args=())
def clip6(y: torch.Tensor) -> torch.Tensor:
    return y.clamp(0, 6)


OBSERVERS = sorted(quantize.OBSERVERS)
EXPLICIT, FOR_CPU = (onnx_export.StaticConfig(layers="all", explicit=e) for e in (True, False))
values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60).map(lambda v: torch.tensor(v, dtype=torch.float32))


def logits(model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return quantize.vision_output(model, x)


def moved(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def tower():
    from transformers import AutoModelForSemanticSegmentation

    path = models.data_dir() / "models" / "mini-cnn"
    return AutoModelForSemanticSegmentation.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def calibration():
    return cnn.images("calibration", 64)


@pytest.fixture(scope="module")
def floats(tower, calibration, tmp_path_factory):
    return onnx_export.vision_to_onnx(tower, calibration, tmp_path_factory.mktemp("onnx") / "float.onnx")


def share(run) -> float:
    """Percent of the objects of 150 test pictures that are named right."""
    right = cnn.named(run, [scenes.make_scene(s) for s in data.SPLITS["test"][:150]])
    return 100 * sum(right) / len(right)


# ---- histograms and observers


@given(values)
def test_every_range_lies_within_what_was_seen_and_zero_stays_zero(x):
    h = quantize.histogram(x)
    for name in OBSERVERS:
        low, high = quantize.OBSERVERS[name](h)
        assert min(h.low, 0) * 1.0001 <= low and high <= max(h.high, 0) * 1.0001
        for symmetric in (False, True):
            scale, zero, least, most = quantize.qparams(min(low, high), max(low, high), symmetric)
            assert scale > 0 and least <= zero <= most
            assert not quantize.fake_quantize_range(torch.zeros(3), min(low, high), max(low, high), symmetric).any()


@given(values)
def test_min_max_moves_nothing_further_than_half_a_scale(x):
    h = quantize.histogram(x)
    for symmetric in (False, True):
        scale = quantize.qparams(*quantize.minmax(h), symmetric)[0]
        gap = (quantize.fake_quantize_range(x, *quantize.minmax(h), symmetric) - x).abs().max().item()
        assert gap <= scale * 1.001 / (2 if symmetric else 1)  # affine: the zero point is rounded, too


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_constant_and_an_all_zero_tensor_have_a_range(name, value):
    x = torch.full((1000,), value)
    low, high = quantize.OBSERVERS[name](quantize.histogram(x))
    assert torch.allclose(quantize.fake_quantize_range(x, low, high), x, rtol=0.01)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="finite"):
        quantize.histogram(torch.tensor([1.0, bad]))
    with pytest.raises(UserError, match="none"):
        quantize.histogram(torch.empty(0))
    with pytest.raises(UserError, match="range"):
        quantize.qparams(0, bad)
    with pytest.raises(UserError, match="range"):
        quantize.qparams(2, 1)


@pytest.mark.parametrize("keep", [90, 99, 99.9])
def test_percentile_is_that_of_numpy(keep):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    low, high = quantize.percentile(quantize.histogram(x), keep)
    wanted = np.percentile(x.numpy(), [(100 - keep) / 2, 100 - (100 - keep) / 2])
    assert np.allclose([low, high], wanted, atol=0.02)


def samples() -> dict[str, torch.Tensor]:
    """Distributions as layers have them: a bell, one side of it, a bell with few far outliers."""
    g = torch.Generator().manual_seed(0)
    bell = torch.randn(100_000, generator=g)
    return {"bell": bell, "relu": bell.relu(), "outliers": torch.cat([bell, 40 * torch.randn(20, generator=g)])}


@pytest.mark.parametrize("name", samples())
def test_mse_is_no_worse_than_torchaos_histogram_observer(name):
    from torchao.quantization.pt2e import HistogramObserver

    x = samples()[name]
    theirs = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    theirs(x)
    scale, zero = theirs.calculate_qparams()
    library = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), 0, 255)
    ours = quantize.fake_quantize_range(x, *quantize.mse(quantize.histogram(x)))
    everything = quantize.fake_quantize_range(x, *quantize.minmax(quantize.histogram(x)))
    assert (ours - x).square().mean() <= 1.1 * (library - x).square().mean()
    assert (ours - x).square().mean() <= 1.001 * (everything - x).square().mean()


@pytest.mark.parametrize("name", ["bell", "outliers"])
def test_entropy_agrees_with_onnx_runtimes(name):
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = samples()[name]
    m = x.abs().max().item()
    counts, edges = np.histogram(x.numpy(), 1023, (-m, m))
    counts[511] = counts[512]  # their zero counts, ours does not
    h = quantize.Histogram(counts.astype(float), x.min().item(), x.max().item())
    collector = HistogramCollector("entropy", True, 1023, 255, 99.99, "same")  # 255: both sides of zero
    told = (counts, edges.astype(np.float32), np.float32(h.low), np.float32(h.high))
    fewer, more = (float(collector.get_entropy_threshold(told, levels)[1]) for levels in (127, 255))
    found = quantize.entropy(h, step=1)[1]
    assert 0.95 * fewer <= found <= 1.05 * more < 1.05 * h.high  # theirs puts what does not divide into the last level


def test_outliers_are_clipped_by_all_but_min_max():
    h = quantize.histogram(samples()["outliers"])
    reach = {name: max(np.abs(quantize.OBSERVERS[name](h))) for name in OBSERVERS}
    assert reach["min-max"] > 40
    assert all(reach[name] < 0.9 * reach["min-max"] for name in OBSERVERS if name != "min-max")


def test_histograms_of_batches_are_those_of_the_whole(tower, calibration):
    one, many = (quantize.histograms(tower, calibration[:8], batch) for batch in (8, 3))
    for name in one:
        assert np.isclose(one[name].counts.sum(), many[name].counts.sum())
        assert np.allclose([one[name].low, one[name].high], [many[name].low, many[name].high], rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="images"):
        quantize.histograms(tower, calibration[:0])


# ---- folding


def test_folding_is_that_of_the_library_and_changes_nothing(tower, calibration):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    folded = quantize.fold_batch_norms(tower, calibration[:2])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in tower.modules()), "the model itself stays as it is"
    assert moved(logits(folded, calibration[:4]), logits(tower, calibration[:4])) < 1e-5
    stem, small = tower.mobilenet_v2.conv_stem.conv_3x3, folded.mobilenet_v2.conv_stem.conv_3x3
    theirs = fuse_conv_bn_eval(stem.convolution, stem.normalization)
    assert torch.allclose(theirs.weight, small.convolution.weight, atol=1e-6)
    assert torch.allclose(theirs.bias, small.convolution.bias, atol=1e-6)


class Twice(nn.Module):
    """The convolution's output is used beside its batch norm: folding would change it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.running_mean, 2.0)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_a_convolution_that_is_used_twice_is_not_folded():
    with pytest.raises(UserError, match="beside"):
        quantize.fold_batch_norms(Twice(), torch.randn(2, 3, 8, 8))


# ---- models


def foreign(kind: str) -> nn.Module:
    """A tiny random CNN of the library that nothing here was fitted to, with batch norms that have seen something."""
    import transformers as tf

    torch.manual_seed(0)
    model = {
        "resnet": lambda: tf.ResNetModel(
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        # its head is a linear layer on two axes, which is exported as a Gemm
        "resnet with a head": lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=12)
        ),
        "regnet": lambda: tf.RegNetModel(tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)),
    }[kind]()
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("kind", ["resnet", "resnet with a head", "regnet"])
def test_foreign_cnns_go_through_everything(kind, tmp_path):
    model, x = foreign(kind), torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    wanted = logits(model, x)
    folded = quantize.fold_batch_norms(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert moved(logits(folded, x), wanted) < 1e-4
    simulated = quantize.simulate_static(folded, quantize.ranges(quantize.histograms(folded, x), "min-max"))
    assert 0 < moved(logits(simulated, x), wanted) < 0.1
    assert moved(logits(quantize.pt2e(model, x), x), wanted) < 0.15
    graph = onnx_export.vision_to_onnx(model, x, tmp_path / "float.onnx")
    path = onnx_export.static_int8(graph, [x], tmp_path / "int8.onnx", EXPLICIT)
    assert onnx_export.check_explicit_int8(path)["layers"] > 3
    # as written: the kernels of a CPU without VNNI saturate on 8-bit weights, which the other file avoids
    assert moved(onnx_export.tensor_session(path, as_written=True)(x), wanted) < 0.1
    for_the_cpu = onnx_export.static_int8(graph, [x], tmp_path / "uint8.onnx", FOR_CPU)
    assert moved(onnx_export.tensor_session(for_the_cpu)(x), wanted) < 0.1


def test_pt2e_and_qdq_keep_the_house_cnns_accuracy(tower, calibration, floats, tmp_path):
    base = share(lambda x: logits(tower, x))
    assert base > 90
    assert moved(onnx_export.tensor_session(floats)(calibration[:4]), logits(tower, calibration[:4])) < 1e-4
    graph = quantize.pt2e(tower, calibration)
    assert share(lambda x: logits(graph, x)) > base - 2.5
    for config in (EXPLICIT, FOR_CPU):
        path = onnx_export.static_int8(floats, calibration.split(32), tmp_path / "int8.onnx", config)
        assert path.stat().st_size < 0.5 * floats.stat().st_size
        assert share(onnx_export.tensor_session(path)) > base - 2.5


def test_a_scale_a_tensor_leaves_a_larger_error_of_the_weights_than_one_a_channel(tower, calibration):
    folded = quantize.fold_batch_norms(tower, calibration[:2])
    chosen = quantize.ranges(quantize.histograms(folded, calibration[:2]))
    for name in chosen:
        weight = folded.get_submodule(name).weight
        channel, tensor = (
            quantize.simulate_static(folded, chosen, per).get_submodule(name).weight for per in ("channel", "tensor")
        )
        assert 0 < (channel - weight).norm() <= 1.01 * (tensor - weight).norm() < 0.1 * weight.norm()
        if name.endswith("layer.8.conv_3x3.convolution"):
            break


def test_entropy_fails_on_spikes_and_not_on_what_is_smooth():
    """The failure that notebook 12 shows."""
    g = torch.Generator().manual_seed(0)
    spikes = torch.tensor([0.1, 0.3, 0.7, 1.1])[torch.randint(4, (200_000,), generator=g)]
    h = quantize.histogram(torch.cat([spikes, 6 * torch.rand(20_000, generator=g)]))
    smooth = h._replace(counts=np.convolve(h.counts, np.ones(129) / 129, "same"))
    assert quantize.entropy(h)[1] < 0.5 * quantize.entropy(smooth)[1]


@pytest.mark.parametrize("what", ["a group norm", "an operator"])
def test_the_doctor_finds_what_resists_in_a_plain_tower(what, calibration):
    from mmrecipes.report import doctor

    class Odd(nn.Module):
        def forward(self, y):
            return torch.ops.mmrecipes_test_static.clip6(y)

    odd = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8) if what == "a group norm" else Odd())
    (found,) = doctor.resists(odd, calibration[:1])
    assert ("GroupNorm" if what == "a group norm" else "clip6") in found.what + found.where
    assert not doctor.resists(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), calibration[:1])


# ---- files


def test_the_check_accepts_what_tensorrt_takes_and_refuses_the_rest(floats, calibration, tmp_path):
    good = onnx_export.static_int8(floats, [calibration[:4]], tmp_path / "good.onnx", EXPLICIT)
    found = onnx_export.check_explicit_int8(good)
    assert found["layers"] > 20 and found["dequantize"] >= found["quantize"] > 20
    affine = onnx_export.static_int8(floats, [calibration[:4]], tmp_path / "affine.onnx", FOR_CPU)
    with pytest.raises(UserError, match=r"INT32|zero point"):
        onnx_export.check_explicit_int8(affine)
    with pytest.raises(UserError, match="no layer"):
        onnx_export.check_explicit_int8(floats)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UserError, match="not an ONNX file"):
        onnx_export.check_explicit_int8(tmp_path / "text.onnx")


@pytest.fixture(scope="module")
def explicit(floats, calibration, tmp_path_factory):
    return onnx_export.static_int8(floats, [calibration[:2]], tmp_path_factory.mktemp("onnx") / "good.onnx", EXPLICIT)


def broken(good, out, change):
    """A copy of a QDQ file with one thing changed in its graph."""
    import onnx

    file = onnx.load(str(good))
    change(file.graph, {t.name: t for t in file.graph.initializer})
    onnx.save(file, str(out))
    return out


def _zero_point(graph, constant):
    import onnx

    node = next(n for n in graph.node if n.op_type == "QuantizeLinear")
    constant[node.input[2]].CopyFrom(onnx.numpy_helper.from_array(np.array(7, np.int8), node.input[2]))


def _half(graph, constant):
    conv = next(n for n in graph.node if n.op_type == "Conv")
    conv.input[0] = next(n for n in graph.node if conv.input[0] in n.output).input[0]


def _no_zero_point(graph, constant):
    del next(n for n in graph.node if n.op_type == "QuantizeLinear").input[2:]


def _axis(graph, constant):
    for n in graph.node:
        for a in n.attribute:
            if n.op_type == "DequantizeLinear" and a.name == "axis":
                a.i = 1


def _scales(graph, constant):
    import onnx

    node = next(n for n in graph.node if n.op_type == "QuantizeLinear")
    constant[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), node.input[1]))


def _operator(graph, constant):
    next(n for n in graph.node if n.op_type == "Conv").op_type = "ConvInteger"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_zero_point, "zero point"),
        (_half, "one quantized input"),
        (_no_zero_point, "uint8"),
        (_axis, "output channel"),
        (_scales, "several scales"),
        (_operator, "operator of ONNX Runtime"),
    ],
)
def test_every_rule_of_the_check_bites(change, words, explicit, tmp_path):
    with pytest.raises(UserError, match=words):
        onnx_export.check_explicit_int8(broken(explicit, tmp_path / "bad.onnx", change))


def test_nothing_half_written_is_left_and_logging_is_as_before(tower, floats, calibration, tmp_path):
    level = logging.getLogger().level
    with pytest.raises(UserError, match="method"):
        onnx_export.static_int8(floats, [calibration], tmp_path / "a.onnx", onnx_export.StaticConfig("Best"))
    with pytest.raises(UserError, match="none, or not all finite"):
        quantize.histograms(tower, calibration[:1] * torch.nan)
    (tmp_path / "a.onnx").write_text("older")
    with pytest.raises(UserError, match="cannot write"):  # a folder that is missing is made; this one cannot be
        onnx_export.vision_to_onnx(tower, calibration, tmp_path / "a.onnx" / "folder" / "b.onnx")
    with pytest.raises(UserError, match="not an ONNX file"):
        onnx_export.static_int8(tmp_path / "a.onnx", [calibration], tmp_path / "a.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"] and (tmp_path / "a.onnx").read_text() == "older"
    assert logging.getLogger().level == level
    with pytest.raises(UserError, match="cannot load"):
        onnx_export.tensor_session(tmp_path / "a.onnx")


def test_the_wrong_domain_gives_other_ranges(tower, calibration):
    strange = [sort_of_clevr(seed)[0] for seed in range(4)]
    x = cnn.make_image_processor()(strange, return_tensors="pt")["pixel_values"]
    assert x.shape[1:] == (3, 128, 128)
    real, other = (quantize.ranges(quantize.histograms(tower, p), "min-max") for p in (calibration[:4], x))
    assert any(other[n][1] < 0.9 * real[n][1] for n in real)
