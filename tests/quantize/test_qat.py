"""Quantization-aware training: its gradients, its round trip into packed weights, and torchao's beside it."""

import copy
import math

import pytest
import torch
from test_groups import unpacked
from torch import nn

from mmrecipes import data, distill, evaluate, export, inference, models, quantize, train
from mmrecipes.errors import UserError
from mmrecipes.mini import curriculum
from mmrecipes.quantize.groups import fake_quantize
from mmrecipes.quantize.rounding import changed


def groups(bits, rows=40):
    """Weights (rows, 32) that reach past the last level, their scales (rows, 1), and a gradient from above."""
    noise, spread = torch.Generator().manual_seed(bits), 0.6 * 2 ** (bits - 1)
    scale = (0.5 + torch.rand(rows, 1, generator=noise)) * (1 - 2 * (torch.arange(rows) % 2)[:, None])  # of both signs
    return scale * spread * torch.randn(rows, 32, generator=noise), scale, torch.randn(rows, 32, generator=noise)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_is_plain_rounding_bit_for_bit(bits):
    w, scale, _ = groups(bits)
    assert torch.equal(quantize.fake_quantize_ste(w, scale, bits), fake_quantize(w, scale, bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_the_papers(bits):
    w, scale, above = groups(bits)
    w.requires_grad_()
    scale.requires_grad_()
    quantize.fake_quantize_ste(w, scale, bits).backward(above)
    low, high, v = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (w / scale).detach()
    inside = (v > low) & (v < high)
    assert torch.equal(w.grad != 0, inside)
    assert torch.allclose(w.grad, above * inside, atol=1e-6)
    step = torch.where(inside, v.round() - v, v.clamp(low, high))  # LSQ, equation 3
    assert torch.allclose(scale.grad, (above * step).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert not inside.all() and inside.any()  # else the test would prove less


def test_the_gradient_to_the_scale_is_the_slope_where_no_weight_changes_its_level():
    """Between two changes of a level the output is a whole number times the scale: a difference quotient tells its slope there.
    LSQ's gradient is that slope less the part of v that its straight-through rounding lets pass."""
    w, scale, above = (t.double() for t in groups(2, rows=200))
    scale.requires_grad_()
    quantize.fake_quantize_ste(w, scale, 2).backward(above)
    level, v = (w / scale).detach().round().clamp(-2, 1), (w / scale).detach()
    passed = torch.where((v > -2) & (v < 1), v, 0)
    with torch.no_grad():
        d = 1e-9
        slope = ((fake_quantize(w, scale + d, 2) - fake_quantize(w, scale - d, 2)) / (2 * d) * above).sum(1, keepdim=True)
    assert torch.allclose(slope, (above * level).sum(1, keepdim=True), atol=1e-4)
    assert torch.allclose(scale.grad, slope - (above * passed).sum(1, keepdim=True), atol=1e-4)


def test_scales_learn_in_sixteen_bits_with_lsq_s_factor_or_not_at_all():
    w, scale, above = groups(2)
    made = quantize.FakeQuantizer(scale, 2)
    made(w.requires_grad_()).backward(above)
    stored = scale.bfloat16().float().requires_grad_()
    quantize.fake_quantize_ste(w.detach(), stored, 2).backward(above)
    assert torch.allclose(made.scale.grad, stored.grad[:, 0] / math.sqrt(32), rtol=0.02, atol=1e-3)  # it comes in bfloat16
    assert torch.equal(made(w), fake_quantize(w.detach(), stored.detach(), 2))
    assert not quantize.FakeQuantizer(scale, 2, learned=False).scale.requires_grad


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_torchao_agrees_given_its_scales(bits):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    torch.manual_seed(0)
    first, x = nn.Sequential(nn.Linear(64, 48, bias=False)), torch.randn(16, 64)
    base = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32))
    theirs = copy.deepcopy(first)
    quantize_(theirs, QATConfig(base, step="prepare"))
    wanted = theirs(x)
    wanted.sum().backward()
    gradient = theirs[0].weight.grad.view(-1, 32)
    weight = first[0].weight.detach().clone().requires_grad_()
    rows = weight.view(-1, 32)
    scale = rows.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    v = (rows / scale).detach()
    tie = ((v - v.floor()) - 0.5).abs() < 1e-5  # the largest lies half-way between two levels: there a last bit decides
    ours = quantize.fake_quantize_ste(rows, scale, bits)
    (x @ ours.view_as(weight).T).sum().backward()
    top = 2 ** (bits - 1) - 1
    same = ~tie & (v <= top)  # behind the last level torchao's gradient passes as far as rounding leads back to it
    assert torch.allclose(weight.grad.view(-1, 32)[same], gradient[same], atol=1e-5)
    quantize_(theirs, QATConfig(base, step="convert"))
    assert torch.equal(theirs(x), wanted.detach())
    assert torch.allclose(theirs[0].weight.dequantize().view(-1, 32)[~tie], ours.detach()[~tie], atol=1e-6)


@pytest.fixture(scope="module")
def house():
    return models.load("mini-vlm")


@pytest.fixture(scope="module")
def trained(house):
    """Two steps at 3 bits on the scale of least error."""
    rounded = changed(house, dict.fromkeys(dict(models.linears(house)), 3), lambda w, b: quantize.search_round(w, b, 32))
    config = train.TrainConfig(2, 2, 0.01, 1e-2)
    batches = curriculum.chat_batches("qat", config, house.processor.tokenizer)
    return rounded, distill.qat(quantize.prepare_qat_(models.clone(rounded), 3), batches, config, house)


def test_what_was_trained_is_packed_bit_for_bit(trained):
    before, after = trained
    moved = 0
    for (_, old), (name, layer) in zip(models.linears(before), models.linears(after), strict=True):
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        assert quantize.on_grid(layer.weight, 3) and quantize.on_grid(layer.weight, 4), name
        wide = layer.in_features
        assert torch.equal(unpacked(*quantize.pack(layer.weight, 4), 4, wide), layer.weight), name
        moved += int((old.weight != layer.weight).sum())
    assert moved > 1e6


def test_two_bits_are_packed_bit_for_bit_and_run_in_onnx_runtime(house):
    import onnx
    import onnxruntime
    from onnx import helper

    layer = copy.deepcopy(house.model.text_model.layers[0].mlp.up_proj)
    weight = quantize.FakeQuantizer(quantize.group_scales(layer.weight, 2), 2)(layer.weight).detach()
    q, scales = quantize.pack(weight, 2)
    assert q.nbytes == weight.numel() // 4
    assert torch.equal(unpacked(q, scales, 2, layer.in_features), weight)
    options = {"K": layer.in_features, "N": layer.out_features, "bits": 2, "block_size": 32, "domain": "com.microsoft"}
    ends = [helper.make_tensor_value_info(n, 1, [None, k]) for n, k in (("x", layer.in_features), ("y", layer.out_features))]
    stored = [onnx.numpy_helper.from_array(q, "q"), onnx.numpy_helper.from_array(scales, "s")]
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], **options)], "g", *[[e] for e in ends], stored
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.allclose(found, x @ weight.T, atol=1e-4)


def test_the_trained_model_is_exported_and_answers_alike(trained, tmp_path):
    _, after = trained
    rows = data.questions("validation", 14)
    loaded = inference.load_exported(export.export(after, tmp_path / "mixed", "onnx", "mixed"))
    assert evaluate.vqa(loaded, rows, progress=False).right == evaluate.vqa(after, rows, progress=False).right


def test_a_part_alone_is_trained(house):
    prepared = quantize.prepare_qat_(models.clone(house), 2, only=("vision",))
    part = models.part_of(prepared)
    assert {part[n] for n, p in prepared.named_parameters() if p.requires_grad} == {"vision"}
    names = {n.split(".parametrizations")[0] for n, _ in prepared.named_parameters() if ".scale" in n}
    assert names == {n for n, _ in models.linears(house) if "vision_model" in n}
    left = quantize.convert_qat_(prepared)
    for (name, old), (_, new) in zip(models.linears(house), models.linears(left), strict=True):
        assert torch.equal(old.weight, new.weight) == ("vision_model" not in name)


def test_other_group_sizes_are_refused(house):
    odd = models.clone(house)
    layer = odd.model.text_model.layers[0].mlp.up_proj
    layer.in_features, layer.weight = 40, nn.Parameter(torch.zeros(layer.out_features, 40))
    with pytest.raises(UserError, match="do not divide into groups of 32"):
        quantize.prepare_qat_(odd, 2)
