"""Finds peaks of heatmaps (B, K, H, W), refined below the cell.

Cells are flat indices (B, K, M) into H * W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH_RANGE = (0.5, 3.0)
"""Bounds of a mode's width, multiples of sigma."""
_BLUR_KERNEL = 11
_BLUR_SIGMA = 0.3 * ((_BLUR_KERNEL - 1) * 0.5 - 1) + 0.8  # OpenCV's default for this kernel
MAX_STEP = 2.0
"""Longest step on an axis, in cells: DARK takes its second differences from no further."""
_TINY = 1e-10


def cell_xy(cells: Tensor, width: int) -> Tensor:
    """Convert flat indices to column and row, as float (..., 2)."""
    return torch.stack((cells % width, cells // width), dim=-1).float()


def values_at(maps: Tensor, cells: Tensor, right: int, down: int) -> Tensor:
    """Read the maps ``right`` columns and ``down`` rows from cells (B, K, M), edges clamped."""
    height, width = maps.shape[-2:]
    columns = (cells % width + right).clamp(0, width - 1)
    rows = (cells // width + down).clamp(0, height - 1)
    return maps.flatten(2).gather(2, rows * width + columns)


def highest(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and flat indices (B, K, count) of the highest cells; first among equals."""
    remaining = maps.flatten(2)
    peaks = []
    for _ in range(count):
        peaks.append(remaining.max(dim=-1, keepdim=True))
        remaining = remaining.scatter(2, peaks[-1].indices, 0.0)
    values = torch.cat([peak.values for peak in peaks], dim=-1)
    return values, torch.cat([peak.indices for peak in peaks], dim=-1)


def is_peak(maps: Tensor) -> Tensor:
    """Mark cells that exceed their eight neighbors; among equal neighbors the first one."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (1, 1, 1, 1), value=-math.inf)
    neighborhood = [
        padded[..., row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    ]
    before = torch.stack(neighborhood[:4]).amax(dim=0)
    after = torch.stack(neighborhood[5:]).amax(dim=0)
    return (maps > before) & (maps >= after)


def width_at(maps: Tensor, cells: Tensor, sigma: float, reach: int = 2) -> Tensor:
    """Estimate the peaks' width at cells (B, K, M), a multiple of sigma; 1 in a corner.

    It follows from the second difference of the log, averaged over the axes on which both cells
    at distance ``reach`` are in the map. A larger ``reach`` is less sensitive to noise.
    """
    height, width = maps.shape[-2:]
    here = values_at(maps, cells, 0, 0).clamp_min(_TINY)
    floor = 1e-3 * here
    columns, rows = cells % width, cells // width
    total = torch.zeros_like(here)
    axes = torch.zeros_like(here)
    for right, down, place, size in (
        (reach, 0, columns, width),
        (0, reach, rows, height),
    ):
        ahead = torch.maximum(values_at(maps, cells, right, down), floor)
        behind = torch.maximum(values_at(maps, cells, -right, -down), floor)
        curvature = (2 * here.log() - ahead.log() - behind.log()) / reach**2
        inside = (place >= reach) & (place < size - reach)
        total = total + torch.where(inside, curvature, 0.0)
        axes = axes + inside
    curvature = torch.where(axes > 0, total / axes.clamp_min(1), sigma**-2)
    return (curvature.clamp_min(_TINY).rsqrt() / sigma).clamp(*WIDTH_RANGE)


def smoothed(maps: Tensor) -> Tensor:
    """Blur the maps with a Gaussian, zero beyond the edge, and restore each map's maximum."""
    blur_y, blur_x = (_blur_matrix(size, maps) for size in maps.shape[-2:])
    blurred = blur_y @ maps @ blur_x
    before = maps.amax(dim=(2, 3), keepdim=True)
    after = blurred.amax(dim=(2, 3), keepdim=True)
    return torch.where(after > 0, blurred * before / after.clamp_min(_TINY), blurred)


def _blur_matrix(size: int, like: Tensor) -> Tensor:
    """The blur along one axis as a band matrix; on small maps much faster than conv2d."""
    cells = torch.arange(size, device=like.device, dtype=like.dtype)
    offsets = cells[:, None] - cells
    weights = torch.exp(-0.5 * (offsets / _BLUR_SIGMA).square())
    reach = range(-(_BLUR_KERNEL // 2), _BLUR_KERNEL // 2 + 1)
    total = sum(math.exp(-0.5 * (offset / _BLUR_SIGMA) ** 2) for offset in reach)
    return torch.where(offsets.abs() <= reach[-1], weights / total, 0.0)


def dark_step(logs: Tensor, cells: Tensor) -> Tensor:
    """Compute DARK's Taylor step (..., 2) on log maps from cells (B, K, M)."""

    def at(right: int, down: int) -> Tensor:
        return values_at(logs, cells, right, down)

    here = at(0, 0)
    slope_x = 0.5 * (at(1, 0) - at(-1, 0))
    slope_y = 0.5 * (at(0, 1) - at(0, -1))
    bend_xx = 0.25 * (at(2, 0) - 2 * here + at(-2, 0))
    bend_yy = 0.25 * (at(0, 2) - 2 * here + at(0, -2))
    bend_xy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    return _newton_step(slope_x, slope_y, bend_xx, bend_yy, bend_xy)


def udp_step(logs: Tensor, cells: Tensor) -> Tensor:
    """Compute UDP's Taylor step (..., 2) on log maps from cells (B, K, M).

    In the outermost cells the step is taken as published, half a cell outwards, even if the map
    is no hill there: beyond the edge values repeat, and the blur assumed zeros.
    """

    def at(right: int, down: int) -> Tensor:
        return values_at(logs, cells, right, down)

    here = at(0, 0)
    right, left, below, above = at(1, 0), at(-1, 0), at(0, 1), at(0, -1)
    bend_xy = 0.5 * (at(1, 1) - right - below + 2 * here - left - above + at(-1, -1))
    return _newton_step(
        0.5 * (right - left),
        0.5 * (below - above),
        right - 2 * here + left,
        below - 2 * here + above,
        bend_xy,
        _is_outermost(logs, cells),
    )


def _is_outermost(maps: Tensor, cells: Tensor) -> Tensor:
    height, width = maps.shape[-2:]
    columns, rows = cells % width, cells // width
    return (columns % (width - 1) == 0) | (rows % (height - 1) == 0)


def _newton_step(
    slope_x: Tensor,
    slope_y: Tensor,
    bend_xx: Tensor,
    bend_yy: Tensor,
    bend_xy: Tensor,
    is_trusted: Tensor | bool = False,
) -> Tensor:
    """Compute Newton's step (..., 2) towards a maximum, at most MAX_STEP cells on an axis.

    It is 0 where the map is no hill, unless ``is_trusted``. Without these limits a saddle between
    two people, or a flat and noisy map, would move a joint far away.
    """
    determinant = bend_xx * bend_yy - bend_xy.square()
    is_used = (determinant > 0) & (bend_xx < 0) | ((determinant != 0) & is_trusted)
    divisor = torch.where(is_used, determinant, 1.0)
    step_x = (bend_xy * slope_y - bend_yy * slope_x) / divisor
    step_y = (bend_xy * slope_x - bend_xx * slope_y) / divisor
    step = torch.stack((step_x, step_y), dim=-1).clamp(-MAX_STEP, MAX_STEP)
    return torch.where(is_used[..., None], step, 0.0)
