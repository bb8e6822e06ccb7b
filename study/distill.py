"""Stage 1, coarse: the student learns from ground truth, the teacher's heatmaps and its structure.

A task is a module whose ``forward`` takes a batch and gives its loss terms by name, each as a sum
and a count; the loop (``loop.py``) adds the counts of all workers and weighs the terms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from models.codec import HeatmapCodec
from models.pose_features import PoseFeatures, PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.batches import Batch
from study.config import DistillConfig, OptimizerConfig
from study.losses import (
    Term,
    bone_loss,
    heatmap_kl,
    heatmap_mse,
    joint_relation,
    pairwise_loss,
    relation_loss,
    soft_argmax,
    truth_loss,
)

SCALE_BATCHES = 20
"""How many batches the initial value of a term is averaged over."""
SCALE_FLOOR = 1e-3
"""A term's scale is at least this share of what a randomly started student has."""
SECOND_MODE_SHARE = 0.5
"""A joint whose second mode is at least this high, as a share of the first, has no one place."""


class DistillTask(nn.Module):
    """The student, and what it is to agree with; without teacher terms, the truth alone."""

    name = "distill"

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        skeleton: Skeleton,
        settings: DistillConfig,
        trained: Collection[str] = frozenset(),
    ) -> None:
        """Join the parts.

        Args:
            trained: names of the student's parameters that start from trained weights.
        """
        super().__init__()
        self.student = student
        self.codec = codec
        self.skeleton = skeleton
        self.settings = settings
        self.trained = frozenset(trained)
        self.heatmap_kind = settings.heatmap.kind
        self.structure_kind = settings.structure.kind
        for term in self.term_names:
            self.register_buffer(f"scale_{term}", torch.ones(()))

    @property
    def is_pretrained(self) -> bool:
        return bool(self.trained)

    @property
    def term_names(self) -> list[str]:
        """The terms that this task has, ``truth`` first."""
        kinds = {"heatmap": self.heatmap_kind, "structure": self.structure_kind}
        return ["truth", *(term for term, kind in kinds.items() if kind != "none")]

    def forward(self, batch: Batch) -> dict[str, Term]:
        out = self.student.look(batch.crops)
        targets, weights = self.codec.encode(batch.keypoints_crop, batch.visibility)
        terms = {"truth": truth_loss(out.heatmaps, targets, weights)}
        if len(self.term_names) == 1:
            return terms
        assert batch.teacher_modes is not None and batch.teacher_taught is not None
        taught = self.codec.render(batch.teacher_modes)
        weights = batch.teacher_taught
        if self.heatmap_kind == "mse":
            terms["heatmap"] = heatmap_mse(out.heatmaps, taught, weights)
        elif self.heatmap_kind == "kl":
            tau = self.settings.heatmap.tau
            terms["heatmap"] = heatmap_kl(out.heatmaps, taught, weights, tau)
        if self.structure_kind != "none":
            terms["structure"] = self._structure(out, taught, batch)
        return terms

    def _structure(self, out: PoseFeatures, taught: Tensor, batch: Batch) -> Term:
        assert batch.teacher_modes is not None and batch.teacher_taught is not None
        confidence = confident_joints(batch.teacher_modes, self.codec.input_size)
        confidence = confidence * batch.teacher_taught
        if self.structure_kind == "relation":
            assert batch.teacher_relation is not None
            relation = joint_relation(out.heatmaps, out.pyramid[-1])
            return relation_loss(relation, batch.teacher_relation, confidence)
        height = out.heatmaps.shape[2]
        student_points = soft_argmax(out.heatmaps) / height
        teacher_points = soft_argmax(taught) / height
        if self.structure_kind == "pairwise":
            return pairwise_loss(student_points, teacher_points, confidence, 1 / height)
        edges = self.skeleton.edges
        return bone_loss(student_points, teacher_points, confidence, edges, 1 / height)

    def weights(self, progress: float) -> dict[str, float]:
        """Each term's factor in the loss, ``progress`` of the stage's epochs being over (0..1)."""
        share = {"constant": 1.0, "linear": 1 - progress, "ramp": progress}[self.settings.schedule]
        weights = {
            "heatmap": self.settings.heatmap.weight,
            "structure": self.settings.structure.weight,
        }
        factors = {"truth": 1.0}
        for term in self.term_names[1:]:
            factors[term] = share * weights[term]
        return {term: factor / float(self.scale(term)) for term, factor in factors.items()}

    def scale(self, term: str) -> Tensor:
        """What a term is divided by: its mean before training, 1 if that was never measured."""
        scale = getattr(self, f"scale_{term}")
        assert isinstance(scale, Tensor)
        return scale

    def set_scales(self, means: dict[str, float], random_means: dict[str, float] | None) -> None:
        """Divides each term by its mean before training, so that weights mean the same everywhere.

        Args:
            random_means: those of a randomly started student, which set the floor for one that
                starts from trained weights and so near zero.
        """
        for term, mean in means.items():
            floor = SCALE_FLOOR * (random_means or means)[term]
            self.scale(term).fill_(max(mean, floor) or 1.0)

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        """All layers; those that start from trained weights at a share of the rate."""
        new: list[nn.Parameter] = []
        old: list[nn.Parameter] = []
        for name, parameter in self.student.named_parameters():
            (old if name in self.trained else new).append(parameter)
        rates = ((new, optimizer.lr), (old, optimizer.lr * optimizer.pretrained_factor))
        return [{"params": group, "lr": rate} for group, rate in rates if group]

    def trainable(self) -> Iterable[nn.Module]:
        """The modules to put in train mode."""
        return [self.student]

    def estimator(self) -> RefinedPose:
        """What is evaluated: crops to keypoints and scores."""
        return RefinedPose(self.student, self.codec, None)


def confident_joints(modes: Tensor, input_size: tuple[int, int]) -> Tensor:
    """The teacher's confidence in each joint's place, (B, K), 0 where two places rival or none is.

    A soft-argmax over two peaks lies between two people, that of a map whose joint was cut off
    lies in the map's middle; no joint is at either.

    Args:
        modes: (B, K, M, 4): x, y in crop pixels, height, width; highest first.
        input_size: (height, width) of the crop.
    """
    heights = modes[..., 2].clamp(0, 1)
    places = modes[:, :, 0, :2]
    is_clear = ((places >= 0) & (places < places.new_tensor(input_size[::-1]))).all(dim=-1)
    if heights.shape[-1] > 1:
        is_clear &= heights[..., 1] < SECOND_MODE_SHARE * heights[..., 0]
    return torch.where(is_clear, heights[..., 0], 0.0)
