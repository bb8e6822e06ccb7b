"""Time a few training steps and evaluations of a study's networks on this machine.

They run in the study's own training loop, on a few of its people. The students' targets are made
from the ground truth; a teacher that is still to be trained is timed with its initial weights.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from models.refined_pose import RefinedPose
from study.cache.crop_store import StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData
from study.cache.teacher_store import TeacherTargets, write_teacher_store
from study.config.schema import (
    JITTER,
    ONLINE,
    ONNX,
    PREDICTIONS,
    AugmentConfig,
    DistillConfig,
    ModelConfig,
    RefineConfig,
    TeacherConfig,
)
from study.data.crops import stored_size
from study.data.people import People
from study.storage.paths import TARGETS
from study.teachers.adapters import (
    NUM_MODES,
    HeatmapTeacher,
    TeacherSpec,
    for_data,
    open_teacher,
)
from study.teachers.make import build_task
from study.teachers.online import OnlineTeacher
from study.training.batches import Batch
from study.training.distill import DistillTask
from study.training.evaluation import Estimator, predict_crops
from study.training.left_right import train_swap_resolver
from study.training.loop import Progress, Task, run_stage
from study.training.networks import build_distill_task, build_refine_task, build_refiner
from study.training.refine import RefineTask
from study.training.training_data import TrainingData
from study.workers import Workers, configure_process

PEOPLE = 16
STEPS = 6
LONG_S = 10.0
"""No further step is timed after this many seconds."""


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Seconds that one worker needs; filled stage by stage: teacher, distill, refine."""

    device: str
    steps: dict[str, float]
    """Of a training step, by stage that is trained."""
    people: dict[str, float]
    """Of the evaluation of a person, by stage; ``teacher`` too if it only predicts targets."""
    parameters: dict[str, int]
    """Number of parameters in a checkpoint, by stage."""
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of a person in training before a stage's first epoch: the swap resolver of ``refine``."""


def time_study(
    spec: TeacherSpec, student: ModelConfig, refine: RefineConfig, people: People
) -> Speeds:
    """Time a step and an evaluation of each network of the study.

    Args:
        spec: the teacher; its ``distill`` and ``trial`` are the trials' too.
    """
    configure_process(spec.trial.cpus)
    has_gpu = bool(spec.trial.gpus) and torch.cuda.is_available()
    workers = Workers(torch.device("cuda" if has_gpu else "cpu"))
    few = people.take(np.arange(min(PEOPLE, len(people))))
    with tempfile.TemporaryDirectory() as scratch:
        prepared = _prepare(few, spec, Path(scratch))
        targets = _write_true_targets(prepared, spec.teacher, Path(scratch) / TARGETS)
        return _time_stages(spec, student, refine, prepared, targets, workers)


def _prepare(few: People, spec: TeacherSpec, scratch: Path) -> PreparedData:
    """The people's crops, as the students and as the teacher see them."""
    crops, teacher_crops = (
        str(make_crop_store(few, StoreSpec(size, scratch)))
        for size in (spec.resolved.input_size, spec.resolved.teacher_input_size)
    )
    return PreparedData(
        train=crops,
        search=crops,
        val=crops,
        search_truth="",
        val_truth="",
        num_people=(len(few), len(few), len(few)),
        teacher_crops=(teacher_crops, teacher_crops, teacher_crops),
    )


def _write_true_targets(prepared: PreparedData, teacher: TeacherConfig, file: Path) -> Path:
    """Store the ground truth as if a teacher had predicted it."""
    store = open_crop_store(Path(prepared.train))
    count, joints = store.visibility.shape
    modes = np.zeros((count, joints, NUM_MODES, 4), np.float32)
    modes[..., :2] = store.keypoints_stored[:, :, None]
    modes[..., 0, 2:] = 1.0
    relation = None
    if teacher.name not in (ONNX, PREDICTIONS):
        relation = torch.eye(joints).expand(count, joints, joints)
    targets = TeacherTargets(torch.from_numpy(modes), torch.ones(count, joints), relation)
    write_teacher_store(file, stored_size(store.input_size), count, targets.part)
    return file


def _time_stages(
    spec: TeacherSpec,
    student: ModelConfig,
    refine: RefineConfig,
    prepared: PreparedData,
    targets: Path,
    workers: Workers,
) -> Speeds:
    resolved = spec.resolved
    speeds = Speeds(workers.device.type, steps={}, people={}, parameters={})
    data = TrainingData.open(prepared, resolved, workers, targets)
    if spec.teacher.name != PREDICTIONS:
        data = _time_teacher(spec, prepared, data, speeds)

    def build_student() -> DistillTask:
        return build_distill_task(student, spec.distill, spec.trial, resolved, seed=0)

    distilled = build_student().to(workers.device)
    _time_stage("distill", spec.distill, spec.distill.augment, data, distilled, speeds)
    if refine.epochs:
        channels = distilled.student.pyramid_channels
        refiner = build_refiner(refine, resolved.skeleton, channels)
        refined = build_refine_task(refine, distilled, refiner).to(workers.device)
        _time_stage("refine", refine, refine.augment, data, refined, speeds)
        if refiner.mirror_pairs is not None:
            seconds = _time_swap_resolver(build_student(), refine, data)
            speeds.before["refine"] = seconds / len(data.train)
    return speeds


def _time_teacher(
    spec: TeacherSpec, prepared: PreparedData, data: TrainingData, speeds: Speeds
) -> TrainingData:
    """Time the teacher's training, if it is trained, and its evaluation.

    Returns:
        The data for the trials: with the teacher itself if it runs in their loop.
    """
    workers = data.workers
    own_data = TrainingData.open(prepared.for_teacher(), spec.resolved, workers, targets=None)
    if spec.teacher.epochs:
        task = build_task(spec).to(workers.device)
        _time_stage("teacher", spec.teacher, spec.distill.augment, own_data, task, speeds)
        heatmaps = HeatmapTeacher(task.student, task.codec, task.flip_order)
        teacher = for_data(heatmaps, spec.resolved, workers.device)
    else:
        teacher = open_teacher(spec, workers.device)
    speeds.people["teacher"] = _time_evaluation(teacher, own_data)
    if spec.teacher.mode != ONLINE:
        return data
    return dataclasses.replace(data, targets=OnlineTeacher(teacher, own_data.train, data.train))


def _time_stage(
    name: str,
    settings: TeacherConfig | DistillConfig | RefineConfig,
    augment: AugmentConfig,
    data: TrainingData,
    task: torch.nn.Module,
    speeds: Speeds,
) -> None:
    """Add the stage to the speeds, by a few steps of its loop and an evaluation."""
    role: Task = task  # type: ignore[assignment]  # a module that is a Task
    frame = role.estimator().codec.frame
    rows = torch.arange(settings.batch_size) % len(data.train)
    times: list[float] = []

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for batch in data.batches(augment, frame, [rows] * STEPS, generator):
            times.append(_now(data.workers.device))
            if len(times) > 3 and times[-1] - times[0] > LONG_S:
                return
            yield batch
        times.append(_now(data.workers.device))

    stage = dataclasses.replace(
        data.stage(name, settings, augment, frame, seed=0),
        epochs=1,
        batches=batches,
        evaluate=lambda estimator: {},
    )
    start = Progress(epoch=0, seconds=0.0, optimizer=None)
    run_stage(task, stage, start, data.workers, lambda row, task, optimizer: True)
    speeds.steps[name] = float(np.median(np.diff(times)[1:]))  # the first step warms up
    speeds.people[name] = _time_evaluation(role.estimator().eval(), data)
    kept = role.estimator() if isinstance(task, RefineTask) else task
    speeds.parameters[name] = sum(parameter.numel() for parameter in kept.parameters())


def _time_swap_resolver(distilled: DistillTask, refine: RefineConfig, data: TrainingData) -> float:
    """Seconds to train the swap resolver, on jittered poses whatever the study starts from."""
    refine = dataclasses.replace(refine, start=JITTER)
    refiner = build_refiner(refine, data.skeleton, distilled.student.pyramid_channels)
    task = build_refine_task(refine, distilled, refiner).to(data.workers.device)
    started = _now(data.workers.device)
    train_swap_resolver(task, data, starts=None, seed=0)
    return _now(data.workers.device) - started


def _time_evaluation(estimator: Estimator | RefinedPose, data: TrainingData) -> float:
    """Seconds to evaluate a person, in the second of two evaluations."""
    seconds = 0.0
    for _ in range(2):
        started = _now(data.workers.device)
        predict_crops(estimator, data.search, data.skeleton, data.workers)
        seconds = _now(data.workers.device) - started
    return seconds / len(data.search)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
