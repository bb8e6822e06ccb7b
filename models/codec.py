"""Keypoints to heatmaps and back; encode and decode stand in one class so that they cannot drift.

Frame, as in the official HRNet: the centre of heatmap cell i lies at crop pixel ``stride * i``.
``msra`` is what official HRNet and SimpleBaseline weights expect. ``dark`` follows Zhang et al.,
CVPR 2020. A mode is one peak of a joint's map: x and y in crop pixels, its height, and its width
as a multiple of sigma; height 0 stands for no mode.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.pose_features import PoseFeatures

WIDTH_RANGE = (0.5, 3.0)
_WINDOW = 3.0  # sigmas that a drawn Gaussian reaches
_BLUR_KERNEL = 11
_BLUR_SIGMA = 0.3 * ((_BLUR_KERNEL - 1) * 0.5 - 1) + 0.8  # OpenCV's sigma of a kernel's size
_REACH_OF_FIT = 2.0  # cells from which the second differences are taken
_TINY = 1e-10


@dataclasses.dataclass(frozen=True)
class _GaussianMaps(abc.ABC):
    """What both codecs share: the frame, drawing Gaussians, finding peaks."""

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

    def read(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """A network's keypoints_crop (B, K, 2) and scores (B, K), as ``decode``."""
        return self.decode(features.heatmaps)

    def read_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """A network's modes (B, K, M, 4), as ``decode_modes``."""
        return self.decode_modes(features.heatmaps, count)

    def encode(self, keypoints_crop: Tensor, visibility: Tensor) -> tuple[Tensor, Tensor]:
        """Give each labelled joint a Gaussian of peak 1.

        A labelled joint whose window lies outside the map counts as unlabelled, by the official
        rule: ``start >= size`` or ``end < 0``.

        Args:
            keypoints_crop: (B, K, 2) in crop pixels; unlabelled joints may hold anything.
            visibility: COCO visibility, (B, K).

        Returns:
            Heatmaps (B, K, H, W), zero where the weight is, and weights (B, K), 0 or 1.
        """
        labelled = visibility > 0
        keypoints_crop = torch.where(labelled[..., None], keypoints_crop, 0.0)
        centres = self._centres(keypoints_crop / self._stride(keypoints_crop))
        reach = _WINDOW * self.sigma
        sizes = centres.new_tensor(self.heatmap_size[::-1])
        near = (centres - reach < sizes) & (centres + reach + 1 >= 0)
        weights = labelled & near.all(dim=-1)
        rest = torch.stack((weights, torch.ones_like(weights)), dim=-1).to(keypoints_crop.dtype)
        modes = torch.cat((keypoints_crop, rest), dim=-1)
        return self.render(modes[:, :, None]), weights.float()

    def render(self, modes: Tensor) -> Tensor:
        """Draw modes (B, K, M, 4) as heatmaps (B, K, H, W), the highest where they overlap."""
        centres = self._centres(modes[..., :2] / self._stride(modes))
        spread = self.sigma * modes[..., 3].clamp_min(_TINY)
        height, width = self.heatmap_size
        along_x = self._profile(centres[..., 0], spread, width)
        along_y = self._profile(centres[..., 1], spread, height)
        maps = along_y[..., :, None] * along_x[..., None, :]  # (B, K, M, H, W)
        peaks = modes[..., 2, None, None]
        return torch.where(peaks > 0, maps * peaks, 0.0).amax(dim=2).float()

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

        A maximum exceeds its eight neighbours. Its width is that of the Gaussian with the same
        curvature of the log, kept within WIDTH_RANGE; its height is such that the drawn Gaussian
        has the map's value in the peak's cell.

        Args:
            heatmaps: (B, K, H, W); no gradient flows back.
            count: modes a joint, M.

        Returns:
            Modes (B, K, M, 4), in the order of the cells' values; (0, 0, 0, 1) where none is left.
        """
        maps = self._checked(heatmaps)
        values, cells = _highest(torch.where(_is_peak(maps), maps, 0.0), count)
        refined = self._refine(maps, cells)
        spread = self.sigma * _width_at(maps, cells, self.sigma)
        away = self._centres(refined) - _cell_xy(cells, self.heatmap_size[1])
        # a step beyond half a cell on both axes comes from noise, not from a Gaussian's peak
        distance = away.square().sum(dim=-1).clamp_max(0.5)
        heights = values * torch.exp(distance / (2 * spread.square()))
        places = (refined * self._stride(maps)).unbind(dim=-1)
        modes = torch.stack((*places, heights, spread / self.sigma), dim=-1)
        nothing = modes.new_tensor((0.0, 0.0, 0.0, 1.0))
        return torch.where(values[..., None] > 0, modes, nothing)

    def _stride(self, like: Tensor) -> Tensor:
        """Crop pixels per cell along x and y."""
        (height, width), (rows, columns) = self.input_size, self.heatmap_size
        return like.new_tensor((width / columns, height / rows))

    def _checked(self, heatmaps: Tensor) -> Tensor:
        if tuple(heatmaps.shape[-2:]) != tuple(self.heatmap_size):
            raise ValueError(
                f"heatmaps must have the codec's size, got {tuple(heatmaps.shape[-2:])} and "
                f"{self.heatmap_size=}; build the codec for the network's output"
            )
        return heatmaps.detach().float()

    def _profile(self, centres: Tensor, spread: Tensor, size: int) -> Tensor:
        """One-dimensional Gaussians (..., size), cut off where the codec cuts them."""
        cells = torch.arange(size, device=centres.device, dtype=centres.dtype)
        ratio = (cells - centres[..., None]) / spread[..., None]
        profile = torch.exp(-0.5 * ratio.square())
        return torch.where(ratio.abs() <= self._reach(), profile, 0.0)

    @abc.abstractmethod
    def _reach(self) -> float:
        """How far a Gaussian is drawn, in sigmas."""

    @abc.abstractmethod
    def _centres(self, keypoints_heatmap: Tensor) -> Tensor:
        """Where Gaussians are drawn for these places, in cells."""

    @abc.abstractmethod
    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        """Peaks (..., 2) in cells, between the cells around the flat indices ``cells``."""


@dataclasses.dataclass(frozen=True)
class Msra(_GaussianMaps):
    """Gaussians on whole cells, 3 sigma wide; a quarter cell towards the higher neighbour.

    Equal to the targets and the decoding of leoxiaobin/deep-high-resolution-net.pytorch.
    """

    def _reach(self) -> float:
        return _WINDOW + 1e-4

    def _centres(self, keypoints_heatmap: Tensor) -> Tensor:
        return torch.trunc(keypoints_heatmap + 0.5)  # the official int(), also below zero

    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        height, width = self.heatmap_size
        places = _cell_xy(cells, width)
        x, y = places.unbind(dim=-1)
        slope = torch.stack(
            (
                _values_at(maps, cells, 1, 0) - _values_at(maps, cells, -1, 0),
                _values_at(maps, cells, 0, 1) - _values_at(maps, cells, 0, -1),
            ),
            dim=-1,
        )
        inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
        return places + torch.where(inside[..., None], 0.25 * torch.sign(slope), 0.0)


@dataclasses.dataclass(frozen=True)
class Dark(_GaussianMaps):
    """Gaussians at the exact place, uncut; a Taylor step on the log of the smoothed map."""

    def _reach(self) -> float:
        return math.inf

    def _centres(self, keypoints_heatmap: Tensor) -> Tensor:
        return keypoints_heatmap

    def _refine(self, maps: Tensor, cells: Tensor) -> Tensor:
        height, width = self.heatmap_size
        places = _cell_xy(cells, width)
        x, y = places.unbind(dim=-1)
        logs = torch.log(_smoothed(maps).clamp_min(_TINY))
        inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        return places + torch.where(inside[..., None], _taylor_step(logs, cells), 0.0)


HeatmapCodec = Msra | Dark

CODECS: dict[str, type[Msra] | type[Dark]] = {"msra": Msra, "dark": Dark}


def _cell_xy(cells: Tensor, width: int) -> Tensor:
    """Column and row of flat cell indices, as float (..., 2)."""
    return torch.stack((cells % width, cells // width), dim=-1).float()


def _values_at(maps: Tensor, cells: Tensor, right: int, down: int) -> Tensor:
    """The maps' values so many cells away from flat indices (B, K, M); the edge's beyond it."""
    height, width = maps.shape[-2:]
    columns = (cells % width + right).clamp(0, width - 1)
    rows = (cells // width + down).clamp(0, height - 1)
    return maps.flatten(2).gather(2, rows * width + columns)


def _highest(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and flat indices (B, K, count) of the highest cells; of equal ones the first."""
    left = maps.flatten(2)
    found = []
    for _ in range(count):
        found.append(left.max(dim=-1, keepdim=True))
        left = left.scatter(2, found[-1].indices, 0.0)
    values = torch.cat([peak.values for peak in found], dim=-1)
    return values, torch.cat([peak.indices for peak in found], dim=-1)


def _is_peak(maps: Tensor) -> Tensor:
    """True where a cell exceeds its eight neighbours; of equal neighbours the first one counts."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (1, 1, 1, 1), value=-math.inf)
    around = [
        padded[..., row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    ]
    before = torch.stack(around[:4]).amax(dim=0)
    after = torch.stack(around[5:]).amax(dim=0)
    return (maps > before) & (maps >= after)


def _width_at(maps: Tensor, cells: Tensor, sigma: float) -> Tensor:
    """Width of the peaks at flat indices (B, K, M), a multiple of sigma; 1 in a corner.

    The second difference of the log over two cells, which noise disturbs a quarter as much as
    over one, averaged over the axes on which both neighbours lie in the map.
    """
    height, width = maps.shape[-2:]
    here = _values_at(maps, cells, 0, 0).clamp_min(_TINY)
    floor = 1e-3 * here
    columns, rows = cells % width, cells // width
    total = torch.zeros_like(here)
    axes = torch.zeros_like(here)
    for right, down, place, size in ((2, 0, columns, width), (0, 2, rows, height)):
        ahead = torch.maximum(_values_at(maps, cells, right, down), floor)
        behind = torch.maximum(_values_at(maps, cells, -right, -down), floor)
        curvature = (2 * here.log() - ahead.log() - behind.log()) / 4
        inside = (place > 1) & (place < size - 2)
        total = total + torch.where(inside, curvature, 0.0)
        axes = axes + inside
    curvature = torch.where(axes > 0, total / axes.clamp_min(1), sigma**-2)
    return (curvature.clamp_min(_TINY).rsqrt() / sigma).clamp(*WIDTH_RANGE)


def _smoothed(maps: Tensor) -> Tensor:
    """The maps under a Gaussian blur, zero beyond the edge, each scaled to its former maximum."""
    down, across = (_blur_matrix(size, maps) for size in maps.shape[-2:])
    blurred = down @ maps @ across
    before = maps.amax(dim=(2, 3), keepdim=True)
    after = blurred.amax(dim=(2, 3), keepdim=True)
    return torch.where(after > 0, blurred * before / after.clamp_min(_TINY), blurred)


def _blur_matrix(size: int, like: Tensor) -> Tensor:
    """The blur along one axis as a band matrix; on small maps many times as fast as conv2d."""
    cells = torch.arange(size, device=like.device, dtype=like.dtype)
    offsets = cells[:, None] - cells
    weights = torch.exp(-0.5 * (offsets / _BLUR_SIGMA).square())
    reach = range(-(_BLUR_KERNEL // 2), _BLUR_KERNEL // 2 + 1)
    total = sum(math.exp(-0.5 * (offset / _BLUR_SIGMA) ** 2) for offset in reach)
    return torch.where(offsets.abs() <= reach[-1], weights / total, 0.0)


def _taylor_step(logs: Tensor, cells: Tensor) -> Tensor:
    """Newton's step (..., 2) towards the maximum of log maps from flat indices (B, K, M).

    Zero where the log is no hill and at most _REACH_OF_FIT cells on an axis, so that neither a
    saddle between two people nor a flat, noisy map throws a joint away.
    """

    def at(right: int, down: int) -> Tensor:
        return _values_at(logs, cells, right, down)

    here = at(0, 0)
    slope_x = 0.5 * (at(1, 0) - at(-1, 0))
    slope_y = 0.5 * (at(0, 1) - at(0, -1))
    bend_xx = 0.25 * (at(2, 0) - 2 * here + at(-2, 0))
    bend_yy = 0.25 * (at(0, 2) - 2 * here + at(0, -2))
    bend_xy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    determinant = bend_xx * bend_yy - bend_xy.square()
    is_hill = (determinant > 0) & (bend_xx < 0)
    divisor = torch.where(is_hill, determinant, 1.0)
    step_x = (bend_xy * slope_y - bend_yy * slope_x) / divisor
    step_y = (bend_xy * slope_x - bend_xx * slope_y) / divisor
    step = torch.stack((step_x, step_y), dim=-1).clamp(-_REACH_OF_FIT, _REACH_OF_FIT)
    return torch.where(is_hill[..., None], step, 0.0)
