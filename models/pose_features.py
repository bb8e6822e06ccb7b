"""What every pose network takes in and puts out, and how its features are read at a place."""

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

    def normalize(self, crops: Tensor) -> Tensor:
        """Crops (B, 3, h, w), RGB in 0..255, with the mean and deviation taken out, in order."""
        mean, std = torch.tensor([self.mean, self.std], device=crops.device)
        both = torch.stack((-mean / std, 1 / std))[..., None, None]
        # A value for each column, since rows of three numbers are too short to be fast.
        wide = both.expand(-1, -1, -1, crops.shape[-1])
        shift, factor = wide.contiguous(memory_format=torch.channels_last)
        crops = torch.addcmul(shift, crops, factor)
        return crops.flip(1) if self.order == "bgr" else crops


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


_HALF_RANGE = 1 / 0.007843017578125  # 2 / 255 in half precision, as MoveNet's files store it
MOVENET = Pixels((_HALF_RANGE,) * 3, (_HALF_RANGE,) * 3)


class PersonMaps(NamedTuple):
    """What MoveNet says beside its heatmaps, at stride 4; places are (y, x), in cells."""

    center: Tensor
    """(B, 1, H, W): the logit of a person's center being there."""
    regression: Tensor
    """(B, 2 K, H, W): y, x from this cell, if it is the center, to each joint."""
    offsets: Tensor
    """(B, 2 K, H, W): y, x from this cell, if it is the joint's, to the joint."""


class PoseFeatures(NamedTuple):
    """A network's answer, and the features that led to it."""

    heatmaps: Tensor
    """(B, K, H, W) at stride 4."""
    pyramid: tuple[Tensor, ...]
    """Features at strides 16, 8, 4: coarse to fine."""
    bins: tuple[Tensor, Tensor] | None = None
    """Logits of simcc's bins along x and y, (B, K, 2w) and (B, K, 2h)."""
    person: PersonMaps | None = None
    """Of MoveNet as it comes alone."""

    def averaged_with(self, other: PoseFeatures) -> PoseFeatures:
        """The mean of both answers; the features are this one's."""
        bins = None
        if self.bins is not None and other.bins is not None:
            (x, y), (other_x, other_y) = self.bins, other.bins
            bins = ((x + other_x) / 2, (y + other_y) / 2)
        return self._replace(heatmaps=(self.heatmaps + other.heatmaps) / 2, bins=bins)


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether a forward pass of this precision is in bf16 on the device.

    auto is bf16 on GPUs that have it in hardware. On CPUs it is fp32: there bf16 makes answers
    faster, but the training of small crops slower.
    """
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class PoseNetwork(nn.Module):
    """A network, teacher or student, that maps normalized crops (B, 3, h, w) to PoseFeatures."""

    pixels: Pixels = IMAGENET
    """How its crops are normalized."""
    precision: str = "fp32"
    """auto | fp32 | bf16: what its layers compute in; weights and answers are fp32 always."""
    memory_format: torch.memory_format = torch.channels_last
    """How it is fed."""
    pyramid_channels: tuple[int, int, int]
    """Channels at strides 16, 8, 4."""
    simcc_head: SimccHead | None
    """Puts out the bins, if the codec reads such."""

    def __init__(self) -> None:
        super().__init__()
        self.simcc_head = None

    def predict(self, crops: Tensor) -> PoseFeatures:
        """Its answer, in fp32, to crops (B, 3, h, w), RGB in 0..255.

        A network that was compiled is so in train mode alone: what it is scored by must follow
        from its weights, however they were trained.
        """
        forward = self if self.training else self.forward
        seen = self.pixels.normalize(crops).contiguous(memory_format=self.memory_format)
        if computes_in_bf16(self.precision, crops.device):
            with torch.autocast(crops.device.type, torch.bfloat16):
                answer = forward(seen)
        else:
            answer = forward(seen)
        assert isinstance(answer, PoseFeatures)
        pyramid = tuple(features.float() for features in answer.pyramid)
        # channel by channel again, as targets lie: losses and decoders go over them many times
        heatmaps = answer.heatmaps.float().contiguous()
        answer = answer._replace(heatmaps=heatmaps, pyramid=pyramid)
        if self.simcc_head is None:
            return answer
        return answer._replace(bins=self.simcc_head(pyramid[-1]))


def sample_features(
    features: Tensor, keypoints_crop: Tensor, crop_size: tuple[int, int]
) -> Tensor:
    """Read features (B, C, h / s, w / s) at keypoints (B, N, 2), bilinearly, as (B, N, C).

    The center of cell i lies at crop pixel s * i, as in the codecs; a keypoint beyond the last
    center reads the edge, one that is no number reads no number. Four gathers from a table with
    a row a cell, which channels-last features are already; others are copied. It knows no
    align_corners, and is exact at centers. Its time: tests/benchmarks/igp_gcn.py.
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
