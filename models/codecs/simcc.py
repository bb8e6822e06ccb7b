"""SimCC: a joint's x and y are each classified among fine bins. Li et al., ECCV 2022.

The crop's frame is the official HRNet's; bin i is at crop pixel i / SPLIT_RATIO. The network also
predicts heatmaps, encoded as by ``dark``, which the structure losses and the refiner use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.codecs.gaussian import WINDOW, Dark, touches
from models.codecs.heatmap_peaks import highest, is_peak, width_at
from models.pose_features import PoseFeatures

SPLIT_RATIO = 2
"""Bins per crop pixel."""
LOWEST_MODE = 0.01
"""Least height of a mode relative to the joint's first; lower ones are noise of the softmax."""
_TINY = 1e-10


@dataclasses.dataclass(frozen=True)
class SimCC(Dark):
    """Gaussian labels over the bins of each axis; decodes the highest bin of each.

    Scores and heights are the lower one of both axes' peaks, relative to a perfect label's and at
    most 1. Labels are those of mmpose; at sigma 2 their spread is the published one, 4.9 and 5.66
    bins along the axes of a crop of 192 x 256 (width x height).
    """

    @property
    def num_bins(self) -> tuple[int, int]:
        """Number of bins along x and y."""
        height, width = self.input_size
        return SPLIT_RATIO * width, SPLIT_RATIO * height

    @property
    def spread(self) -> tuple[float, float]:
        """Sigma of a label along x and y, in bins."""
        height, width = self.input_size
        return self.sigma / 2 * math.sqrt(width / 8), self.sigma / 2 * math.sqrt(height / 8)

    def encode_bins(
        self, keypoints_crop: Tensor, visibility: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Encode each labeled joint as a Gaussian around its bin on both axes.

        Args:
            keypoints_crop: (B, K, 2) in crop pixels; unlabeled joints may have any values.
            visibility: above 0 where a joint is labeled, (B, K).

        Returns:
            Labels (B, K, 2w) and (B, K, 2h), which sum to the weights, and weights (B, K), 0 or 1.
            The weight is 0 for unlabeled joints and those whose window lies outside the crop.
        """
        labeled = visibility > 0
        places = torch.where(labeled[..., None], keypoints_crop, 0.0) * SPLIT_RATIO
        places = places.round()
        sizes, spread = places.new_tensor(self.num_bins), places.new_tensor(self.spread)
        weights = (labeled & touches(places, WINDOW * spread, sizes)).float()
        along_x, along_y = (
            self._profile(places[..., axis], spread[axis].expand_as(weights), bins)
            for axis, bins in enumerate(self.num_bins)
        )
        labels = (_normalized(along_x, weights), _normalized(along_y, weights))
        return labels, weights

    def decode_features(self, features: PoseFeatures) -> tuple[Tensor, Tensor]:
        """Decode a network's keypoints_crop (B, K, 2) and scores (B, K), without gradient."""
        peaks = [profile.max(dim=-1) for profile in self._shares(features)]
        x, y = (peak.indices / SPLIT_RATIO for peak in peaks)
        scores = torch.minimum(peaks[0].values, peaks[1].values).clamp_max(1)
        return torch.stack((x, y), dim=-1), scores

    def decode_feature_modes(self, features: PoseFeatures, count: int) -> Tensor:
        """Decode ``count`` modes per joint, (B, K, M, 4), the first as in ``decode_features``.

        They are pairs of both axes' peaks. The bins don't show which x belongs to which y, so that
        with two people each x may be paired with the other one's y too.
        """
        peaks = []
        for shares, spread in zip(self._shares(features), self.spread, strict=True):
            maps = shares[:, :, None]  # (B, K, 1, bins)
            heights, bins = highest(torch.where(is_peak(maps), maps, 0.0), count)
            peaks.append((heights, bins, width_at(maps, bins, spread, round(spread))))
        (height_x, bin_x, width_x), (height_y, bin_y, width_y) = peaks
        pairs = torch.minimum(height_x[..., None, :], height_y[..., None])  # (B, K, My, Mx)
        heights, cells = highest(pairs, count)
        column, row = cells % count, cells // count
        modes = torch.stack(
            (
                bin_x.gather(2, column) / SPLIT_RATIO,
                bin_y.gather(2, row) / SPLIT_RATIO,
                heights.clamp_max(1),
                (width_x.gather(2, column) + width_y.gather(2, row)) / 2,
            ),
            dim=-1,
        )
        nothing = modes.new_tensor((0.0, 0.0, 0.0, 1.0))
        is_mode = heights > LOWEST_MODE * heights[..., :1]
        return torch.where(is_mode[..., None], modes, nothing)

    def flip_back(self, mirrored: PoseFeatures, flip_order: Sequence[int]) -> PoseFeatures:
        """Convert a network's output for a mirrored crop to that for the crop itself.

        Pixel x came from w - 1 - x, so bin i came from bin 2 (w - 1) - i. The last bin came from
        none and takes its neighbor's value.
        """
        assert mirrored.bins is not None
        along_x, along_y = (bins[:, list(flip_order)] for bins in mirrored.bins)
        reversed_x = along_x.flip(-1)[..., SPLIT_RATIO - 1 :]
        edge = reversed_x[..., -1:].expand(*reversed_x.shape[:-1], SPLIT_RATIO - 1)
        bins = (torch.cat((reversed_x, edge), dim=-1), along_y)
        return super().flip_back(mirrored, flip_order)._replace(bins=bins)

    def _shares(self, features: PoseFeatures) -> list[Tensor]:
        """Probabilities of the bins of each axis, relative to a perfect label's peak."""
        assert features.bins is not None
        sizes = tuple(bins.shape[-1] for bins in features.bins)
        if sizes != self.num_bins:
            raise ValueError(
                f"the number of bins must be the codec's, got {sizes} and {self.num_bins=}; build "
                "the head for the codec"
            )
        return [
            bins.detach().float().softmax(dim=-1) * (spread * math.sqrt(2 * math.pi))
            for bins, spread in zip(features.bins, self.spread, strict=True)
        ]


def _normalized(profiles: Tensor, weights: Tensor) -> Tensor:
    total = profiles.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    return profiles / total * weights[..., None]
