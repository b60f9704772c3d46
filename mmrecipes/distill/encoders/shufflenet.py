"""ShuffleNet V2 1.0x (Ma et al. 2018, arXiv:1807.11164), the published design in one page: 2.3 million parameters.

Half of a block's channels pass by untouched, the other half is convolved, and a shuffle mixes the two for the next block.
"""

import torch
from torch import Tensor, nn

STAGES = ((4, 116), (8, 232), (4, 464))  # blocks and channels of stages 2, 3 and 4, table 5 of the paper, 1x
STEM, TOP = 24, 1024  # channels of the first convolution and of the last


def conv(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution, batch norm, and a ReLU but after depthwise ones."""
    layers = [nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * relu)


class Block(nn.Module):
    """Figure 3 (c), or (d) with stride 2, where both halves see all channels and each is made half of the output."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        half = out // 2
        begin = half if stride == 1 else into
        self.stride = stride
        self.right = nn.Sequential(conv(begin, half, 1), conv(half, half, 3, stride, half, relu=False), conv(half, half, 1))
        self.left = nn.Identity()
        if stride == 2:
            self.left = nn.Sequential(conv(into, into, 3, 2, into, relu=False), conv(into, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.stride == 1 else (x, x)
        x = torch.cat([self.left(left), self.right(right)], 1)
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # the shuffle: one channel of each half in turn


class ShuffleNetV2(nn.Module):
    """Images (B, 3, H, W) -> scores (B, classes); `features` gives the maps of the stages."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(conv(3, STEM, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.stages, into = nn.ModuleList(), STEM
        for blocks, out in STAGES:
            self.stages.append(nn.Sequential(Block(into, out, 2), *(Block(out, out, 1) for _ in range(blocks - 1))))
            into = out
        self.top = conv(into, TOP, 1)
        self.classes = nn.Linear(TOP, classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of (B, 116, H/8, W/8), (B, 232, H/16, W/16), (B, 464, H/32, W/32) and (B, 1024, H/32, W/32)."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [*maps[1:], self.top(maps[-1])]

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.features(x)[-1].mean((2, 3)))
