"""Load a teacher: one of our networks, ViTPose or an ONNX file, behind one interface.

A teacher takes crops of its own input size and predicts the data's joints in pixels of those
crops; ``teachers/make.py`` transforms the result to the student's frame. Predictions in a file
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
"""Weights of the structure loss: the first, which suits a student that starts from nothing, costs
one that starts from trained weights AP, the second less."""


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """All that a study's teacher and its targets depend on, apart from the data."""

    teacher: TeacherConfig
    distill: DistillConfig
    """Stage 1, whose truth loss and augmentation the teacher's training shares."""
    trial: TrialConfig
    """Precision, memory format and compilation."""
    resolved: Resolved
    seed: int
    """The study's seed."""


class Teacher(Protocol):
    """Whatever answers when it is asked about crops (B, 3, h, w), RGB in 0..255."""

    @property
    def frame(self) -> CropFrame:
        """Where people lie in those crops."""

    def ask(self, crops: Tensor) -> TeacherTargets: ...

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints in crop pixels, (B, K, 2), and scores (B, K), as what is evaluated gives."""


class HeatmapTeacher(nn.Module):
    """A network that puts out heatmaps, and the codec that they are read by."""

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
        return self.pose.frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints, scores = self.pose(crops)
        return keypoints, scores

    def ask(self, crops: Tensor) -> TeacherTargets:
        out = self.pose.predict(crops)
        modes = self.pose.codec.decode_feature_modes(out, NUM_MODES)
        relation = joint_relation(out.heatmaps, out.pyramid[-1]) if out.pyramid else None
        return TeacherTargets(modes, modes.new_ones(modes.shape[:2]), relation)


class SimccTeacher(nn.Module):
    """A network that puts out a score for each column and each row of bins, per joint.

    The joint lies where both are highest; its height is the lower of the two scores, cut to 0..1,
    and it has no second mode: of two columns and two rows nothing tells which belong together.
    """

    def __init__(self, network: OnnxSimcc, frame: CropFrame) -> None:
        super().__init__()
        self.network = network
        self.frame = frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        modes = self.ask(crops).modes_crop[:, :, 0]
        return modes[..., :2], modes[..., 2]

    def ask(self, crops: Tensor) -> TeacherTargets:
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
    """A teacher whose answer is put in another skeleton's joints, as far as it knows them.

    Those that it does not know are untaught, and missed: at (0, 0) with score 0.
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
        return self.teacher.frame

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        keypoints, scores = self.teacher(crops)
        return self._put(keypoints), self._put(scores)

    def ask(self, crops: Tensor) -> TeacherTargets:
        answer = self.teacher.ask(crops)
        relation = answer.relation
        if relation is not None:
            relation = self._put(self._put(relation).transpose(1, 2)).transpose(1, 2)
        return TeacherTargets(self._put(answer.modes_crop), self._put(answer.taught), relation)

    def _put(self, values: Tensor) -> Tensor:
        """Values (B, K, ...) of its own joints at the places of the wanted ones, else zero."""
        put = values.new_zeros(len(values), self.num_joints, *values.shape[2:])
        put[:, self.wanted] = values[:, self.own]
        return put


def check_files(
    spec: TeacherSpec, student: ModelConfig, refine: RefineConfig, notify: Callable[[str], None]
) -> None:
    """Returns if whatever the settings name beside the data can be used; looks at no image.

    Before anything takes its time, so that a wrong path is told at once. Says what
    ``check_weights`` does.

    Raises:
        InputError: one of the files is missing, broken or something else; says what to change.
    """
    check_weights(spec, student, notify)
    check_teacher(spec.teacher, spec.resolved)
    if refine.epochs and refine.start not in (STUDENT, JITTER):
        Predictions(Path(refine.start), spec.resolved.skeleton, START)


def check_teacher(teacher: TeacherConfig, resolved: Resolved) -> None:
    """Returns if ``teacher.init`` is what ``teacher.name`` says; looks at no image.

    Raises:
        InputError: it is not, or the library that reads it is missing; says what to change.
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
    """Says which layers stay random though their network starts from weights, and what may undo
    the student's.

    Raises:
        InputError: ``teacher.init`` or ``student.init`` is no file of weights that fit, or leaves
            layers random in a teacher that is not trained.
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
        said = f"{role}.init has {_what_differs(skeleton, new)}; random: {', '.join(new)}"
        if role == "teacher" and not spec.teacher.epochs:
            raise InputError(
                "a teacher that is not trained must have all its weights, got teacher.epochs=0, "
                f"and {said}; set teacher.skeleton and codec to the file's, or teacher.epochs"
            )
        notify(said)
    if student.init != RANDOM:
        _warn_of_structure(spec.distill, notify)


def _what_differs(skeleton: Skeleton, new: Sequence[str]) -> str:
    """Why these parameters are not from ``init``."""
    joints = f"another joint count than {skeleton.name} ({skeleton.num_joints} joints)"
    bins = "no head for the bins of codec simcc at this crop size"
    return " and ".join(
        reason
        for head, reason in ((HEAD, joints), (SIMCC_HEAD, bins))
        if any(name.startswith(head) for name in new)
    )


def _warn_of_structure(settings: DistillConfig, notify: Callable[[str], None]) -> None:
    """Says if the structure loss is as heavy as suits a student that starts from nothing."""
    weight = sum(weight for _, weight in structure_terms(settings.structure).values())
    if settings.weights == "fixed" and weight >= HEAVY:
        paths = "mix.* together" if settings.structure.kind == "mix" else "weight"
        notify(
            f"warning: distill.structure.{paths}={weight:g} is for students that start from "
            f"nothing and sets back one that starts from student.init; {GENTLE:g} is gentler"
        )


def open_network(spec: TeacherSpec) -> tuple[PoseNetwork, HeatmapCodec, frozenset[str]]:
    """The teacher's network before training, its codec, and its trained parameters by name.

    Raises:
        InputError: ``teacher.init`` does not fit, or the teacher is no network that can learn.
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
    """The teacher as ``teacher.init`` has it, answering for the data's joints, in eval mode.

    Raises:
        InputError: as ``check_teacher``.
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
    """The teacher in eval mode on the device, its answers in the joints of the data."""
    own, wanted = resolved.teacher_skeleton, resolved.skeleton
    teacher = teacher.to(device).eval()
    return teacher if own.joints == wanted.joints else TeacherOfOtherJoints(teacher, own, wanted)
