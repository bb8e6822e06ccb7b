"""MobileNetV2 with a feature pyramid and a heatmap head: the light student, at any width.

The architecture is MoveNet's (Google, Apache 2.0): inverted residuals down to stride 32, then a
pyramid up to stride 4, which the refiner reads, then one head. Source of the blocks: Sandler et
al., MobileNetV2, CVPR 2018. The sizes ``lightning`` and ``thunder`` are MoveNet itself, and
``movenet_weights.py`` loads its weights.
"""

from __future__ import annotations

import dataclasses
import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.pose_features import IMAGENET, MOVENET, PersonMaps, PoseFeatures, PoseNetwork


@dataclasses.dataclass(frozen=True)
class MobileNetSize:
    """Channels and numbers of blocks; the strides are those of MobileNetV2."""

    stem: int
    """Output channels of the first convolution."""
    channels: tuple[int, ...]
    """Output channels of the seven groups of inverted residuals."""
    repeats: tuple[int, ...]
    """Blocks of each group. A group of stride 1 may have none; its channels must then be those of
    the group before."""
    expansion: int
    """Ratio of an inverted residual's inner channels to its input channels."""
    last: int
    """Channels of the 1x1 convolution at stride 32."""
    pyramid: tuple[int, int, int]
    """Channels of the pyramid at strides 16, 8, 4."""
    head: int
    """Channels of the heatmap head."""
    folded: bool = False
    """As in MoveNet's files: biases in place of batch norms, TensorFlow's padding, and a sigmoid
    on the heatmaps. Without batch norms it trains badly from random weights, so load MoveNet's."""


STRIDES = (1, 2, 2, 2, 1, 2, 1)
LATERAL_GROUPS = (1, 2, 3)
"""Groups whose outputs, at strides 4, 8 and 16, feed the pyramid."""

SIZES = {
    # tiny: for training on small crops, where calling a layer costs as much as its arithmetic.
    # So it has one block per stride, and most channels in the stem and at stride 4, which raised
    # accuracy on the synthetic people most (tests/benchmarks/student_shapes.py).
    "tiny": MobileNetSize(
        stem=16,
        channels=(16, 12, 16, 32, 32, 48, 48),
        repeats=(0, 1, 1, 1, 0, 1, 0),
        expansion=2,
        last=64,
        pyramid=(32, 32, 32),
        head=32,
    ),
    # small, medium, large: students for deployment, chosen by tests/benchmarks/models.py --shapes
    # among eight shapes with equal numbers of parameters (deep or shallow; expansion 6, 4 or 3;
    # channels that grow evenly or late). Late channels, expansion 4 and few blocks at fine strides
    # were fastest, within noise: 0.32, 0.48 and 0.70 of lightning's time on single crops, about
    # three quarters of what MobileNetV2's proportions take. Accuracy was not compared.
    "small": MobileNetSize(
        stem=16,
        channels=(8, 8, 16, 32, 48, 80, 112),
        repeats=(1, 1, 1, 2, 2, 3, 1),
        expansion=4,
        last=208,
        pyramid=(32, 24, 24),
        head=48,
    ),
    "medium": MobileNetSize(
        stem=24,
        channels=(16, 16, 32, 64, 88, 152, 208),
        repeats=(1, 1, 1, 2, 2, 3, 1),
        expansion=4,
        last=392,
        pyramid=(48, 32, 24),
        head=64,
    ),
    "large": MobileNetSize(
        stem=40,
        channels=(16, 32, 48, 96, 136, 240, 312),
        repeats=(1, 1, 1, 2, 2, 3, 1),
        expansion=4,
        last=592,
        pyramid=(64, 32, 24),
        head=96,
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
    "lightning": MobileNetSize(
        stem=32,
        channels=(16, 24, 32, 64, 96, 160, 320),
        repeats=(1, 2, 3, 4, 3, 3, 1),
        expansion=6,
        last=1280,
        pyramid=(64, 32, 24),
        head=96,
        folded=True,
    ),
    "thunder": MobileNetSize(
        stem=56,
        channels=(32, 40, 56, 112, 168, 280, 560),
        repeats=(1, 2, 3, 4, 3, 3, 1),
        expansion=6,
        last=1280,
        pyramid=(64, 32, 24),
        head=96,
        folded=True,
    ),
}
FIRST_HEIGHT = 0.01
"""Value of all heatmap cells before training, if a sigmoid computes them."""


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and optional ReLU6; cell i is centered on pixel stride * i.

    If folded, a bias replaces the batch norm, and a stride of 2 pads as TensorFlow does on even
    sides, by one pixel at the end only: there cell i is centered on pixel 2 * i + 1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
        folded: bool = False,
    ) -> None:
        pads_after = folded and stride == 2
        padding = 0 if pads_after else kernel // 2
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=folded),
            *([] if folded else [nn.BatchNorm2d(outputs)]),
            *([nn.ReLU6()] if relu else []),
        )
        self.pads_after = pads_after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(F.pad(x, (0, 1, 0, 1)) if self.pads_after else x)
        return out


class InvertedResidual(nn.Module):
    """Widens, filters each channel separately, narrows; adds its input if the shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, expansion: int, folded: bool = False
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [ConvNorm(inputs, hidden, 1, folded=folded)]
        self.conv = nn.Sequential(
            *expand,
            ConvNorm(hidden, hidden, stride=stride, groups=hidden, folded=folded),
            ConvNorm(hidden, outputs, 1, relu=False, folded=folded),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class SeparableConv(nn.Sequential):
    """Depthwise 3x3 convolution, 1x1 convolution, batch norm (if folded, a bias), ReLU."""

    def __init__(self, inputs: int, outputs: int, *, folded: bool = False) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=folded),
            *([] if folded else [nn.BatchNorm2d(outputs)]),
            nn.ReLU(inplace=True),
        )


class PersonHeads(nn.Module):
    """MoveNet's further heads, which separate one person's joints from another's."""

    def __init__(self, inputs: int, hidden: int, num_joints: int) -> None:
        super().__init__()
        self.center, self.regression, self.offsets = (
            nn.Sequential(SeparableConv(inputs, hidden, folded=True), nn.Conv2d(hidden, maps, 1))
            for maps in (1, 2 * num_joints, 2 * num_joints)
        )

    def forward(self, features: Tensor) -> PersonMaps:
        return PersonMaps(self.center(features), self.regression(features), self.offsets(features))


class MobileNet(PoseNetwork):
    """Predicts heatmaps of ``num_joints`` joints from a feature pyramid."""

    def __init__(
        self, num_joints: int, size: MobileNetSize, *, has_person_heads: bool = False
    ) -> None:
        """Build the network with random weights.

        Args:
            num_joints: K.
            size: its channels and blocks.
            has_person_heads: add the heads that the codec movenet needs.
        """
        super().__init__()
        self.pyramid_channels = size.pyramid
        self.pixels = MOVENET if size.folded else IMAGENET
        self.is_folded = size.folded
        self.stem = ConvNorm(3, size.stem, stride=2, folded=size.folded)
        self.groups = _groups(size)
        self.last = ConvNorm(size.channels[-1], size.last, 1, folded=size.folded)
        coarse, middle, fine = size.pyramid
        self.top = nn.Conv2d(size.last, coarse, 1)
        self.laterals = nn.ModuleList(
            nn.Conv2d(size.channels[group], channels, 1)
            for group, channels in zip(LATERAL_GROUPS, (fine, middle, coarse), strict=True)
        )
        self.smooth = nn.ModuleList(
            SeparableConv(inputs, outputs, folded=size.folded)
            for inputs, outputs in ((coarse, middle), (middle, fine), (fine, fine))
        )
        self.head = SeparableConv(fine, size.head, folded=size.folded)
        self.final_layer = nn.Conv2d(size.head, num_joints, 1)
        self.person = PersonHeads(fine, size.head, num_joints) if has_person_heads else None
        if size.folded:
            _initialize_without_norms(self)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        assert self.final_layer.bias is not None
        bias = math.log(FIRST_HEIGHT / (1 - FIRST_HEIGHT)) if size.folded else 0.0
        nn.init.constant_(self.final_layer.bias, bias)

    def forward(self, crops: Tensor) -> PoseFeatures:
        """Predict heatmaps (B, K, h/4, w/4); h and w must be multiples of 32."""
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
        heatmaps = self.final_layer(self.head(x))
        if self.is_folded:
            heatmaps = heatmaps.sigmoid()
        person = None if self.person is None else self.person(x)
        return PoseFeatures(heatmaps, tuple(pyramid), person=person)


def _groups(size: MobileNetSize) -> nn.ModuleList:
    """Build the seven groups of inverted residuals; only the very first block does not widen."""
    groups = nn.ModuleList()
    inputs, expansion = size.stem, 1
    for outputs, repeats, stride in zip(size.channels, size.repeats, STRIDES, strict=True):
        blocks = []
        for repeat in range(repeats):
            blocks.append(
                InvertedResidual(
                    inputs,
                    outputs,
                    stride=stride if repeat == 0 else 1,
                    expansion=expansion,
                    folded=size.folded,
                )
            )
            inputs, expansion = outputs, size.expansion
        groups.append(nn.Sequential(*blocks))
    return groups


def _initialize_without_norms(network: nn.Module) -> None:
    """Use He initialization: with torch's default the signal vanishes without batch norms."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
