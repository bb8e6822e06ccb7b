"""MoveNet's decoding (Google, single pose, version 4; Apache 2.0): one person among several peaks.

For ``mobile_net`` with MoveNet's person heads; ``models/movenet_weights.py`` loads their weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from models.codecs.gaussian import Dark
from models.pose_features import PoseFeatures

_NEAR = 1.8
"""Cells that MoveNet adds to a distance before it divides by it; its files hold it in half
precision."""
_SAME_PEAK = 2.0
"""A peak within this many cells of MoveNet's keypoint is the keypoint's own."""


@dataclasses.dataclass(frozen=True)
class MoveNet(Dark):
    """Picks, of a heatmap's peaks, the one near which the person's center expects the joint.

    The network must have the person heads. In MoveNet's heatmaps a joint's peak is the cell that
    contains it: cell i covers the crop pixels from stride * i to stride * (i + 1). ``dark``, which
    places the center of cell i at stride * i, would decode them half a cell too low.
    """

    def decode_features(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """Decode each joint by the official rule, without gradient.

        The center is the cell with the highest value of the center map, weighted down with the
        distance from the middle. A joint's cell has the highest value of its heatmap, weighted
        down with the distance from where ``regression`` at the center expects it. Its keypoint is
        that cell plus the ``offsets`` there.

        Returns:
            keypoints_crop (B, K, 2) and scores (B, K), the heatmaps' values at those cells.

        Raises:
            ValueError: the network has no person heads.
        """
        heatmaps, person = self._checked(features.heatmaps), features.person
        if person is None:
            raise ValueError(
                "codec movenet must have a MoveNet with all its heads, got heatmaps only; "
                "change the codec"
            )
        height, width = self.heatmap_size
        rows = torch.arange(height, device=heatmaps.device, dtype=heatmaps.dtype)[:, None]
        columns = torch.arange(width, device=heatmaps.device, dtype=heatmaps.dtype)
        nearness = 1 / (torch.hypot(rows - height // 2, columns - width // 2) + _NEAR)
        centers = (person.center[:, 0].float().sigmoid() * nearness).flatten(1).argmax(dim=1)
        expected = _yx_at(person.regression, centers[:, None].expand(heatmaps.shape[:2]))
        y = expected[..., 0] + (centers // width)[:, None]  # (B, K)
        x = expected[..., 1] + (centers % width)[:, None]
        away = torch.hypot(rows - y[..., None, None], columns - x[..., None, None])
        cells = (heatmaps / (away + _NEAR)).flatten(2).argmax(dim=2)
        offset_y, offset_x = _yx_at(person.offsets, cells).unbind(dim=-1)
        places = torch.stack((cells % width + offset_x, cells // width + offset_y), dim=-1)
        scores = heatmaps.flatten(2).gather(2, cells[..., None])[..., 0]
        return places * self._stride(places), scores

    def decode_feature_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """List the official keypoint as first mode, then the heatmaps' other peaks, highest first.

        A peak near the keypoint belongs to it: it sets the first mode's width and is not listed.

        Returns:
            Modes (B, K, count, 4), as those of ``decode_modes``.
        """
        places, scores = self.decode_features(features)
        stride = self._stride(places)
        peaks = self.decode_modes(features.heatmaps, count)
        half_a_cell = torch.cat((stride / 2, stride.new_zeros(2)))
        peaks = torch.where(peaks[..., 2:3] > 0, peaks + half_a_cell, peaks)
        away = ((peaks[..., :2] - places[:, :, None]) / stride).norm(dim=-1)
        is_same = (away <= _SAME_PEAK) & (peaks[..., 2] > 0)
        widths = torch.where(is_same, peaks[..., 3], 0.0).amax(dim=-1)
        widths = torch.where(is_same.any(dim=-1), widths, 1.0)
        first = torch.stack((*places.unbind(dim=-1), scores, widths), dim=-1)
        nothing = peaks.new_tensor((0.0, 0.0, 0.0, 1.0))
        others = torch.where(is_same[..., None], nothing, peaks)
        order = others[..., 2].argsort(dim=-1, descending=True, stable=True)[..., : count - 1]
        others = others.gather(2, order[..., None].expand(*order.shape, 4))
        return torch.cat((first[:, :, None], others), dim=2)


def _yx_at(maps: Tensor, cells: Tensor) -> Tensor:
    """Gather each joint's (y, x), (B, K, 2), from maps (B, 2 K, H, W) at its cell, (B, K)."""
    pairs = maps.detach().float().flatten(2).unflatten(1, (-1, 2))  # (B, K, 2, H W)
    return pairs.gather(3, cells[:, :, None, None].expand(-1, -1, 2, 1))[..., 0]
