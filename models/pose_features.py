"""What every pose network takes in and puts out, and how its features are read at a place."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The values, RGB in 0..255, that a network was trained to see as 0 and as 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, crops: Tensor) -> Tensor:
        """Crops (B, 3, h, w), RGB in 0..255, with the mean and deviation taken out."""
        mean = torch.tensor(self.mean, device=crops.device).view(3, 1, 1)
        return (crops - mean) / torch.tensor(self.std, device=crops.device).view(3, 1, 1)


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class PoseFeatures(NamedTuple):
    """A network's answer, and the features that led to it."""

    heatmaps: Tensor
    """(B, K, H, W) at stride 4."""
    pyramid: tuple[Tensor, ...]
    """Features at strides 16, 8, 4: coarse to fine."""


class PoseNetwork(nn.Module):
    """A network, teacher or student, that maps normalised crops (B, 3, h, w) to PoseFeatures."""

    pixels: Pixels = IMAGENET
    """How its crops are normalised."""
    pyramid_channels: tuple[int, int, int]
    """Channels at strides 16, 8, 4."""

    def look(self, crops: Tensor) -> PoseFeatures:
        """Its answer to crops (B, 3, h, w), RGB in 0..255."""
        answer = self(self.pixels.normalise(crops))
        assert isinstance(answer, PoseFeatures)
        return answer


def sample_features(
    features: Tensor, keypoints_crop: Tensor, crop_size: tuple[int, int]
) -> Tensor:
    """Read features (B, C, h / s, w / s) at keypoints (B, N, 2), bilinearly, as (B, N, C).

    The centre of cell i lies at crop pixel s * i, as in the codecs; a keypoint beyond the last
    centre reads the edge, one that is no number reads no number. Four gathers from a table with
    a row a cell, which channels-last features are already; others are copied. It knows no
    align_corners, and is exact at centres. Its time: tests/benchmarks/igp_gcn.py.
    """
    batch, channels, rows, columns = features.shape
    x = (keypoints_crop[..., 0] * (columns / crop_size[1])).clamp(0, columns - 1)
    y = (keypoints_crop[..., 1] * (rows / crop_size[0])).clamp(0, rows - 1)
    # the second clamp is for what is no number, of which a whole number may be anything
    left, top = x.long().clamp(0, columns - 1), y.long().clamp(0, rows - 1)
    right, bottom = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)
    people = torch.arange(batch, device=features.device)[:, None] * rows
    above, below = (people + top) * columns, (people + bottom) * columns
    cells = torch.stack((above + left, above + right, below + left, below + right))
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    corners = table.index_select(0, cells.flatten()).view(4, batch, -1, channels)
    share_x = (x - left).to(features.dtype)[..., None]
    share_y = (y - top).to(features.dtype)[..., None]
    first = torch.lerp(corners[0], corners[1], share_x)
    return torch.lerp(first, torch.lerp(corners[2], corners[3], share_x), share_y)
