"""Stage 2, fine: IGP-GCN moves the joints, level by level, to the teacher's pose and the truth."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.codecs.codec import HeatmapCodec
from models.igp_gcn import IgpGcn
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.config.schema import JITTER, OptimizerConfig, RefineConfig
from study.training.batches import Batch
from study.training.losses import Term, choice_loss, oks_loss, smooth_l1_loss
from study.training.pose_errors import PoseErrors, disturb_candidates, jittered

CHOICE_WEIGHT = 1.0
"""Of the choice among candidates, which all levels build on."""
LEVEL_WEIGHTS = (0.3, 0.5, 1.0)
"""OPEC-Net's weights of a coarse, middle and fine level that all aim at the final pose."""


class RefineTask(nn.Module):
    """The student and the refiner that learns on top of it.

    A frozen student stays as it is, to the bit, and no graph is built through it. A finetuned one
    learns through the features that the refiner reads, at a share of the rate: decoding passes no
    gradient, so what only its heatmaps hang on stays frozen, and its batch norms keep their
    statistics.
    """

    name = "refine"
    uncertainty = None
    """Its weights are the settings'."""

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        refiner: IgpGcn,
        skeleton: Skeleton,
        settings: RefineConfig,
        errors: PoseErrors | None = None,
        *,
        flip_test: bool = False,
    ) -> None:
        super().__init__()
        self.student = student.eval()
        self.is_finetuned = settings.student == "finetuned"
        learning = read_parameters(student, codec, settings.levels) if self.is_finetuned else []
        student.requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_()
        if refiner.mirror_pairs is not None:
            refiner.mirror_pairs.requires_grad_(False)
        self.refiner = refiner
        self.codec = codec
        self.skeleton = skeleton
        self.settings = settings
        self.errors = errors
        """Added to the student's pose in training; None leaves it, and a given one, as it is."""
        self.flip_order = skeleton.flip_order if flip_test else None

    def train(self, mode: bool = True) -> RefineTask:
        """The refiner is in this mode; the student sleeps always."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Term]:
        with torch.set_grad_enabled(self.is_finetuned and torch.is_grad_enabled()):
            out = self.student.predict(batch.crops)
        height = batch.crops.shape[-2]
        disturb = None if self.errors is None else functools.partial(self._disturbed, batch)
        given = self.given(batch)
        poses, choice, candidates = self.refiner.refine(self.codec, out, given, disturb)
        start = choice.keypoints_crop
        terms = {}
        for name, (target, weights) in self._targets(batch).items():
            term = self._over_levels(poses, start, target, weights, batch.areas_crop, height)
            if choice.logits is not None:
                places, sigmas = candidates[..., :2], self.skeleton.oks_sigmas
                chosen = choice_loss(
                    choice.logits, places, target, weights, batch.areas_crop, sigmas
                )
                term = Term(term.sum + CHOICE_WEIGHT * chosen.sum, term.count)
            terms[name] = term
        return terms

    def given(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Another method's keypoints and scores, real or made up; None for the student's."""
        if self.settings.start == JITTER:
            labels = (batch.keypoints_crop, batch.visibility, batch.areas_crop)
            return jittered(*labels, self.settings.jitter)
        if batch.start_crop is None:
            return None
        return batch.start_crop[..., :2], batch.start_crop[..., 2]

    def _disturbed(self, batch: Batch, candidates: Tensor) -> Tensor:
        """Disturb the candidates (B, K, M, 3) by the student's errors on unseen people."""
        assert self.errors is not None
        return disturb_candidates(
            candidates,
            batch.keypoints_crop,
            batch.visibility,
            batch.neighbor_crop,
            batch.neighbor_visibility,
            batch.areas_crop,
            self.errors,
            self.skeleton,
        )

    def _targets(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Each term's pose (B, K, 2) and the weights (B, K) of its joints.

        Without a teacher, as where labels alone are learned from, its term is 0.
        """
        truth, labeled = batch.keypoints_crop, (batch.visibility > 0).float()
        if batch.teacher_modes is None or batch.teacher_mask is None:
            return {"teacher": (truth, torch.zeros_like(labeled)), "truth": (truth, labeled)}
        best = batch.teacher_modes[:, :, 0]
        taught = best[..., 2].clamp(0, 1) * batch.teacher_mask
        return {"teacher": (best[..., :2], taught), "truth": (truth, labeled)}

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
        """The refiner, and a finetuned student at its share of the rate."""
        learning = [p for p in self.refiner.parameters() if p.requires_grad]
        groups: list[dict[str, object]] = [{"params": learning, "lr": optimizer.lr}]
        if self.is_finetuned:
            learning = [p for p in self.student.parameters() if p.requires_grad]
            groups.append({"params": learning, "lr": optimizer.lr * self.settings.student_factor})
        return groups

    def trainable(self) -> Iterable[nn.Module]:
        """The modules to put in train mode; the student's batch norms stay asleep."""
        return [self.refiner]

    def estimator(self) -> RefinedPose:
        """What is evaluated: crops to keypoints and scores."""
        return RefinedPose(self.student, self.codec, self.refiner, self.flip_order)


def read_parameters(student: PoseNetwork, codec: HeatmapCodec, levels: int) -> list[nn.Parameter]:
    """The student's parameters that the finest ``levels`` maps of its pyramid hang on.

    Found by a look at an empty crop, so that they are the same for every architecture: a heatmap
    head, which no gradient reaches in stage 2, must not be waited for by other workers.
    """
    student.requires_grad_()
    parameters = list(student.parameters())
    crop = next(student.parameters()).new_zeros((1, 3, *codec.input_size))
    with torch.enable_grad():
        sums = [features.sum() for features in student.predict(crop).pyramid[-levels:]]
    gradients = torch.autograd.grad(sums, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
