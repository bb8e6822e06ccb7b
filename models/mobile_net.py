"""MobileNetV2 with a feature pyramid and a heatmap head: the light student, at any width.

The architecture is MoveNet's (Google, Apache 2.0): inverted residuals down to stride 32, then a
pyramid up to stride 4 whose maps the refiner reads, then one head. Source of the blocks:
Sandler et al., MobileNetV2, CVPR 2018.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from models.pose_features import PoseFeatures, PoseNetwork


@dataclasses.dataclass(frozen=True)
class MobileNetSize:
    """Channels and repeats; strides 2, 4, 8, 16, 32 are those of MobileNetV2."""

    stem: int
    channels: tuple[int, ...]
    """Output channels of the seven groups of inverted residuals."""
    repeats: tuple[int, ...]
    expansion: int
    last: int
    """Channels of the 1x1 convolution at stride 32."""
    pyramid: tuple[int, int, int]
    """Channels of the pyramid at strides 16, 8, 4."""
    head: int
    """Channels of the heatmap head."""


STRIDES = (1, 2, 2, 2, 1, 2, 1)
LATERAL_GROUPS = (1, 2, 3)
"""The groups whose outputs, at strides 4, 8 and 16, the pyramid takes."""

SIZES = {
    "tiny": MobileNetSize(
        stem=8,
        channels=(8, 12, 16, 24, 24, 32, 32),
        repeats=(1, 1, 1, 1, 1, 1, 1),
        expansion=2,
        last=48,
        pyramid=(24, 16, 16),
        head=24,
    ),
    "teacher": MobileNetSize(
        stem=16,
        channels=(16, 24, 48, 96, 96, 128, 128),
        repeats=(1, 1, 2, 2, 1, 1, 1),
        expansion=4,
        last=192,
        pyramid=(96, 64, 64),
        head=96,
    ),
}


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, if asked for, ReLU6; cell i lies over pixel stride * i."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.ReLU6(inplace=True)] if relu else []),
        )


class InvertedResidual(nn.Module):
    """Widens, filters each channel by itself, narrows; adds its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [ConvNorm(inputs, hidden, 1)]
        self.conv = nn.Sequential(
            *expand,
            ConvNorm(hidden, hidden, stride=stride, groups=hidden),
            ConvNorm(hidden, outputs, 1, relu=False),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class SeparableConv(nn.Sequential):
    """3x3 on each channel by itself, then 1x1 across them, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class MobileNet(PoseNetwork):
    """Heatmaps of ``num_joints`` joints and the pyramid that they came from."""

    def __init__(self, num_joints: int, size: MobileNetSize) -> None:
        super().__init__()
        self.pyramid_channels = size.pyramid
        self.stem = ConvNorm(3, size.stem, stride=2)
        self.groups = nn.ModuleList()
        inputs = size.stem
        for index, (outputs, repeats, stride) in enumerate(
            zip(size.channels, size.repeats, STRIDES, strict=True)
        ):
            expansion = 1 if index == 0 else size.expansion
            blocks = []
            for repeat in range(repeats):
                blocks.append(
                    InvertedResidual(
                        inputs, outputs, stride=stride if repeat == 0 else 1, expansion=expansion
                    )
                )
                inputs = outputs
            self.groups.append(nn.Sequential(*blocks))
        self.last = ConvNorm(inputs, size.last, 1)
        coarse, middle, fine = size.pyramid
        self.top = nn.Conv2d(size.last, coarse, 1)
        self.laterals = nn.ModuleList(
            nn.Conv2d(size.channels[group], channels, 1)
            for group, channels in zip(LATERAL_GROUPS, (fine, middle, coarse), strict=True)
        )
        self.smooth = nn.ModuleList(
            [SeparableConv(coarse, middle), SeparableConv(middle, fine), SeparableConv(fine, fine)]
        )
        self.head = SeparableConv(fine, size.head)
        self.final_layer = nn.Conv2d(size.head, num_joints, 1)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        assert self.final_layer.bias is not None
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, crops: Tensor) -> PoseFeatures:
        """Heatmaps (B, K, h/4, w/4) of normalised crops (B, 3, h, w); h and w divide by 32."""
        x = self.stem(crops)
        laterals: list[Tensor] = []
        for index, group in enumerate(self.groups):
            x = group(x)
            if index in LATERAL_GROUPS:
                laterals.append(self.laterals[len(laterals)](x))
        x = self.top(self.last(x))
        pyramid = []
        for lateral, smooth in zip(reversed(laterals), self.smooth, strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False) + lateral
            pyramid.append(x)
            x = smooth(x)
        return PoseFeatures(self.final_layer(self.head(x)), tuple(pyramid))
