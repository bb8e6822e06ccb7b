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


class PoseFeatures(NamedTuple):
    """A network's answer, and the features that led to it."""

    heatmaps: Tensor
    """(B, K, H, W) at stride 4."""
    pyramid: tuple[Tensor, ...]
    """Features at strides 16, 8, 4: coarse to fine."""


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether a forward pass of this precision is in bf16 on the device.

    auto is bf16 on GPUs that have it in hardware. On CPUs it is fp32: there bf16 makes answers
    faster, but the training of small crops slower.
    """
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class PoseNetwork(nn.Module):
    """A network, teacher or student, that maps normalised crops (B, 3, h, w) to PoseFeatures."""

    pixels: Pixels = IMAGENET
    """How its crops are normalised."""
    precision: str = "fp32"
    """auto | fp32 | bf16: what its layers compute in; weights and answers are fp32 always."""
    memory_format: torch.memory_format = torch.channels_last
    """How it is fed."""
    pyramid_channels: tuple[int, int, int]
    """Channels at strides 16, 8, 4."""

    def look(self, crops: Tensor) -> PoseFeatures:
        """Its answer, in fp32, to crops (B, 3, h, w), RGB in 0..255.

        A network that was compiled is so in train mode alone: what it is scored by must follow
        from its weights, however they were trained.
        """
        forward = self if self.training else self.forward
        seen = self.pixels.normalise(crops).contiguous(memory_format=self.memory_format)
        if computes_in_bf16(self.precision, crops.device):
            with torch.autocast(crops.device.type, torch.bfloat16):
                answer = forward(seen)
        else:
            answer = forward(seen)
        assert isinstance(answer, PoseFeatures)
        pyramid = tuple(features.float() for features in answer.pyramid)
        return answer._replace(heatmaps=answer.heatmaps.float(), pyramid=pyramid)
