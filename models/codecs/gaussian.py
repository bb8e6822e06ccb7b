"""Keypoints to Gaussian heatmaps and back, in one class per codec so that the two cannot drift.

``msra`` is for official HRNet and SimpleBaseline weights; ``dark`` follows Zhang et al., ``udp``
Huang et al., both CVPR 2020. The center of heatmap cell i is at crop pixel ``stride * i``; the
stride is the crop's length over the heatmap's, both by the convention of the codec's frame.

A mode is one peak of a joint's heatmap: x and y in crop pixels, its height, and its width as a
multiple of sigma. Height 0 marks a missing mode.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.codecs.heatmap_peaks import (
    cell_xy,
    dark_step,
    highest,
    is_peak,
    smoothed,
    udp_step,
    values_at,
    width_at,
)
from models.pose_features import PoseFeatures

WINDOW = 3.0
"""Radius of a truncated Gaussian in sigmas."""
_EPSILON = 1e-4  # keeps cells on the window's edge inside despite rounding
_TINY = 1e-10
_UDP_RANGE = (1e-3, 50.0)  # clamps values before the log, as published


@dataclasses.dataclass(frozen=True)
class GaussianCodec(abc.ABC):
    """The parts that all codecs share: rendering Gaussians, finding peaks, mirroring."""

    align_corners: ClassVar[bool] = False
    """The convention for the lengths of crop and heatmap, see CropFrame."""
    is_truncated: ClassVar[bool] = True
    """Whether Gaussians are 0 outside WINDOW."""

    input_size: tuple[int, int]
    """Height and width of the crop in pixels."""
    heatmap_size: tuple[int, int]
    """Height and width of the heatmap in cells."""
    sigma: float = 2.0
    """Spread of a joint's Gaussian in heatmap cells."""

    def __post_init__(self) -> None:
        if min(*self.input_size, *self.heatmap_size) < 1 or self.sigma <= 0:
            raise ValueError(
                "a codec needs input and heatmap sizes of at least 1 and a positive sigma, got "
                f"{self.input_size=}, {self.heatmap_size=}, {self.sigma=}"
            )

    @property
    def frame(self) -> CropFrame:
        """The frame in which crops are cut."""
        return CropFrame(self.input_size, self.align_corners)

    def decode_features(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """Decode a network's keypoints_crop (B, K, 2) and scores (B, K), without gradient."""
        return self.decode(features.heatmaps)

    def decode_feature_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """Decode ``count`` modes per joint, (B, K, M, 4), the first as in ``decode_features``."""
        return self.decode_modes(features.heatmaps, count)

    def flip_back(self, mirrored: PoseFeatures, flip_order: Sequence[int]) -> PoseFeatures:
        """Convert a network's output for a mirrored crop to that for the crop itself.

        The heatmaps' columns are reversed and, unless ``align_corners``, shifted right by one, as
        the official HRNet does (SHIFT_HEATMAP). The pyramid stays mirrored.
        """
        maps = mirrored.heatmaps[:, list(flip_order)].flip(-1)
        if not self.align_corners:
            maps = torch.cat((maps[..., :1], maps[..., :-1]), dim=-1)
        return mirrored._replace(heatmaps=maps)

    def encode(self, keypoints_crop: Tensor, visibility: Tensor) -> tuple[Tensor, Tensor]:
        """Render a Gaussian with peak 1 for each labeled joint.

        A labeled joint whose window lies outside the heatmap counts as unlabeled, by the official
        rule: ``start >= size`` or ``end < 0``.

        Args:
            keypoints_crop: (B, K, 2) in crop pixels; unlabeled joints may have any values.
            visibility: COCO visibility, (B, K).

        Returns:
            Heatmaps (B, K, H, W) and weights (B, K), 0 or 1. Heatmaps of weight 0 are 0.
        """
        labeled = visibility > 0
        keypoints_crop = torch.where(labeled[..., None], keypoints_crop, 0.0)
        centers = self._centers(keypoints_crop / self._stride(keypoints_crop))
        sizes = centers.new_tensor(self.heatmap_size[::-1])
        weights = labeled & touches(self._window(centers), WINDOW * self.sigma, sizes)
        heights = weights[:, :, None].to(centers.dtype)
        maps = self._gaussians(centers[:, :, None], heights, centers.new_tensor(self.sigma))
        return maps, weights.float()

    def render(self, modes: Tensor) -> Tensor:
        """Render modes (B, K, M, 4) as heatmaps (B, K, H, W), their maximum where they overlap."""
        centers = self._centers(modes[..., :2] / self._stride(modes))
        return self._gaussians(centers, modes[..., 2], self.sigma * modes[..., 3].clamp_min(_TINY))

    def _gaussians(self, centers: Tensor, heights: Tensor, spread: Tensor) -> Tensor:
        """Render Gaussians by centers (B, K, M, 2), heights and spread (B, K, M), in cells."""
        height, width = self.heatmap_size
        along_x = self._profile(centers[..., 0], spread, width)
        along_y = self._profile(centers[..., 1], spread, height)
        peaks = heights[..., None]
        along_y = torch.where(peaks > 0, along_y * peaks, 0.0)  # cheaper here than on the maps
        maps = along_y[..., :, None] * along_x[..., None, :]  # (B, K, M, H, W)
        return (maps[:, :, 0] if maps.shape[2] == 1 else maps.amax(dim=2)).float()

    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        """Find each joint at its heatmap's highest cell, refined below the cell.

        Args:
            heatmaps: (B, K, H, W); no gradient flows back.

        Returns:
            keypoints_crop (B, K, 2), (0, 0) where no value is positive, and scores (B, K), the
            highest values, even if negative.
        """
        maps = self._checked(heatmaps)
        values, cells = maps.flatten(2).max(dim=-1, keepdim=True)
        places = self._refine(maps, cells) * self._stride(maps)
        return torch.where(values[..., None] > 0, places, 0.0)[:, :, 0], values[:, :, 0]

    def decode_modes(self, heatmaps: Tensor, count: int) -> Tensor:
        """List each heatmap's highest local maxima; the first is where ``decode`` puts the joint.

        A local maximum exceeds its eight neighbors. Its width is that of the Gaussian whose log
        has the same curvature, within WIDTH_RANGE. Its height makes the rendered Gaussian equal
        the heatmap in the peak's cell.

        Args:
            heatmaps: (B, K, H, W); no gradient flows back.
            count: modes per joint, M.

        Returns:
            Modes (B, K, M, 4), by falling values of their cells; missing ones are (0, 0, 0, 1).
        """
        maps = self._checked(heatmaps)
        values, cells = highest(torch.where(is_peak(maps), maps, 0.0), count)
        refined = self._refine(maps, cells)
        spread = self.sigma * width_at(maps, cells, self.sigma)
        away = self._centers(refined) - cell_xy(cells, self.heatmap_size[1])
        # A step beyond half a cell on both axes comes from noise, not from a Gaussian's peak.
        distance = away.square().sum(dim=-1).clamp_max(0.5)
        heights = values * torch.exp(distance / (2 * spread.square()))
        places = (refined * self._stride(maps)).unbind(dim=-1)
        modes = torch.stack((*places, heights, spread / self.sigma), dim=-1)
        nothing = modes.new_tensor((0.0, 0.0, 0.0, 1.0))
        return torch.where(values[..., None] > 0, modes, nothing)

    def _stride(self, like: Tensor) -> Tensor:
        """Crop pixels per cell along x and y."""
        length_x, length_y = self.frame.span
        columns, rows = CropFrame(self.heatmap_size, self.align_corners).span
        return like.new_tensor((length_x / columns, length_y / rows))

    def _checked(self, heatmaps: Tensor) -> Tensor:
        if tuple(heatmaps.shape[-2:]) != tuple(self.heatmap_size):
            raise ValueError(
                f"heatmaps must have the codec's size, got {tuple(heatmaps.shape[-2:])} and "
                f"{self.heatmap_size=}; build the codec for the network's output"
            )
        return heatmaps.detach().float()

    def _profile(self, centers: Tensor, spread: Tensor, size: int) -> Tensor:
        """One-dimensional Gaussians (..., size), truncated if the codec's are."""
        cells = torch.arange(size, device=centers.device, dtype=centers.dtype)
        ratio = (cells - centers[..., None]) / spread[..., None]
        profile = torch.exp(-0.5 * ratio.square())
        if not self.is_truncated:
            return profile
        away = (cells - self._window(centers)[..., None]).abs()
        return torch.where(away <= (WINDOW + _EPSILON) * spread[..., None], profile, 0.0)

    @abc.abstractmethod
    def _centers(self, keypoints_heatmap: Tensor) -> Tensor:
        """Centers of the Gaussians for keypoints at these places, in cells."""

    def _window(self, centers: Tensor) -> Tensor:
        """Centers of the windows of Gaussians with these centers, in cells."""
        return centers

    @abc.abstractmethod
    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        """Refine the peaks at flat indices ``cells`` to places (..., 2) between the cells."""


@dataclasses.dataclass(frozen=True)
class Msra(GaussianCodec):
    """Truncated Gaussians on whole cells; decodes a quarter cell towards the higher neighbor.

    Targets and decoding equal those of leoxiaobin/deep-high-resolution-net.pytorch.
    """

    def _centers(self, keypoints_heatmap: Tensor) -> Tensor:
        return _nearest_cell(keypoints_heatmap)

    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        height, width = self.heatmap_size
        places = cell_xy(cells, width)
        x, y = places.unbind(dim=-1)
        slope = torch.stack(
            (
                values_at(maps, cells, 1, 0) - values_at(maps, cells, -1, 0),
                values_at(maps, cells, 0, 1) - values_at(maps, cells, 0, -1),
            ),
            dim=-1,
        )
        inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
        return places + torch.where(inside[..., None], 0.25 * torch.sign(slope), 0.0)


@dataclasses.dataclass(frozen=True)
class Dark(GaussianCodec):
    """Untruncated Gaussians at the exact place; decodes by a Taylor step on the smoothed log."""

    is_truncated = False

    def _centers(self, keypoints_heatmap: Tensor) -> Tensor:
        return keypoints_heatmap

    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        height, width = self.heatmap_size
        places = cell_xy(cells, width)
        x, y = places.unbind(dim=-1)
        logs = torch.log(smoothed(maps).clamp_min(_TINY))
        inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        return places + torch.where(inside[..., None], dark_step(logs, cells), 0.0)


@dataclasses.dataclass(frozen=True)
class Udp(GaussianCodec):
    """Truncated Gaussians at the exact place, in a frame with ``align_corners``.

    The paper's variant without offset maps. Decodes by a Taylor step like dark's, but with second
    differences over adjacent cells.
    """

    align_corners = True

    def _centers(self, keypoints_heatmap: Tensor) -> Tensor:
        return keypoints_heatmap

    def _window(self, centers: Tensor) -> Tensor:
        return _nearest_cell(centers)

    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        logs = torch.log(smoothed(maps).clamp(*_UDP_RANGE))
        return cell_xy(cells, self.heatmap_size[1]) + udp_step(logs, cells)


def touches(middles: Tensor, reach: Tensor | float, sizes: Tensor) -> Tensor:
    """Return whether windows around (..., 2) overlap the map on both axes, by HRNet's rule."""
    return ((middles - reach < sizes) & (middles + reach + 1 >= 0)).all(dim=-1)


def _nearest_cell(places: Tensor) -> Tensor:
    return torch.trunc(places + 0.5)  # rounds negative numbers as the official int() does
