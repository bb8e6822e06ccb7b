"""What every pose network takes in and puts out, whatever its architecture."""

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
_HALF_RANGE = 1 / 0.007843017578125  # 2 / 255 in half precision, as MoveNet's files store it
MOVENET = Pixels((_HALF_RANGE,) * 3, (_HALF_RANGE,) * 3)


class PersonMaps(NamedTuple):
    """What MoveNet says beside its heatmaps, at stride 4; places are (y, x), in cells."""

    centre: Tensor
    """(B, 1, H, W): the logit of a person's centre being there."""
    regression: Tensor
    """(B, 2 K, H, W): y, x from this cell, if it is the centre, to each joint."""
    offsets: Tensor
    """(B, 2 K, H, W): y, x from this cell, if it is the joint's, to the joint."""


class PoseFeatures(NamedTuple):
    """A network's answer, and the features that led to it."""

    heatmaps: Tensor
    """(B, K, H, W) at stride 4."""
    pyramid: tuple[Tensor, ...]
    """Features at strides 16, 8, 4: coarse to fine."""
    person: PersonMaps | None = None
    """Of MoveNet as it comes alone."""


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
