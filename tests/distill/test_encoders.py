"""The encoders that transformers lacks: as large, and of the shapes, that their papers say; and they learn."""

from __future__ import annotations

import pytest
import torch

from mmrecipes.distill.encoders.efficientformer import Attention, EfficientFormer
from mmrecipes.distill.encoders.shufflenet import Block, ShuffleNetV2


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_shufflenet_is_as_large_as_published():
    model = ShuffleNetV2()
    assert round(parameters(model) / 1e6, 1) == 2.3  # table 8 of the paper, 1x
    assert parameters(model) == 2_278_604  # the reference implementation in torchvision
    blocks = [len(stage) for stage in model.stages]
    assert blocks == [4, 8, 4]


def test_efficientformer_is_as_large_as_published():
    model = EfficientFormer()
    assert round(parameters(model) / 1e6, 1) == 12.3  # table 1 of the paper, L1
    assert parameters(model) == 12_289_928  # its implementation in timm, with both heads
    assert [len(stage) for stage in model.stages] == [3, 2, 6, 3] and len(model.attention) == 1


@pytest.mark.parametrize(
    ("model", "widths", "strides"),
    [
        (ShuffleNetV2(), (116, 232, 464, 1024), (8, 16, 32, 32)),
        (EfficientFormer(), (48, 96, 224, 448), (4, 8, 16, 32)),
    ],
    ids=["shufflenet", "efficientformer"],
)
@torch.inference_mode()
def test_stages_have_the_published_shapes(model, widths, strides):
    model.eval()
    x = torch.randn(2, 3, 224, 224)
    assert [tuple(f.shape) for f in model.features(x)] == [
        (2, w, 224 // s, 224 // s) for w, s in zip(widths, strides, strict=True)
    ]
    assert model(x).shape == (2, 1000) and torch.isfinite(model(x)).all()


@torch.inference_mode()
def test_half_of_a_shuffle_blocks_channels_pass_by():
    block, x = Block(8, 8, 1).eval(), torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x)[:, ::2], x[:, :4])


@torch.inference_mode()
def test_efficientformers_attention_is_softmax_with_a_bias_for_each_distance():
    layer, x = Attention(24, 3), torch.randn(2, 9, 24)
    layer.bias.normal_()
    assert layer.bias.shape == (8, 9) and len(layer.index.unique()) == 9
    assert layer.index[0, 1] == layer.index[1, 0] == layer.index[4, 5], "one place to the side"
    q, k, v = layer.qkv(x).view(2, 9, 8, -1).transpose(1, 2).split([32, 32, 128], -1)
    attention = (q @ k.transpose(-1, -2) / 32**0.5 + layer.bias[:, layer.index]).softmax(-1)
    wanted = layer.out((attention @ v).transpose(1, 2).reshape(2, 9, -1))
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_efficientformer_knows_its_size():
    assert EfficientFormer(size=128).features(torch.randn(1, 3, 128, 128))[-1].shape == (1, 448, 4, 4)
    with pytest.raises(ValueError, match="200 px; it must be a multiple of 32"):
        EfficientFormer(size=200)


@pytest.mark.parametrize("make", [lambda: ShuffleNetV2(2), lambda: EfficientFormer(2, 64)], ids=["shufflenet", "efficientformer"])
def test_they_learn(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(8, 3, 64, 64)
    x[:4, 0] += 1
    wanted, stepper = torch.tensor([0] * 4 + [1] * 4), torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), wanted)
        losses.append(loss.item())
        loss.backward()
        stepper.step()
        stepper.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
