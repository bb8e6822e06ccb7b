"""How long a training step and an evaluation take on this machine, by doing a few of each.

They are done on a few of the study's people, in a temporary store, by the loop that trains; the
teacher's word on them is made up, and one that is to be trained is as it begins.
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
from study.cache.crop_store import CropStore, make_crop_store, open_crop_store
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
"""No further step is timed after so long."""


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Seconds, of one worker."""

    device: str
    steps: dict[str, float]
    """Of a training step, by stage: teacher, distill, refine; only those there are."""
    people: dict[str, float]
    """Of the evaluation of a person, by the same stages; ``teacher`` also where it is asked."""
    parameters: dict[str, int]
    """Of what is trained and kept, by stage."""
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of a person learned from before a stage's first epoch, as stage 2 learns left and right of
    given poses."""


def time_study(
    spec: TeacherSpec, student: ModelConfig, refine: RefineConfig, people: People
) -> Speeds:
    """What a step and an evaluation of this study's networks take here.

    Args:
        spec: the teacher; its ``distill`` and ``trial`` are the trials' too.
    """
    configure_process(spec.trial.cpus)
    on_gpu = bool(spec.trial.gpus) and torch.cuda.is_available()
    workers = Workers(torch.device("cuda" if on_gpu else "cpu"))
    few = people.take(np.arange(min(PEOPLE, len(people))))
    with tempfile.TemporaryDirectory() as scratch:
        return _time(spec, student, refine, few, Path(scratch), workers)


def _time(
    spec: TeacherSpec,
    student: ModelConfig,
    refine: RefineConfig,
    few: People,
    scratch: Path,
    workers: Workers,
) -> Speeds:
    resolved = spec.resolved
    own, seen = (
        open_crop_store(make_crop_store(few, size, scratch))
        for size in (resolved.input_size, resolved.teacher_input_size)
    )
    place = str(own.path)
    data = PreparedData(
        *(place, place, place, "", "", (len(few), len(few), len(few))),
        teacher_crops=(str(seen.path),) * 3,
    )
    speeds = Speeds(workers.device.type, {}, {}, {})
    targets = _made_up(own, spec.teacher, scratch / TARGETS)
    ground = TrainingData.open(data, resolved, workers, targets)
    if spec.teacher.name != PREDICTIONS:
        ground = _time_teacher(spec, data, workers, ground, speeds)

    def build_student() -> DistillTask:
        return build_distill_task(student, spec.distill, spec.trial, resolved, seed=0)

    distilled = build_student().to(workers.device)
    _time_stage("distill", spec.distill, spec.distill.augment, ground, distilled, speeds)
    if refine.epochs:
        channels = distilled.student.pyramid_channels
        refiner = build_refiner(refine, resolved.skeleton, channels)
        refined = build_refine_task(refine, distilled, refiner).to(workers.device)
        _time_stage("refine", refine, refine.augment, ground, refined, speeds)
        if refiner.mirror_pairs is not None:
            seconds = _names_seconds(build_student(), refine, ground)
            speeds.before["refine"] = seconds / len(few)
    return speeds


def _names_seconds(distilled: DistillTask, refine: RefineConfig, ground: TrainingData) -> float:
    """Of learning which side is which, from jitter whatever the study starts from."""
    refine = dataclasses.replace(refine, start=JITTER)
    refiner = build_refiner(refine, ground.skeleton, distilled.student.pyramid_channels)
    task = build_refine_task(refine, distilled, refiner).to(ground.workers.device)
    started = _now(ground.workers.device)
    train_swap_resolver(task, ground, starts=None, seed=0)
    return _now(ground.workers.device) - started


def _time_teacher(
    spec: TeacherSpec,
    data: PreparedData,
    workers: Workers,
    ground: TrainingData,
    speeds: Speeds,
) -> TrainingData:
    """Its steps, if it is trained, and its evaluation; the ground with it live, if it is asked."""
    for_teacher = TrainingData.open(data.for_teacher(), spec.resolved, workers, teacher=None)
    if spec.teacher.epochs:
        task = build_task(spec).to(workers.device)
        _time_stage("teacher", spec.teacher, spec.distill.augment, for_teacher, task, speeds)
        heatmaps = HeatmapTeacher(task.student, task.codec, task.flip_order)
        teacher = for_data(heatmaps, spec.resolved, workers.device)
    else:
        teacher = open_teacher(spec, workers.device)
    speeds.people["teacher"] = _person_seconds(teacher, for_teacher)
    if spec.teacher.mode != ONLINE:
        return ground
    live = OnlineTeacher(teacher, for_teacher.train, ground.train)
    return dataclasses.replace(ground, teacher=live)


def _time_stage(
    name: str,
    settings: TeacherConfig | DistillConfig | RefineConfig,
    augment: AugmentConfig,
    ground: TrainingData,
    task: torch.nn.Module,
    speeds: Speeds,
) -> None:
    role: Task = task  # type: ignore[assignment]  # a module that is a Task
    estimator = role.estimator()
    frame = estimator.codec.frame
    rows = torch.arange(settings.batch_size) % len(ground.train)
    stamps: list[float] = []

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for batch in ground.batches(augment, frame, [rows] * STEPS, generator):
            stamps.append(_now(ground.workers.device))
            if len(stamps) > 3 and stamps[-1] - stamps[0] > LONG_S:
                return
            yield batch
        stamps.append(_now(ground.workers.device))

    stage = dataclasses.replace(
        ground.stage(name, settings, augment, frame, seed=0),
        epochs=1,
        batches=batches,
        evaluate=lambda estimator: {},
    )
    start = Progress(epoch=0, seconds=0.0, optimizer=None)
    run_stage(task, stage, start, ground.workers, lambda row, task, optimizer: True)
    speeds.steps[name] = float(np.median(np.diff(stamps)[1:]))  # the first step warms up
    speeds.people[name] = _person_seconds(role.estimator().eval(), ground)
    kept = role.estimator() if isinstance(task, RefineTask) else task
    speeds.parameters[name] = sum(parameter.numel() for parameter in kept.parameters())


def _person_seconds(estimator: Estimator | RefinedPose, ground: TrainingData) -> float:
    """Of the second of two evaluations."""
    taken = []
    for _ in range(2):
        started = _now(ground.workers.device)
        predict_crops(estimator, ground.search, ground.skeleton, ground.workers)
        taken.append(_now(ground.workers.device) - started)
    return taken[1] / len(ground.search)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _made_up(store: CropStore, teacher: TeacherConfig, file: Path) -> Path:
    """A teacher store that says the truth of these people."""
    count, joints = store.visibility.shape
    modes = np.zeros((count, joints, NUM_MODES, 4), np.float32)
    modes[..., :2] = store.keypoints_stored[:, :, None]
    modes[..., 0, 2:] = 1.0
    relation = None
    if teacher.name not in (ONNX, PREDICTIONS):
        relation = torch.eye(joints).expand(count, joints, joints)
    said = TeacherTargets(torch.from_numpy(modes), torch.ones(count, joints), relation)
    write_teacher_store(file, stored_size(store.input_size), count, said.part)
    return file
