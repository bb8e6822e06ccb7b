"""What every pose network takes in and puts out, whatever its architecture."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The values, RGB in 0..255, that a network was trained to see as 0 and as 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    order: Literal["rgb", "bgr"] = "rgb"
    """In which order it sees the channels."""

    def normalise(self, crops: Tensor) -> Tensor:
        """Crops (B, 3, h, w), RGB in 0..255, with the mean and deviation taken out, in order."""
        mean = torch.tensor(self.mean, device=crops.device).view(3, 1, 1)
        crops = (crops - mean) / torch.tensor(self.std, device=crops.device).view(3, 1, 1)
        return crops.flip(1) if self.order == "bgr" else crops


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
