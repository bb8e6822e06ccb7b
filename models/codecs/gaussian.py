"""Keypoints to heatmaps and back; encode and decode stand in one class so that they cannot drift.

``msra`` is what official HRNet and SimpleBaseline weights expect, ``dark`` follows Zhang et al.,
``udp`` Huang et al., both CVPR 2020. The center of heatmap cell i lies at crop pixel
``stride * i``; the stride is the crop's length over the heatmap's, each counted as the codec's
frame counts. A mode is one peak of a joint's map: x and y in crop pixels, its height, and its
width as a multiple of sigma; height 0 stands for no mode.
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
"""Sigmas that a cut Gaussian reaches."""
_EPSILON = 1e-4  # so that rounding leaves no cell on the window's edge out
_TINY = 1e-10
_UDP_RANGE = (1e-3, 50.0)  # the values that the Taylor step distinguishes, as published


@dataclasses.dataclass(frozen=True)
class GaussianCodec(abc.ABC):
    """What all codecs share: drawing Gaussians, finding peaks, the mirror."""

    align_corners: ClassVar[bool] = False
    """Whether crop and heatmap are as long as the gaps between their cells (see CropFrame)."""
    is_cut: ClassVar[bool] = True
    """Whether Gaussians are drawn within WINDOW only."""

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
        """How the crop is cut."""
        return CropFrame(self.input_size, self.align_corners)

    def decode_features(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """A network's keypoints_crop (B, K, 2) and their scores (B, K), without gradient."""
        return self.decode(features.heatmaps)

    def decode_feature_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """A network's up to ``count`` modes a joint, (B, K, M, 4), the first where ``read`` is."""
        return self.decode_modes(features.heatmaps, count)

    def flip_back(self, mirrored: PoseFeatures, flip_order: Sequence[int]) -> PoseFeatures:
        """What a network says of a mirrored crop, as if it said it of the crop itself.

        The maps' columns are reversed; where cells are counted, shifted right by one too, as the
        official HRNet does (SHIFT_HEATMAP). The features stay mirrored.
        """
        maps = mirrored.heatmaps[:, list(flip_order)].flip(-1)
        if not self.align_corners:
            maps = torch.cat((maps[..., :1], maps[..., :-1]), dim=-1)
        return mirrored._replace(heatmaps=maps)

    def encode(self, keypoints_crop: Tensor, visibility: Tensor) -> tuple[Tensor, Tensor]:
        """Give each labeled joint a Gaussian of peak 1.

        A labeled joint whose window lies outside the map counts as unlabeled, by the official
        rule: ``start >= size`` or ``end < 0``.

        Args:
            keypoints_crop: (B, K, 2) in crop pixels; unlabeled joints may hold anything.
            visibility: COCO visibility, (B, K).

        Returns:
            Heatmaps (B, K, H, W), zero where the weight is, and weights (B, K), 0 or 1.
        """
        labeled = visibility > 0
        keypoints_crop = torch.where(labeled[..., None], keypoints_crop, 0.0)
        centers = self._centers(keypoints_crop / self._stride(keypoints_crop))
        sizes = centers.new_tensor(self.heatmap_size[::-1])
        weights = labeled & touches(self._window(centers), WINDOW * self.sigma, sizes)
        heights = weights[:, :, None].to(centers.dtype)
        maps = self._drawn(centers[:, :, None], heights, centers.new_tensor(self.sigma))
        return maps, weights.float()

    def render(self, modes: Tensor) -> Tensor:
        """Draw modes (B, K, M, 4) as heatmaps (B, K, H, W), the highest where they overlap."""
        centers = self._centers(modes[..., :2] / self._stride(modes))
        return self._drawn(centers, modes[..., 2], self.sigma * modes[..., 3].clamp_min(_TINY))

    def _drawn(self, centers: Tensor, heights: Tensor, spread: Tensor) -> Tensor:
        """Gaussians at centers (B, K, M, 2) in cells, heights and spread (B, K, M), as maps."""
        height, width = self.heatmap_size
        along_x = self._profile(centers[..., 0], spread, width)
        along_y = self._profile(centers[..., 1], spread, height)
        peaks = heights[..., None]
        along_y = torch.where(peaks > 0, along_y * peaks, 0.0)  # before the maps: those are large
        maps = along_y[..., :, None] * along_x[..., None, :]  # (B, K, M, H, W)
        return (maps[:, :, 0] if maps.shape[2] == 1 else maps.amax(dim=2)).float()

    def decode(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        """Find each joint at its map's highest cell, refined below the cell.

        Args:
            heatmaps: (B, K, H, W); no gradient flows back.

        Returns:
            keypoints_crop (B, K, 2), (0, 0) where no value is positive, and scores (B, K), the
            highest values, negative ones included.
        """
        maps = self._checked(heatmaps)
        values, cells = maps.flatten(2).max(dim=-1, keepdim=True)
        found = self._refine(maps, cells) * self._stride(maps)
        return torch.where(values[..., None] > 0, found, 0.0)[:, :, 0], values[:, :, 0]

    def decode_modes(self, heatmaps: Tensor, count: int) -> Tensor:
        """List each map's highest local maxima, the first at the place that decode gives.

        A maximum exceeds its eight neighbors. Its width is that of the Gaussian with the same
        curvature of the log, kept within WIDTH_RANGE; its height is such that the drawn Gaussian
        has the map's value in the peak's cell.

        Args:
            heatmaps: (B, K, H, W); no gradient flows back.
            count: modes a joint, M.

        Returns:
            Modes (B, K, M, 4), in the order of the cells' values; (0, 0, 0, 1) where none is left.
        """
        maps = self._checked(heatmaps)
        values, cells = highest(torch.where(is_peak(maps), maps, 0.0), count)
        refined = self._refine(maps, cells)
        spread = self.sigma * width_at(maps, cells, self.sigma)
        away = self._centers(refined) - cell_xy(cells, self.heatmap_size[1])
        # a step beyond half a cell on both axes comes from noise, not from a Gaussian's peak
        distance = away.square().sum(dim=-1).clamp_max(0.5)
        heights = values * torch.exp(distance / (2 * spread.square()))
        places = (refined * self._stride(maps)).unbind(dim=-1)
        modes = torch.stack((*places, heights, spread / self.sigma), dim=-1)
        nothing = modes.new_tensor((0.0, 0.0, 0.0, 1.0))
        return torch.where(values[..., None] > 0, modes, nothing)

    def _stride(self, like: Tensor) -> Tensor:
        """Crop pixels per cell along x and y."""
        across, down = self.frame.span
        columns, rows = CropFrame(self.heatmap_size, self.align_corners).span
        return like.new_tensor((across / columns, down / rows))

    def _checked(self, heatmaps: Tensor) -> Tensor:
        if tuple(heatmaps.shape[-2:]) != tuple(self.heatmap_size):
            raise ValueError(
                f"heatmaps must have the codec's size, got {tuple(heatmaps.shape[-2:])} and "
                f"{self.heatmap_size=}; build the codec for the network's output"
            )
        return heatmaps.detach().float()

    def _profile(self, centers: Tensor, spread: Tensor, size: int) -> Tensor:
        """One-dimensional Gaussians (..., size), cut off where the codec cuts them."""
        cells = torch.arange(size, device=centers.device, dtype=centers.dtype)
        ratio = (cells - centers[..., None]) / spread[..., None]
        profile = torch.exp(-0.5 * ratio.square())
        if not self.is_cut:
            return profile
        away = (cells - self._window(centers)[..., None]).abs()
        return torch.where(away <= (WINDOW + _EPSILON) * spread[..., None], profile, 0.0)

    @abc.abstractmethod
    def _centers(self, keypoints_heatmap: Tensor) -> Tensor:
        """Where Gaussians are drawn for these places, in cells."""

    def _window(self, centers: Tensor) -> Tensor:
        """The middles of the windows in which Gaussians at these places are drawn, in cells."""
        return centers

    @abc.abstractmethod
    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        """Peaks (..., 2) in cells, between the cells around the flat indices ``cells``."""


@dataclasses.dataclass(frozen=True)
class Msra(GaussianCodec):
    """Gaussians on whole cells, 3 sigma wide; a quarter cell towards the higher neighbor.

    Equal to the targets and the decoding of leoxiaobin/deep-high-resolution-net.pytorch.
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
    """Gaussians at the exact place, uncut; a Taylor step on the log of the smoothed map."""

    is_cut = False

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
    """Gaussians at the exact place, cut as msra's; lengths are the gaps between pixels or cells.

    The paper's kind without offset maps. A Taylor step like dark's, from the cells next to it.
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
    """Whether windows about (..., 2) meet the map along both axes, as the official HRNet asks."""
    return ((middles - reach < sizes) & (middles + reach + 1 >= 0)).all(dim=-1)


def _nearest_cell(places: Tensor) -> Tensor:
    return torch.trunc(places + 0.5)  # the official int(), also below zero
