"""Stage 1, coarse: the student learns from ground truth, the teacher's heatmaps and its structure.

A task is a module whose ``forward`` takes a batch and gives its loss terms by name, each as a sum
and a count; the loop (``training/loop.py``) adds the counts of all workers and weighs the terms.
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
"""What labels alone give: always of weight 1, whatever the schedule; the second with bins only."""
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
        *,
        flip_test: bool = False,
    ) -> None:
        """Join the parts.

        Args:
            trained: names of the student's parameters that start from trained weights.
            flip_test: whether evaluation averages over each crop and its mirror image.
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
        # Inside the module that is wrapped for several workers, so that its gradient is theirs.
        is_learned = settings.weights == "learned"
        self.uncertainty = UncertaintyWeights(self.term_names) if is_learned else None

    @property
    def is_pretrained(self) -> bool:
        return bool(self.trained)

    @property
    def term_names(self) -> list[str]:
        """The terms that this task has, those of the truth first."""
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
        taught = self.codec.render(batch.teacher_modes)
        weights = batch.teacher_mask
        if self.heatmap_kind == "mse":
            terms["heatmap"] = heatmap_mse(out.heatmaps, taught, weights)
        elif self.heatmap_kind == "kl":
            tau = self.settings.heatmap.tau
            terms["heatmap"] = heatmap_kl(out.heatmaps, taught, weights, tau)
        if self.heatmap_kind != "none" and isinstance(self.codec, SimCC):
            terms["bins"] = self._taught_bins(self.codec, out, batch)
        return terms | self._structure(out, taught, batch) if self.structure_kinds else terms

    def _taught_bins(self, codec: SimCC, out: PoseFeatures, batch: Batch) -> Term:
        """The bins against the teacher's first modes, each by its height."""
        assert out.bins is not None
        assert batch.teacher_modes is not None and batch.teacher_mask is not None
        best = batch.teacher_modes[:, :, 0]
        heights = best[..., 2].clamp(0, 1) * batch.teacher_mask
        labels, weights = codec.encode_bins(best[..., :2], heights)
        return bins_kl(out.bins, labels, weights * heights)

    def _structure(self, out: PoseFeatures, taught: Tensor, batch: Batch) -> dict[str, Term]:
        assert batch.teacher_modes is not None and batch.teacher_mask is not None
        confidence = confident_joints(batch.teacher_modes, self.codec.input_size)
        confidence = confidence * batch.teacher_mask
        kinds = self.structure_kinds
        height = out.heatmaps.shape[2]
        edges, cell = self.skeleton.edges, 1 / height
        if set(kinds.values()) - {"relation"}:
            student, teacher = (soft_argmax(maps) / height for maps in (out.heatmaps, taught))
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
        """Each term's factor in the loss, ``progress`` of the stage's epochs being over (0..1).

        Where weights are learned, ``uncertainty`` has them; this is the schedule's share alone.
        """
        share = {"constant": 1.0, "linear": 1 - progress, "ramp": progress}[self.settings.schedule]
        factors = {}
        for term, weight in term_weights(self.settings, isinstance(self.codec, SimCC)).items():
            weight = 1.0 if self.uncertainty is not None else weight
            factor = weight if term in TRUTH_TERMS else share * weight
            factors[term] = factor / float(self.scale(term))
        return factors

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
        floors = {term: SCALE_FLOOR * mean for term, mean in (random_means or means).items()}
        scales = {term: max(mean, floors[term]) or 1.0 for term, mean in means.items()}
        if self.uncertainty is not None:  # a learned weight is itself one over a scale
            self.uncertainty.start_at(scales)
            return
        for term, scale in scales.items():
            self.scale(term).fill_(scale)

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, object]]:
        """All layers, those that start from trained weights at a share of the rate.

        Learned weights of the terms go at the rate of new layers, and do not decay.
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
        """The modules to put in train mode."""
        return [self.student]

    def estimator(self) -> RefinedPose:
        """What is evaluated: crops to keypoints and scores."""
        return RefinedPose(self.student, self.codec, None, self.flip_order)


def term_weights(settings: DistillConfig, has_bins: bool) -> dict[str, float]:
    """The loss's terms and their weights by the settings, those of the truth first.

    Args:
        has_bins: the student's codec is simcc, which has terms of its own beside the heatmaps'.
    """
    weights = dict.fromkeys(TRUTH_TERMS if has_bins else TRUTH_TERMS[:1], 1.0)
    if settings.heatmap.kind != "none":
        taught = ("heatmap", "bins") if has_bins else ("heatmap",)
        weights |= dict.fromkeys(taught, settings.heatmap.weight)
    return weights | {t: weight for t, (_, weight) in structure_terms(settings.structure).items()}


def structure_terms(settings: StructureTermConfig) -> dict[str, tuple[str, float]]:
    """Kind and weight of each structure term; a mix has a term for each of its parts."""
    if settings.kind == "none":
        return {}
    if settings.kind != "mix":
        return {"structure": (settings.kind, settings.weight)}
    parts = dataclasses.asdict(settings.mix)
    return {f"structure_{kind}": (kind, weight) for kind, weight in parts.items() if weight}


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
