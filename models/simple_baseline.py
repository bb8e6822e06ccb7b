"""SimpleBaseline: a ResNet down to stride 32, then three transposed convolutions up to stride 4.

Attributes have the official names, so that official weights load. Source: Xiao et al., ECCV 2018;
leoxiaobin/deep-high-resolution-net.pytorch (MIT), ``pose_resnet``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.pose_features import IMAGENET, Pixels, PoseFeatures, PoseNetwork
from models.residual import BasicBlock, Block, Bottleneck, heatmap_layer, residual_blocks

RESNETS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Class and number of blocks by depth."""

SIZES = {f"r{depth}": depth for depth in RESNETS}
"""Depth by name."""

FILTERS = 256
"""Channels of each transposed convolution."""


class SimpleBaseline(PoseNetwork):
    """Predicts heatmaps of ``num_joints`` joints with a ResNet of ``depth`` layers."""

    # The official settings have COLOR_RGB false: channels in OpenCV's order, with the mean and
    # deviation of ImageNet still in RGB order.
    pixels = Pixels(IMAGENET.mean[::-1], IMAGENET.std[::-1], order="bgr")

    def __init__(self, num_joints: int, depth: int) -> None:
        super().__init__()
        self.pyramid_channels = (FILTERS, FILTERS, FILTERS)
        block, counts = RESNETS[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        expansion = block.expansion
        self.layer1 = residual_blocks(block, 64, 64, counts[0])
        self.layer2 = residual_blocks(block, 64 * expansion, 128, counts[1], stride=2)
        self.layer3 = residual_blocks(block, 128 * expansion, 256, counts[2], stride=2)
        self.layer4 = residual_blocks(block, 256 * expansion, 512, counts[3], stride=2)
        self.deconv_layers = nn.Sequential(
            *_deconv(512 * expansion),
            *_deconv(FILTERS),
            *_deconv(FILTERS),
        )
        self.final_layer = heatmap_layer(FILTERS, num_joints)

    def forward(self, crops: Tensor) -> PoseFeatures:
        """Predict heatmaps (B, K, h/4, w/4); h and w must be multiples of 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(crops))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        pyramid = []
        for layer in self.deconv_layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                pyramid.append(x)
        return PoseFeatures(self.final_layer(x), tuple(pyramid))


def _deconv(inputs: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(inputs, FILTERS, 4, 2, 1, bias=False),
        nn.BatchNorm2d(FILTERS),
        nn.ReLU(inplace=True),
    ]
