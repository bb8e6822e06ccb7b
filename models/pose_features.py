"""Inputs and outputs of every pose network, and the sampling of features at keypoints."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.simcc_head import SimccHead


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The normalization of a network's input: mean, deviation and order of the channels."""

    mean: tuple[float, float, float]
    """Of R, G, B in 0..255."""
    std: tuple[float, float, float]
    """Of R, G, B in 0..255."""
    order: Literal["rgb", "bgr"] = "rgb"
    """Order in which the network takes the channels."""

    def normalize(self, crops: Tensor) -> Tensor:
        """Normalize crops (B, 3, h, w), RGB in 0..255, and put their channels in order."""
        mean, std = torch.tensor([self.mean, self.std], device=crops.device)
        shift_and_factor = torch.stack((-mean / std, 1 / std))[..., None, None]
        # One value per column, since broadcasting from rows of three numbers is slow.
        wide = shift_and_factor.expand(-1, -1, -1, crops.shape[-1])
        shift, factor = wide.contiguous(memory_format=torch.channels_last)
        crops = torch.addcmul(shift, crops, factor)
        return crops.flip(1) if self.order == "bgr" else crops


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_HALF_RANGE = 1 / 0.007843017578125  # 2 / 255 in half precision, as MoveNet's files store it
MOVENET = Pixels((_HALF_RANGE,) * 3, (_HALF_RANGE,) * 3)


class PersonMaps(NamedTuple):
    """Outputs of MoveNet's person heads at stride 4; vectors are (y, x) in cells."""

    center: Tensor
    """(B, 1, H, W): logit that a person's center is in this cell."""
    regression: Tensor
    """(B, 2 K, H, W): y, x to each joint from this cell, if it is the center's."""
    offsets: Tensor
    """(B, 2 K, H, W): y, x to each joint from this cell, if it is the joint's."""


class PoseFeatures(NamedTuple):
    """A pose network's output: heatmaps, the features behind them, and what codecs need."""

    heatmaps: Tensor
    """(B, K, H, W) at stride 4."""
    pyramid: tuple[Tensor, ...]
    """Features at strides 16, 8, 4: coarse to fine."""
    bins: tuple[Tensor, Tensor] | None = None
    """Logits of SimCC's bins along x and y, (B, K, 2w) and (B, K, 2h)."""
    person: PersonMaps | None = None
    """Only from networks with MoveNet's person heads."""

    def averaged_with(self, other: PoseFeatures) -> PoseFeatures:
        """Average the heatmaps and bins of both; keep this one's pyramid."""
        bins = None
        if self.bins is not None and other.bins is not None:
            (x, y), (other_x, other_y) = self.bins, other.bins
            bins = ((x + other_x) / 2, (y + other_y) / 2)
        return self._replace(heatmaps=(self.heatmaps + other.heatmaps) / 2, bins=bins)


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a forward pass in this precision runs in bf16 on the device.

    auto is bf16 on GPUs with hardware support for it, and fp32 on CPUs, where bf16 speeds up
    inference but slows down training on small crops.
    """
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class PoseNetwork(nn.Module):
    """Maps normalized crops (B, 3, h, w) to PoseFeatures; base class of teachers and students."""

    pixels: Pixels = IMAGENET
    """How its input is normalized."""
    precision: str = "fp32"
    """auto | fp32 | bf16: precision of its layers; weights and outputs are always fp32."""
    memory_format: torch.memory_format = torch.channels_last
    """Memory layout of its input."""
    pyramid_channels: tuple[int, int, int]
    """Channels at strides 16, 8, 4."""
    simcc_head: SimccHead | None
    """Predicts the bins; None unless the codec is simcc."""

    def __init__(self) -> None:
        super().__init__()
        self.simcc_head = None

    def predict(self, crops: Tensor) -> PoseFeatures:
        """Normalize crops (B, 3, h, w), RGB in 0..255, and run the network on them.

        The forward pass runs in ``precision`` under autocast, but for the SimCC head, which runs
        in fp32. All outputs are fp32; heatmaps are contiguous, whatever ``memory_format`` is.

        A compiled network runs compiled in train mode only, so that an evaluation depends on the
        weights and not on how they were trained.
        """
        forward = self if self.training else self.forward
        inputs = self.pixels.normalize(crops).contiguous(memory_format=self.memory_format)
        if computes_in_bf16(self.precision, crops.device):
            with torch.autocast(crops.device.type, torch.bfloat16):
                features = forward(inputs)
        else:
            features = forward(inputs)
        assert isinstance(features, PoseFeatures)
        pyramid = tuple(level.float() for level in features.pyramid)
        # Contiguous like the targets, since losses and decoders read them many times.
        heatmaps = features.heatmaps.float().contiguous()
        features = features._replace(heatmaps=heatmaps, pyramid=pyramid)
        if self.simcc_head is None:
            return features
        return features._replace(bins=self.simcc_head(pyramid[-1]))


def sample_features(
    features: Tensor, keypoints_crop: Tensor, crop_size: tuple[int, int]
) -> Tensor:
    """Sample features (B, C, h / s, w / s) bilinearly at keypoints (B, N, 2); return (B, N, C).

    The center of cell i lies at crop pixel s * i, as in the codecs. A keypoint beyond the last
    center reads the edge; a NaN keypoint reads NaN.

    In place of ``grid_sample``, whose coordinates are not exact at cell centers, this makes four
    gathers from a table with one row per cell. Channels-last features have that layout already;
    others are copied. tests/benchmarks/igp_gcn.py compares the two.
    """
    batch, channels, rows, columns = features.shape
    x = (keypoints_crop[..., 0] * (columns / crop_size[1])).clamp(0, columns - 1)
    y = (keypoints_crop[..., 1] * (rows / crop_size[0])).clamp(0, rows - 1)
    # NaN casts to an arbitrary integer, hence the second clamp.
    left, top = x.long().clamp(0, columns - 1), y.long().clamp(0, rows - 1)
    right, bottom = (left + 1).clamp(max=columns - 1), (top + 1).clamp(max=rows - 1)
    first_row = torch.arange(batch, device=features.device)[:, None] * rows
    above, below = (first_row + top) * columns, (first_row + bottom) * columns
    cells = torch.stack((above + left, above + right, below + left, below + right))
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    corners = table.index_select(0, cells.flatten()).view(4, batch, -1, channels)
    share_x = (x - left).to(features.dtype)[..., None]
    share_y = (y - top).to(features.dtype)[..., None]
    upper = torch.lerp(corners[0], corners[1], share_x)
    return torch.lerp(upper, torch.lerp(corners[2], corners[3], share_x), share_y)
