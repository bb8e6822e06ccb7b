"""HRNet: parallel branches at strides 4 to 32, fused repeatedly; at any width and depth.

Attributes have the official names, so that official weights load; "stage" here means the
network's. Source: Sun et al., CVPR 2019; leoxiaobin/deep-high-resolution-net.pytorch (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.pose_features import PoseFeatures, PoseNetwork
from models.residual import BasicBlock, Bottleneck, heatmap_layer, residual_blocks


class Size(NamedTuple):
    """Width and depth of an HRNet; the defaults are the published depth."""

    width: int
    """Channels at stride 4; each doubling of the stride doubles them."""
    stem_blocks: int = 4
    """Residual blocks before the first branching."""
    modules: tuple[int, int, int] = (1, 4, 3)
    """Modules in stages 2, 3 and 4."""
    blocks: int = 4
    """Residual blocks on each branch of a module."""


SIZES = {
    "w18_small": Size(18, stem_blocks=2, modules=(1, 3, 2), blocks=2),
    "w18": Size(18),
    "w32": Size(32),
    "w48": Size(48),
}
"""Sizes by name; others are possible too. w18_small is the published HRNet-W18-Small-v2."""


class HRNet(PoseNetwork):
    """Predicts heatmaps of ``num_joints`` joints."""

    def __init__(self, num_joints: int, size: Size) -> None:
        super().__init__()
        width, modules, blocks = size.width, size.modules, size.blocks
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.pyramid_channels = (channels[2], channels[1], channels[0])
        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = residual_blocks(Bottleneck, 64, 64, size.stem_blocks)
        self.transition1 = _transition([64 * Bottleneck.expansion], channels[:2])
        self.stage2 = _stage(channels[:2], modules[0], blocks)
        self.transition2 = _transition(channels[:2], channels[:3])
        self.stage3 = _stage(channels[:3], modules[1], blocks)
        self.transition3 = _transition(channels[:3], channels)
        self.stage4 = _stage(channels, modules[2], blocks, is_last=True)
        self.final_layer = heatmap_layer(width, num_joints)

    def forward(self, crops: Tensor) -> PoseFeatures:
        """Predict heatmaps (B, K, h/4, w/4); h and w must be multiples of 32.

        The pyramid consists of the last module's branches before its fusion, at strides 16 and 8,
        and of the fused map at stride 4.
        """
        x = self.relu(self.bn1(self.conv1(crops)))
        x = self.relu(self.bn2(self.conv2(x)))
        maps = [self.layer1(x)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            last = len(maps) - 1  # a new branch starts from the coarsest
            maps = [step(maps[min(index, last)]) for index, step in enumerate(transition)]
            for module in stage:
                branches, maps = module(maps)
        return PoseFeatures(self.final_layer(maps[0]), (branches[2], branches[1], maps[0]))


class HighResolutionModule(nn.Module):
    """Residual blocks on each branch, then a fusion of all branches into each."""

    def __init__(self, channels: Sequence[int], num_fused: int, blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(residual_blocks(BasicBlock, c, c, blocks) for c in channels)
        self.fuse_layers = nn.ModuleList(Fusion(channels, target) for target in range(num_fused))

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the branches before and after their fusion, fine to coarse."""
        branches = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return branches, [fuse(branches) for fuse in self.fuse_layers]


class Fusion(nn.ModuleList):
    """Sums all branches at the resolution and width of one of them."""

    def __init__(self, channels: Sequence[int], target: int) -> None:
        super().__init__(_resample(channels, source, target) for source in range(len(channels)))

    def forward(self, branches: list[Tensor]) -> Tensor:
        first, *others = (layer(x) for layer, x in zip(self, branches, strict=True))
        for other in others:
            first = first + other
        return F.relu(first)


def _resample(channels: Sequence[int], source: int, target: int) -> nn.Module:
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(
            nn.Conv2d(channels[source], channels[target], 1, bias=False),
            nn.BatchNorm2d(channels[target]),
            nn.Upsample(scale_factor=2.0 ** (source - target), mode="nearest"),
        )
    kept = channels[source]
    steps = [_conv3x3(kept, kept, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, _conv3x3(kept, channels[target], stride=2, relu=False))


def _transition(before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
    """Layers from one stage's branches to those of the next, which has one more."""
    steps = [
        nn.Identity() if inputs == outputs else _conv3x3(inputs, outputs)
        for inputs, outputs in zip(before, after[:-1], strict=True)
    ]
    return nn.ModuleList([*steps, nn.Sequential(_conv3x3(before[-1], after[-1], stride=2))])


def _stage(
    channels: Sequence[int], num_modules: int, blocks: int, is_last: bool = False
) -> nn.ModuleList:
    """Modules in a row; the last module of the last stage fuses into the finest branch only."""
    fused = [len(channels)] * num_modules
    if is_last:
        fused[-1] = 1
    return nn.ModuleList(HighResolutionModule(channels, num_fused, blocks) for num_fused in fused)


def _conv3x3(inputs: int, outputs: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        *([nn.ReLU(inplace=True)] if relu else []),
    )
