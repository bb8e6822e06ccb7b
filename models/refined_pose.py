"""The product: crops in, keypoints out; a student, its codec and, if there is one, IGP-GCN."""

from __future__ import annotations

from torch import Tensor, nn

from models.codec import HeatmapCodec
from models.igp_gcn import IgpGcn
from models.pose_features import PoseNetwork


class RefinedPose(nn.Module):
    """A student with its decoding and refinement behind one call."""

    def __init__(self, student: PoseNetwork, codec: HeatmapCodec, refiner: IgpGcn | None) -> None:
        """Join the parts.

        Args:
            student: gives the heatmaps and the pyramid that the refiner reads.
            codec: the one that the student's heatmaps were trained in.
            refiner: stage 2, or None for the student alone.
        """
        super().__init__()
        self.student = student
        self.codec = codec
        self.refiner = refiner

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the pose in crops (B, 3, h, w), RGB in 0..255.

        Returns:
            keypoints_crop (B, K, 2), after the last level, and the student's scores (B, K).
        """
        crop_size = (crops.shape[2], crops.shape[3])
        if crop_size != tuple(self.codec.input_size):
            raise ValueError(
                f"crops must have the codec's input size, got {crop_size} and "
                f"{self.codec.input_size=} (height, width); crop to that size"
            )
        features = self.student.look(crops)
        keypoints_crop, scores = self.codec.read(features)
        if self.refiner is not None:
            keypoints_crop = self.refiner(features.pyramid, keypoints_crop, scores, crop_size)[-1]
        return keypoints_crop, scores
