"""Stage 1, coarse: the student learns from ground truth, the teacher's heatmaps and its structure.

A task is a module whose ``forward`` takes a batch and returns its loss terms by name, each as a
sum and a count. The loop (``training/loop.py``) adds them up over workers and weights the terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from models.codecs.codec import HeatmapCodec
from models.codecs.simcc import SimCC
from models.pose_features import PoseFeatures, PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.config.schema import DistillConfig, OptimizerConfig, StructureTermConfig
from study.training.batches import Batch
from study.training.loss_weights import UncertaintyWeights
from study.training.losses import (
    Term,
    angle_loss,
    bins_kl,
    bone_loss,
    heatmap_kl,
    heatmap_mse,
    joint_relation,
    pairwise_loss,
    relation_loss,
    soft_argmax,
    truth_loss,
)

TRUTH_TERMS = ("truth", "truth_heatmap")
"""Terms of the labels, of weight 1 under any schedule; the second exists only with bins."""
SCALE_BATCHES = 20
"""Batches over which a term's initial value is averaged."""
SCALE_FLOOR = 1e-3
"""Least scale of a term, as a share of its value for a randomly initialized student."""
SECOND_MODE_SHARE = 0.5
"""A joint is ambiguous if its second mode is at least this high, as a share of the first."""


class DistillTask(nn.Module):
    """The student and its loss on labels and targets; without teacher terms, on labels alone."""

    name = "distill"

    def __init__(
        self,
        student: PoseNetwork,
        codec: HeatmapCodec,
        skeleton: Skeleton,
        settings: DistillConfig,
        trained: Collection[str] = frozenset(),
        *,
        flip_test: bool = False,
    ) -> None:
        """Join the parts.

        Args:
            trained: names of the student's parameters that start from trained weights.
            flip_test: average over each crop and its mirror image in evaluation.
        """
        super().__init__()
        self.student = student
        self.codec = codec
        self.skeleton = skeleton
        self.settings = settings
        self.trained = frozenset(trained)
        self.flip_order = skeleton.flip_order if flip_test else None
        self.heatmap_kind = settings.heatmap.kind
        self.structure_kinds = {
            term: kind for term, (kind, _) in structure_terms(settings.structure).items()
        }
        for term in self.term_names:
            self.register_buffer(f"scale_{term}", torch.ones(()))
        # Inside the module that DDP wraps, so that its gradient is averaged over workers.
        is_learned = settings.weights == "learned"
        self.uncertainty = UncertaintyWeights(self.term_names) if is_learned else None

    @property
    def is_pretrained(self) -> bool:
        """Return whether the student starts from trained weights."""
        return bool(self.trained)

    @property
    def term_names(self) -> list[str]:
        """Names of this task's terms, those of the labels first."""
        return list(term_weights(self.settings, isinstance(self.codec, SimCC)))

    def forward(self, batch: Batch) -> dict[str, Term]:
        out = self.student.predict(batch.crops)
        targets, weights = self.codec.encode(batch.keypoints_crop, batch.visibility)
        terms = {"truth": truth_loss(out.heatmaps, targets, weights)}
        if isinstance(self.codec, SimCC):
            labels, weights = self.codec.encode_bins(batch.keypoints_crop, batch.visibility)
            assert out.bins is not None
            terms = {"truth": bins_kl(out.bins, labels, weights), "truth_heatmap": terms["truth"]}
        if self.heatmap_kind == "none" and not self.structure_kinds:
            return terms
        assert batch.teacher_modes is not None and batch.teacher_mask is not None
        teacher_heatmaps = self.codec.render(batch.teacher_modes)
        weights = batch.teacher_mask
        if self.heatmap_kind == "mse":
            terms["heatmap"] = heatmap_mse(out.heatmaps, teacher_heatmaps, weights)
        elif self.heatmap_kind == "kl":
            tau = self.settings.heatmap.tau
            terms["heatmap"] = heatmap_kl(out.heatmaps, teacher_heatmaps, weights, tau)
        if self.heatmap_kind != "none" and isinstance(self.codec, SimCC):
            terms["bins"] = self._teacher_bins(self.codec, out, batch)
        if self.structure_kinds:
            terms |= self._structure(out, teacher_heatmaps, batch)
        return terms

    def _teacher_bins(self, codec: SimCC, out: PoseFeatures, batch: Batch) -> Term:
        """Loss of the bins on the teacher's first modes, weighted by their heights."""
        assert out.bins is not None
        assert batch.teacher_modes is not None and batch.teacher_mask is not None
        best = batch.teacher_modes[:, :, 0]
        heights = best[..., 2].clamp(0, 1) * batch.teacher_mask
        labels, weights = codec.encode_bins(best[..., :2], heights)
        return bins_kl(out.bins, labels, weights * heights)

    def _structure(
        self, out: PoseFeatures, teacher_heatmaps: Tensor, batch: Batch
    ) -> dict[str, Term]:
        assert batch.teacher_modes is not None and batch.teacher_mask is not None
        confidence = confident_joints(batch.teacher_modes, self.codec.input_size)
        confidence = confidence * batch.teacher_mask
        kinds = self.structure_kinds
        height = out.heatmaps.shape[2]
        edges, cell = self.skeleton.edges, 1 / height
        if set(kinds.values()) - {"relation"}:
            student = soft_argmax(out.heatmaps) / height
            teacher = soft_argmax(teacher_heatmaps) / height
        terms = {}
        for term, kind in kinds.items():
            if kind == "pairwise":
                terms[term] = pairwise_loss(student, teacher, confidence, cell)
            elif kind == "bone":
                terms[term] = bone_loss(student, teacher, confidence, edges, cell)
            elif kind == "angle":
                terms[term] = angle_loss(student, teacher, confidence, edges, cell)
            else:
                assert batch.teacher_relation is not None
                relation = joint_relation(out.heatmaps, out.pyramid[-1])
                terms[term] = relation_loss(relation, batch.teacher_relation, confidence)
        return terms

    def weights(self, progress: float) -> dict[str, float]:
        """Return each term's factor in the loss.

        With learned weights this holds only the schedule; ``uncertainty`` holds the weights.

        Args:
            progress: share of the stage's epochs that are finished, 0..1.
        """
        share = {"constant": 1.0, "linear": 1 - progress, "ramp": progress}[self.settings.schedule]
        factors = {}
        for term, weight in term_weights(self.settings, isinstance(self.codec, SimCC)).items():
            weight = 1.0 if self.uncertainty is not None else weight
            factor = weight if term in TRUTH_TERMS else share * weight
            factors[term] = factor / float(self.scale(term))
        return factors

    def scale(self, term: str) -> Tensor:
        """Return the divisor of a term: its mean before training, 1 if it was not measured."""
        scale = getattr(self, f"scale_{term}")
        assert isinstance(scale, Tensor)
        return scale

    def set_scales(self, means: dict[str, float], random_means: dict[str, float] | None) -> None:
        """Set each term's scale to its mean before training, so that weights compare.

        Args:
            means: mean of each term before training.
            random_means: means of a randomly initialized student. They set the least scale for a
                student with trained weights, whose terms may be near zero.
        """
        floors = {term: SCALE_FLOOR * mean for term, mean in (random_means or means).items()}
        scales = {term: max(mean, floors[term]) or 1.0 for term, mean in means.items()}
        if self.uncertainty is not None:  # a learned weight is itself one over a scale
            self.uncertainty.start_at(scales)
            return
        for term, scale in scales.items():
            self.scale(term).fill_(scale)

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        """Return all parameters; those with trained weights learn at a share of the rate.

        Learned weights of the terms learn at the full rate and do not decay.
        """
        new: list[nn.Parameter] = []
        old: list[nn.Parameter] = []
        for name, parameter in self.student.named_parameters():
            (old if name in self.trained else new).append(parameter)
        rates = ((new, optimizer.lr), (old, optimizer.lr * optimizer.pretrained_factor))
        groups: list[dict[str, object]]
        groups = [{"params": group, "lr": rate} for group, rate in rates if group]
        if self.uncertainty is not None:
            learned = list(self.uncertainty.parameters())
            groups.append({"params": learned, "lr": optimizer.lr, "weight_decay": 0.0})
        return groups

    def trainable(self) -> Iterable[nn.Module]:
        """Return the modules to put in train mode."""
        return [self.student]

    def estimator(self) -> RefinedPose:
        """Return the student with its decoding, for evaluation."""
        return RefinedPose(self.student, self.codec, None, self.flip_order)


def term_weights(settings: DistillConfig, has_bins: bool) -> dict[str, float]:
    """Return the loss terms and their weights, those of the labels first.

    Args:
        has_bins: whether the student's codec is simcc, which has terms of its own.
    """
    weights = dict.fromkeys(TRUTH_TERMS if has_bins else TRUTH_TERMS[:1], 1.0)
    if settings.heatmap.kind != "none":
        teacher_terms = ("heatmap", "bins") if has_bins else ("heatmap",)
        weights |= dict.fromkeys(teacher_terms, settings.heatmap.weight)
    for term, (_, weight) in structure_terms(settings.structure).items():
        weights[term] = weight
    return weights


def structure_terms(settings: StructureTermConfig) -> dict[str, tuple[str, float]]:
    """Return kind and weight of each structure term; a mix has one term per part."""
    if settings.kind == "none":
        return {}
    if settings.kind != "mix":
        return {"structure": (settings.kind, settings.weight)}
    parts = dataclasses.asdict(settings.mix)
    return {f"structure_{kind}": (kind, weight) for kind, weight in parts.items() if weight}


def confident_joints(modes: Tensor, input_size: tuple[int, int]) -> Tensor:
    """Return the teacher's confidence in each joint, (B, K); 0 if its place is not clear.

    A place is not clear if a second mode is nearly as high, or if it lies outside the crop. The
    soft-argmax of two peaks lies between two people, and that of a map without a peak lies in its
    middle; neither is a joint.

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
