"""Stage 2, fine: IGP-GCN moves the joints, level by level, toward the teacher's pose and truth."""

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
"""Weight of the choice among candidates, relative to the levels' losses."""
LEVEL_WEIGHTS = (0.3, 0.5, 1.0)
"""OPEC-Net's weights of a coarse, a middle and a fine level, if all aim at the final pose."""


class RefineTask(nn.Module):
    """The student and the refiner that learns on top of it.

    A frozen student stays unchanged, to the bit, and no graph is built through it. A finetuned
    student learns, at a share of the rate, through the features that the refiner reads. Decoding
    passes no gradient, so parameters that affect only the heatmaps stay frozen; batch norms keep
    their statistics.
    """

    name = "refine"
    uncertainty = None
    """None: this stage has fixed weights."""

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
        """Errors added to the student's pose in training; None adds none."""
        self.flip_order = skeleton.flip_order if flip_test else None

    def train(self, mode: bool = True) -> RefineTask:
        """Set the refiner's mode; the student is always in eval mode."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Term]:
        with torch.set_grad_enabled(self.is_finetuned and torch.is_grad_enabled()):
            out = self.student.predict(batch.crops)
        height = batch.crops.shape[-2]
        disturb = None
        if self.errors is not None:
            disturb = functools.partial(
                disturb_candidates,
                labels=batch.labels,
                errors=self.errors,
                skeleton=self.skeleton,
            )
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
        """Return another method's keypoints and scores, or jitter's; None for the student's."""
        if self.settings.start == JITTER:
            return jittered(
                batch.keypoints_crop, batch.visibility, batch.areas_crop, self.settings.jitter
            )
        if batch.start_crop is None:
            return None
        return batch.start_crop[..., :2], batch.start_crop[..., 2]

    def _targets(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Target pose (B, K, 2) and weights of its joints (B, K) of each term.

        Without targets the teacher's term is 0.
        """
        truth, labeled = batch.keypoints_crop, (batch.visibility > 0).float()
        if batch.teacher_modes is None or batch.teacher_mask is None:
            return {"teacher": (truth, torch.zeros_like(labeled)), "truth": (truth, labeled)}
        best = batch.teacher_modes[:, :, 0]
        confidence = best[..., 2].clamp(0, 1) * batch.teacher_mask
        return {"teacher": (best[..., :2], confidence), "truth": (truth, labeled)}

    def _over_levels(
        self,
        poses: list[Tensor],
        start: Tensor,
        target: Tensor,
        weights: Tensor,
        areas: Tensor,
        height: int,
    ) -> Term:
        """Weighted sum over the levels of the distance to ``target``, in crop heights."""
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
        """Return each term's factor in the loss, the same in all epochs."""
        return {"teacher": self.settings.teacher_weight, "truth": self.settings.truth_weight}

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        """Return the refiner's parameters, and a finetuned student's at their own rate."""
        learning = [p for p in self.refiner.parameters() if p.requires_grad]
        groups: list[dict[str, object]] = [{"params": learning, "lr": optimizer.lr}]
        if self.is_finetuned:
            learning = [p for p in self.student.parameters() if p.requires_grad]
            groups.append({"params": learning, "lr": optimizer.lr * self.settings.student_factor})
        return groups

    def trainable(self) -> Iterable[nn.Module]:
        """Return the modules to put in train mode; the student is not among them."""
        return [self.refiner]

    def estimator(self) -> RefinedPose:
        """Return the student with the refiner on top, for evaluation."""
        return RefinedPose(self.student, self.codec, self.refiner, self.flip_order)


def read_parameters(student: PoseNetwork, codec: HeatmapCodec, levels: int) -> list[nn.Parameter]:
    """Return the student's parameters that affect the finest ``levels`` maps of its pyramid.

    They are found by a forward and backward pass of a black crop, for any architecture. Other
    parameters, such as a heatmap head's, get no gradient in stage 2, and DDP must not wait for
    them.
    """
    student.requires_grad_()
    parameters = list(student.parameters())
    crop = next(student.parameters()).new_zeros((1, 3, *codec.input_size))
    with torch.enable_grad():
        sums = [features.sum() for features in student.predict(crop).pyramid[-levels:]]
    gradients = torch.autograd.grad(sums, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
