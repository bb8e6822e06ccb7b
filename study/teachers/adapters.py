"""Teachers behind one interface: our own networks, ViTPose, and ONNX files.

A teacher takes crops of its own input size and predicts the data's joints in pixels of those
crops; ``teachers/online.py`` transforms the result to the student's frame. Predictions in a file
have no network; ``cache/predictions.py`` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.build import build_codec
from models.codecs.codec import HeatmapCodec
from models.codecs.crop_frame import CropFrame
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton, shared_joints
from models.weights import HEAD, SIMCC_HEAD
from study.cache.predictions import START, Predictions
from study.cache.teacher_store import TeacherTargets
from study.config.derived import Resolved, seed_of
from study.config.schema import (
    JITTER,
    ONNX,
    PREDICTIONS,
    RANDOM,
    SIZES,
    STUDENT,
    VITPOSE,
    DistillConfig,
    ModelConfig,
    RefineConfig,
    TeacherConfig,
    TrialConfig,
)
from study.errors import InputError
from study.teachers.onnx_model import OnnxHeatmaps, OnnxSimcc, open_onnx
from study.teachers.vitpose import VitPose, check_vitpose
from study.training.distill import structure_terms
from study.training.losses import joint_relation
from study.training.networks import build_network, with_arithmetic

NUM_MODES = 3
HEAVY, GENTLE = 0.1, 0.01
"""Weights of the structure loss. HEAVY suits a randomly initialized student but lowers the AP of
one with trained weights; GENTLE lowers it less."""


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """Everything that a study's teacher and its targets depend on, apart from the data."""

    teacher: TeacherConfig
    distill: DistillConfig
    """Settings of stage 1; the teacher is trained with its loss on labels and its augmentation."""
    trial: TrialConfig
    """Supplies precision, memory format and compilation."""
    resolved: Resolved
    seed: int
    """``teacher.seed``, by default the study's."""
    student_frame: CropFrame
    """Frame of the student's codec, in which views are drawn."""


class Teacher(Protocol):
    """A teacher for crops (B, 3, h, w), RGB in 0..255."""

    @property
    def frame(self) -> CropFrame:
        """The frame of these crops."""

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        """Return targets for students, in pixels of the crops."""

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return keypoints in crop pixels (B, K, 2) and scores (B, K), for evaluation."""


class HeatmapTeacher(nn.Module):
    """A network that outputs heatmaps, and the codec that decodes them."""

    def __init__(
        self,
        network: PoseNetwork,
        codec: HeatmapCodec,
        flip_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.pose = RefinedPose(network, codec, None, flip_order)

    @property
    def frame(self) -> CropFrame:
        """See ``Teacher``."""
        return self.pose.frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints, scores = self.pose(crops)
        return keypoints, scores

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        """See ``Teacher``."""
        out = self.pose.predict(crops)
        modes = self.pose.codec.decode_feature_modes(out, NUM_MODES)
        relation = joint_relation(out.heatmaps, out.pyramid[-1]) if out.pyramid else None
        return TeacherTargets(modes, modes.new_ones(modes.shape[:2]), relation)


class SimccTeacher(nn.Module):
    """A network that outputs a score for each column and each row of bins, per joint.

    A joint lies at the highest column and row. Its height is the lower of the two scores, clamped
    to 0..1. It has no second mode, since nothing tells which of two columns and rows match.
    """

    def __init__(self, network: OnnxSimcc, frame: CropFrame) -> None:
        super().__init__()
        self.network = network
        self.frame = frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        modes = self.predict_targets(crops).modes_crop[:, :, 0]
        return modes[..., :2], modes[..., 2]

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        """See ``Teacher``."""
        columns, rows = self.network(crops)
        bins_per_pixel = columns.shape[-1] / crops.shape[-1]
        score_x, x = columns.max(dim=-1)
        score_y, y = rows.max(dim=-1)
        height = torch.minimum(score_x, score_y).clamp(0, 1)
        first = torch.stack((x / bins_per_pixel, y / bins_per_pixel, height), dim=-1)
        modes = first.new_zeros(*first.shape[:2], NUM_MODES, 4)
        modes[:, :, 0, :3] = first
        modes[..., 3] = 1
        return TeacherTargets(modes, modes.new_ones(modes.shape[:2]), None)


class TeacherOfOtherJoints(nn.Module):
    """A teacher of one skeleton whose predictions are mapped to the joints of another.

    Joints that it lacks have no target; in evaluation they lie at (0, 0) with score 0.
    """

    def __init__(self, teacher: Teacher, own: Skeleton, wanted: Skeleton) -> None:
        super().__init__()
        self.teacher = teacher
        pairs = shared_joints(wanted, own)
        self.wanted = [first for first, _ in pairs]
        self.own = [second for _, second in pairs]
        self.num_joints = wanted.num_joints

    @property
    def frame(self) -> CropFrame:
        """See ``Teacher``."""
        return self.teacher.frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints, scores = self.teacher(crops)
        return self._map(keypoints), self._map(scores)

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        """See ``Teacher``."""
        targets = self.teacher.predict_targets(crops)
        relation = targets.relation
        if relation is not None:
            relation = self._map(self._map(relation).transpose(1, 2)).transpose(1, 2)
        return TeacherTargets(self._map(targets.modes_crop), self._map(targets.known), relation)

    def _map(self, values: Tensor) -> Tensor:
        """Values (B, K, ...) of the teacher's joints by the wanted joints; 0 for missing ones."""
        mapped = values.new_zeros(len(values), self.num_joints, *values.shape[2:])
        mapped[:, self.wanted] = values[:, self.own]
        return mapped


def check_files(
    spec: TeacherSpec, student: ModelConfig, refine: RefineConfig, notify: Callable[[str], None]
) -> None:
    """Check every file that the settings name, apart from the data, before any long step.

    Raises:
        InputError: a file is missing, broken or of another kind.
    """
    check_weights(spec, student, notify)
    check_teacher(spec.teacher, spec.resolved)
    if refine.epochs and refine.start not in (STUDENT, JITTER):
        Predictions(Path(refine.start), spec.resolved.skeleton, START)


def check_teacher(teacher: TeacherConfig, resolved: Resolved) -> None:
    """Check that ``teacher.init`` fits ``teacher.name``, the teacher's skeleton and input size.

    Raises:
        InputError: the file does not fit, or the library that reads it is not installed.
    """
    init = Path(teacher.init)
    skeleton, size = resolved.teacher_skeleton, resolved.teacher_input_size
    if teacher.name == VITPOSE:
        check_vitpose(init, skeleton, size)
    elif teacher.name == ONNX:
        open_onnx(init, skeleton, size, teacher.pixels)
    elif teacher.name == PREDICTIONS:
        Predictions(init, skeleton)


def check_weights(spec: TeacherSpec, student: ModelConfig, notify: Callable[[str], None]) -> None:
    """Check the weights that teacher and student start from, and report layers that they lack.

    Also warn of a structure loss that is too heavy for a student with trained weights.

    Raises:
        InputError: the weights of ``teacher.init`` or ``student.init`` do not fit, or are
            incomplete for a teacher that is not trained.
    """
    resolved = spec.resolved
    own = {"teacher": spec.teacher.name in SIZES, "student": True}
    for role, model in (("teacher", spec.teacher), ("student", student)):
        if model.init == RANDOM or not own[role]:
            continue
        if role == "teacher":
            network, _, trained = open_network(spec)
        else:
            codec = build_codec(model.codec, resolved.input_size, model.sigma)
            network, trained = build_network(model, spec.trial, codec, resolved.skeleton, seed=0)
        new = [name for name, _ in network.named_parameters() if name not in trained]
        if not new:
            continue
        skeleton = resolved.teacher_skeleton if role == "teacher" else resolved.skeleton
        text = f"{role}.init has {_what_differs(skeleton, new)}; random: {', '.join(new)}"
        if role == "teacher" and not spec.teacher.epochs:
            raise InputError(
                "a teacher that is not trained must have all its weights, got teacher.epochs=0, "
                f"and {text}; set teacher.skeleton and codec to the file's, or teacher.epochs"
            )
        notify(text)
    if student.init != RANDOM:
        _warn_of_structure(spec.distill, notify)


def _what_differs(skeleton: Skeleton, new: Sequence[str]) -> str:
    """Describe why ``init`` lacks these parameters."""
    joints = f"another joint count than {skeleton.name} ({skeleton.num_joints} joints)"
    bins = "no head for the bins of codec simcc at this crop size"
    return " and ".join(
        reason
        for head, reason in ((HEAD, joints), (SIMCC_HEAD, bins))
        if any(name.startswith(head) for name in new)
    )


def _warn_of_structure(settings: DistillConfig, notify: Callable[[str], None]) -> None:
    """Warn of a structure loss as heavy as for a randomly initialized student."""
    weight = sum(weight for _, weight in structure_terms(settings.structure).values())
    if settings.weights == "fixed" and weight >= HEAVY:
        paths = "mix.* together" if settings.structure.kind == "mix" else "weight"
        notify(
            f"warning: distill.structure.{paths}={weight:g} suits randomly initialized students "
            f"and lowers the AP of one that starts from student.init; try {GENTLE:g}"
        )


def open_network(spec: TeacherSpec) -> tuple[PoseNetwork, HeatmapCodec, frozenset[str]]:
    """Build the teacher's network before training.

    Returns:
        The network, its codec, and the names of its parameters that come from ``teacher.init``.

    Raises:
        InputError: the weights of ``teacher.init`` do not fit.
    """
    settings, size = spec.teacher, spec.resolved.teacher_input_size
    skeleton = spec.resolved.teacher_skeleton
    if settings.name == VITPOSE:
        network = VitPose(Path(settings.init), skeleton, size)
        codec = build_codec("udp", size, settings.sigma)  # as ViTPose was trained
        trained = frozenset(name for name, _ in network.named_parameters())
        return with_arithmetic(network, spec.trial), codec, trained
    codec = build_codec(settings.codec, size, settings.sigma)
    seed = seed_of(spec.seed, "teacher")
    ours, trained = build_network(settings, spec.trial, codec, skeleton, seed)
    return ours, codec, trained


def open_teacher(spec: TeacherSpec, device: torch.device) -> Teacher:
    """Open an untrained or external teacher: ``teacher.init`` unchanged, in eval mode.

    Raises:
        InputError: see ``check_teacher``.
    """
    settings, resolved = spec.teacher, spec.resolved
    skeleton, size = resolved.teacher_skeleton, resolved.teacher_input_size
    flip_order = skeleton.flip_order if settings.flip_test else None
    if settings.name != ONNX:
        network, codec, _ = open_network(spec)
        return for_data(HeatmapTeacher(network, codec, flip_order), resolved, device)
    onnx = open_onnx(Path(settings.init), skeleton, size, settings.pixels)
    if isinstance(onnx, OnnxHeatmaps):
        codec = build_codec(settings.codec, size, settings.sigma)
        codec = dataclasses.replace(codec, heatmap_size=onnx.heatmap_size)
        return for_data(HeatmapTeacher(onnx, codec, flip_order), resolved, device)
    return for_data(SimccTeacher(onnx, CropFrame(size)), resolved, device)


def for_data(
    teacher: HeatmapTeacher | SimccTeacher, resolved: Resolved, device: torch.device
) -> Teacher:
    """Move the teacher to the device, in eval mode, and map its joints to the data's."""
    own, wanted = resolved.teacher_skeleton, resolved.skeleton
    teacher = teacher.to(device).eval()
    return teacher if own.joints == wanted.joints else TeacherOfOtherJoints(teacher, own, wanted)
