"""Stage 2, fine: IGP-GCN moves the student's joints, level by level, to the teacher's pose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.codec import HeatmapCodec
from models.igp_gcn import IgpGcn
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.batches import Batch
from study.config import OptimizerConfig, RefineConfig
from study.losses import Term, oks_loss, smooth_l1_loss
from study.pose_errors import PoseErrors, disturb

LEVEL_WEIGHTS = (0.3, 0.5, 1.0)
"""OPEC-Net's weights of a coarse, middle and fine level that all aim at the final pose."""


class RefineTask(nn.Module):
    """The frozen student and the refiner that learns on top of it."""

    name = "refine"

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        refiner: IgpGcn,
        skeleton: Skeleton,
        settings: RefineConfig,
        errors: PoseErrors | None = None,
    ) -> None:
        super().__init__()
        self.student = student.requires_grad_(False).eval()
        self.refiner = refiner
        self.codec = codec
        self.skeleton = skeleton
        self.settings = settings
        self.errors = errors
        """Added to the student's pose in training; None leaves it as it is."""

    def train(self, mode: bool = True) -> RefineTask:
        """The refiner is in this mode; the student sleeps always."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Term]:
        assert batch.teacher_modes is not None
        with torch.no_grad():
            out = self.student.look(batch.crops)
            start, scores = self.codec.read(out)
            if self.errors is not None:
                start = disturb(
                    start,
                    batch.keypoints_crop,
                    batch.visibility,
                    batch.neighbour_crop,
                    batch.neighbour_visibility,
                    batch.areas_crop,
                    self.errors,
                    self.skeleton,
                )
        height, width = batch.crops.shape[-2:]
        poses = self.refiner(out.pyramid, start, scores, (height, width))
        best = batch.teacher_modes[:, :, 0]
        targets = {
            "teacher": (best[..., :2], best[..., 2].clamp(0, 1)),
            "truth": (batch.keypoints_crop, (batch.visibility > 0).float()),
        }
        return {
            name: self._over_levels(poses, start, target, weights, batch.areas_crop, height)
            for name, (target, weights) in targets.items()
        }

    def _over_levels(
        self,
        poses: list[Tensor],
        start: Tensor,
        target: Tensor,
        weights: Tensor,
        areas: Tensor,
        height: int,
    ) -> Term:
        """The levels' weighted sum of distances to ``target``, in units of the crop's height."""
        total = start.new_zeros(())
        count = start.new_zeros(())
        for level, (pose, factor) in enumerate(zip(poses, self._level_weights(), strict=True), 1):
            aim = target
            if self.settings.progressive == "interpolated":
                aim = start + (target - start) * (level / len(poses))
            if self.settings.loss == "oks":
                sigmas = self.skeleton.oks_sigmas
                term = oks_loss(pose / height, aim / height, weights, areas / height**2, sigmas)
            else:
                cell = 1 / self.codec.heatmap_size[0]
                term = smooth_l1_loss(pose / height, aim / height, weights, cell)
            total, count = total + factor * term.sum, term.count
        return Term(total, count)

    def _level_weights(self) -> tuple[float, ...]:
        if self.settings.progressive == "interpolated":
            return (1.0,) * self.settings.levels
        return LEVEL_WEIGHTS[-self.settings.levels :]

    def weights(self, progress: float) -> dict[str, float]:
        """Each term's factor in the loss."""
        return {"teacher": self.settings.teacher_weight, "truth": self.settings.truth_weight}

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        return [{"params": list(self.refiner.parameters()), "lr": optimizer.lr}]

    def trainable(self) -> Iterable[nn.Module]:
        """The modules to put in train mode; the student's batch norms stay asleep."""
        return [self.refiner]

    def estimator(self) -> RefinedPose:
        """What is evaluated: crops to keypoints and scores."""
        return RefinedPose(self.student, self.codec, self.refiner)
