"""The residual blocks of HRNet and SimpleBaseline, under the names that published weights have.

Source: He et al., CVPR 2016; a bottleneck's stride lies in its 3x3 convolution, as torchvision
has it.
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


Block = type[BasicBlock] | type[Bottleneck]


def residual_blocks(
    block: Block, inputs: int, width: int, count: int, stride: int = 1
) -> nn.Sequential:
    """So many blocks in a row, the first of which has the stride."""
    outputs = width * block.expansion
    rest = (block(outputs, width) for _ in range(count - 1))
    return nn.Sequential(block(inputs, width, stride), *rest)


def heatmap_layer(inputs: int, num_joints: int) -> nn.Conv2d:
    """The last layer, which puts out nearly nothing at first; its start is the official one.

    All other layers start as torch has it: in a short comparison, HRNet-W18 with AdamW learnt
    faster so than from the official normal of deviation 0.001.
    """
    layer = nn.Conv2d(inputs, num_joints, 1)
    nn.init.normal_(layer.weight, std=0.001)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    )
