"""The head that predicts SimCC's bins, in addition to a network's heatmap head."""

from __future__ import annotations

from torch import Tensor, nn


class SimccHead(nn.Module):
    """A 1x1 convolution to one map per joint, then a linear layer per axis, shared by all joints.

    As in SimCC (Li et al., ECCV 2022).
    """

    def __init__(
        self, channels: int, num_joints: int, map_size: tuple[int, int], num_bins: tuple[int, int]
    ) -> None:
        """Build the layers.

        Args:
            channels: channels of the features.
            num_joints: K.
            map_size: height and width of the features.
            num_bins: bins along x and along y.
        """
        super().__init__()
        cells = map_size[0] * map_size[1]
        self.joints = nn.Conv2d(channels, num_joints, 1)
        self.x = nn.Linear(cells, num_bins[0])
        self.y = nn.Linear(cells, num_bins[1])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the bins' logits along x and along y, (B, K, bins), from (B, C, H, W)."""
        maps = self.joints(features).flatten(2)
        return self.x(maps), self.y(maps)
