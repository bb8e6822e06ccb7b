"""The product: crops in, keypoints out; a student, its codec and, if there is one, IGP-GCN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.codecs.codec import HeatmapCodec
from models.codecs.crop_frame import CropFrame
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork


class RefinedPose(nn.Module):
    """A student with its decoding and refinement behind one call."""

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        refiner: IgpGcn | None,
        flip_order: Sequence[int] | None = None,
    ) -> None:
        """Join the parts.

        Args:
            student: gives the heatmaps and the pyramid that the refiner reads.
            codec: the one that the student's heatmaps were trained in.
            refiner: stage 2, or None for the student alone.
            flip_order: the skeleton's, for a flip test: the student looks at the mirrored crop
                too, and both answers are averaged. None goes without.
        """
        super().__init__()
        self.student = student
        self.codec = codec
        self.refiner = refiner
        self.flip_order = flip_order

    @property
    def frame(self) -> CropFrame:
        """Where a person lies in the crops."""
        return self.codec.frame

    def forward(
        self, crops: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the pose in crops (B, 3, h, w), RGB in 0..255.

        Args:
            start: another method's keypoints_crop (B, K, 2) and scores (B, K), which the refiner
                improves: each is the first of its joint's candidates, before the student's peaks,
                once left and right have their names. A joint of score 0 is not given. None starts
                from the student's peaks alone.

        Returns:
            keypoints_crop (B, K, 2), after the last level, and scores (B, K): of given joints the
            given ones, else the heights of the student's peaks that the joints started from.
        """
        crop_size = (crops.shape[2], crops.shape[3])
        if crop_size != tuple(self.codec.input_size):
            raise ValueError(
                f"crops must have the codec's input size, got {crop_size} and "
                f"{self.codec.input_size=} (height, width); crop to that size"
            )
        features = self.predict(crops)
        if self.refiner is None:
            if start is not None:
                raise ValueError(
                    "a given pose needs a refiner to improve it, got refiner=None; use a model "
                    "that was trained with refine.epochs above 0"
                )
            return self.codec.decode_features(features)
        refined = self.refiner.refine(self.codec, features, start)
        keypoints_crop, scores = refined.poses[-1], refined.choice.scores
        if start is None:
            return keypoints_crop, scores
        _, start_scores = start
        return keypoints_crop, torch.where(start_scores > 0, start_scores, scores)

    def predict(self, crops: Tensor) -> PoseFeatures:
        """The student's answer to crops; with a flip test the mean of two, and one's features."""
        features = self.student.predict(crops)
        if self.flip_order is None:
            return features
        mirrored = self.student.predict(crops.flip(-1))
        return features.averaged_with(self.codec.flip_back(mirrored, self.flip_order))
