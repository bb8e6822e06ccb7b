"""What every pose network takes in and puts out, whatever its architecture."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.simcc_head import SimccHead


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
    bins: tuple[Tensor, Tensor] | None = None
    """Logits of simcc's bins along x and y, (B, K, 2w) and (B, K, 2h)."""

    def averaged_with(self, other: PoseFeatures) -> PoseFeatures:
        """The mean of both answers; the features are this one's."""
        bins = None
        if self.bins is not None and other.bins is not None:
            (x, y), (other_x, other_y) = self.bins, other.bins
            bins = ((x + other_x) / 2, (y + other_y) / 2)
        return self._replace(heatmaps=(self.heatmaps + other.heatmaps) / 2, bins=bins)


class PoseNetwork(nn.Module):
    """A network, teacher or student, that maps normalised crops (B, 3, h, w) to PoseFeatures."""

    pixels: Pixels = IMAGENET
    """How its crops are normalised."""
    pyramid_channels: tuple[int, int, int]
    """Channels at strides 16, 8, 4."""
    simcc_head: SimccHead | None
    """Puts out the bins, if the codec reads such."""

    def __init__(self) -> None:
        super().__init__()
        self.simcc_head = None

    def look(self, crops: Tensor) -> PoseFeatures:
        """Its answer to crops (B, 3, h, w), RGB in 0..255."""
        answer = self(self.pixels.normalise(crops))
        assert isinstance(answer, PoseFeatures)
        if self.simcc_head is None:
            return answer
        return answer._replace(bins=self.simcc_head(answer.pyramid[-1]))
