"""EfficientFormer-L1 (Li et al. 2022, arXiv:2206.01191), the published design in one page: 12.3 million parameters.

Convolutions with average pooling, to mix places, where maps are large; attention only in the last block, with 49 tokens left.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS, WIDTHS, ATTENTION_BLOCKS = (3, 2, 6, 3), (48, 96, 224, 448), 1  # L1; the blocks with attention end the last stage
HEADS, KEY, VALUE = 8, 32, 128  # attention: heads, and the width of each one's keys and values
STRIDE = 32  # px of an image's side for each place of the last stage


def conv(into: int, out: int, kernel: int, stride: int = 1, act: type[nn.Module] | None = None) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers = [nn.Conv2d(into, out, kernel, stride, kernel // 2), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Scale(nn.Module):
    """LayerScale: what a branch adds, channel by channel, and at first hardly anything."""

    def __init__(self, width: int, maps: bool):
        super().__init__()
        self.gamma, self.shape = nn.Parameter(torch.full((width,), 1e-5)), (-1, 1, 1) if maps else (-1,)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(self.shape)


class Pooling(nn.Module):
    """The mixing of places without a weight: how much the mean of 3 x 3 neighbours differs from oneself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


class Attention(nn.Module):
    """Self-attention of `side` x `side` tokens (B, N, C), with a learned bias for every distance (LeViT, 2104.01136)."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.qkv = nn.Linear(width, HEADS * (2 * KEY + VALUE))
        self.out = nn.Linear(HEADS * VALUE, width)
        places = list(itertools.product(range(side), range(side)))
        offsets = {}
        index = [[offsets.setdefault((abs(a - c), abs(b - d)), len(offsets)) for c, d in places] for a, b in places]
        self.bias = nn.Parameter(torch.zeros(HEADS, len(offsets)))
        self.register_buffer("index", torch.tensor(index))  # saved: a loader that makes models without memory leaves others unset

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).split([KEY, KEY, VALUE], -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.index].unsqueeze(0))
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`mix` mixes places, then the two-layer perceptron `mlp` works at every one; both are added to what comes in."""

    def __init__(self, mix: nn.Module, mlp: nn.Module):
        super().__init__()
        self.mix, self.mlp = mix, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.mlp(x)


def pooling_block(width: int) -> Block:
    """Block4D of the paper, on maps (B, C, H, W)."""
    mlp = nn.Sequential(conv(width, 4 * width, 1, act=nn.GELU), conv(4 * width, width, 1), Scale(width, True))
    return Block(nn.Sequential(Pooling(), Scale(width, True)), mlp)


def attention_block(width: int, side: int) -> Block:
    """Block3D of the paper, on `side` x `side` tokens (B, N, C)."""
    mix = nn.Sequential(nn.LayerNorm(width), Attention(width, side), Scale(width, False))
    layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return Block(mix, nn.Sequential(*layers, Scale(width, False)))


class EfficientFormer(nn.Module):
    """Images (B, 3, `size`, `size`) -> scores (B, classes), the mean of two heads: one was taught by labels, one by a teacher.

    `features` gives the maps of the stages. `size` is a multiple of 32, because the last stage knows its places.
    """

    def __init__(self, classes: int = 1000, size: int = 224):
        super().__init__()
        if size % STRIDE:
            raise ValueError(f"EfficientFormer: size is {size} px; it must be a multiple of {STRIDE}")
        self.stem = nn.Sequential(conv(3, WIDTHS[0] // 2, 3, 2, nn.ReLU), conv(WIDTHS[0] // 2, WIDTHS[0], 3, 2, nn.ReLU))
        self.down = nn.ModuleList([nn.Identity(), *(conv(a, b, 3, 2) for a, b in itertools.pairwise(WIDTHS))])
        self.stages = nn.ModuleList(nn.Sequential(*map(pooling_block, [w] * n)) for n, w in zip(DEPTHS, WIDTHS, strict=True))
        self.attention = nn.Sequential(*(attention_block(WIDTHS[-1], size // STRIDE) for _ in range(ATTENTION_BLOCKS)))
        self.norm = nn.LayerNorm(WIDTHS[-1])
        self.classes, self.distilled = nn.Linear(WIDTHS[-1], classes), nn.Linear(WIDTHS[-1], classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of (B, 48, H/4, W/4), (B, 96, H/8, W/8), (B, 224, H/16, W/16) and (B, 448, H/32, W/32)."""
        maps = [self.stem(x)]
        for down, stage in zip(self.down, self.stages, strict=True):
            maps.append(stage(down(maps[-1])))
        tokens = self.norm(self.attention(maps[-1].flatten(2).transpose(1, 2)))
        return [*maps[1:-1], tokens.transpose(1, 2).unflatten(2, maps[-1].shape[2:])]

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)[-1].mean((2, 3))
        return (self.classes(x) + self.distilled(x)) / 2
