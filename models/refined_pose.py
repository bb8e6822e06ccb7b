"""The pose estimator that is exported: student, codec and, with stage 2, refiner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.codecs.codec import HeatmapCodec
from models.codecs.crop_frame import CropFrame
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork


class RefinedPose(nn.Module):
    """Runs a student, decodes its output and refines the pose in one call."""

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        refiner: IgpGcn | None,
        flip_order: Sequence[int] | None = None,
    ) -> None:
        """Combine the parts.

        Args:
            student: predicts the heatmaps and the pyramid.
            codec: must be that of the student's training.
            refiner: the network of stage 2, or None for the student alone.
            flip_order: the skeleton's, for a flip test: the student runs on the mirrored crop too,
                and the two predictions are averaged. None disables it.
        """
        super().__init__()
        self.student = student
        self.codec = codec
        self.refiner = refiner
        self.flip_order = flip_order

    @property
    def frame(self) -> CropFrame:
        """The frame in which crops must be cut."""
        return self.codec.frame

    def forward(
        self, crops: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the poses in crops (B, 3, h, w), RGB in 0..255.

        Args:
            crops: cut in ``frame``.
            start: another method's keypoints_crop (B, K, 2) and scores (B, K) to be refined. After
                left-right swaps are resolved, each joint is its own first candidate, before the
                student's peaks. A joint of score 0 is not given. None starts from the student's
                peaks alone.

        Returns:
            keypoints_crop (B, K, 2), after the last level, and scores (B, K). A given joint keeps
            its score; any other has the height of the student's peak from which it started.

        Raises:
            ValueError: the crops have another size than the codec, or ``start`` is given without
                a refiner.
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
        """Run the student; with a flip test, average its predictions for crop and mirrored crop.

        The features in the pyramid are always those of the crop itself.
        """
        features = self.student.predict(crops)
        if self.flip_order is None:
            return features
        mirrored = self.student.predict(crops.flip(-1))
        return features.averaged_with(self.codec.flip_back(mirrored, self.flip_order))
