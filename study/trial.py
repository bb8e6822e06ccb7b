"""One trial: stage 1 (distill), then stage 2 (refine), on one worker or several.

This module imports no Ray: ``launch/trials.py`` runs it in a Ray Tune process or under Ray Train.
Its ``report`` callback sends each epoch to the owner of the Optuna study and returns whether the
trial must stop.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.build import build_codec
from models.refined_pose import RefinedPose
from study.cache.crop_store import CropStore
from study.cache.prepare import PreparedData
from study.config.derived import Resolved, seed_of
from study.config.schema import ONLINE, RANDOM, STUDENT, StudyConfig
from study.storage import failpoints
from study.storage.checkpoint import Checkpoints
from study.teachers.adapters import TeacherSpec
from study.teachers.make import open_online_teacher
from study.training.batches import Labels, epoch_rows
from study.training.distill import SCALE_BATCHES, DistillTask
from study.training.evaluation import predict_crops
from study.training.left_right import train_swap_resolver
from study.training.loop import Recorder, Report, mean_terms, run_stage
from study.training.networks import (
    build_distill_task,
    build_refine_task,
    build_refiner,
    compile_network,
)
from study.training.pose_errors import PoseErrors, excess, measure_errors
from study.training.refine import RefineTask
from study.training.training_data import TrainingData
from study.workers import Workers


@dataclass(frozen=True)
class Trial:
    """A trial: its settings, its data, and the folder of its checkpoints."""

    number: int
    config: StudyConfig
    """The study's settings, with the trial's values in place."""
    resolved: Resolved
    prepared: PreparedData
    folder: Path
    targets: Path | None
    """The teacher store; None trains on labels alone."""
    own_seed: int | None = None
    """Replaces the seed that follows from the trial's number."""
    parent: Path | None = None
    """Folder of the trial whose student stage 2 refines; None if the trial trains its own."""

    @property
    def seed(self) -> int:
        """Seed of everything random in the trial."""
        if self.own_seed is not None:
            return self.own_seed
        return seed_of(self.config.seed, self.number)

    def build_student(self, init: str | None = None) -> DistillTask:
        """Build stage 1 of this trial before training.

        Args:
            init: replaces ``student.init``.
        """
        student = self.config.student
        if init is not None:
            student = dataclasses.replace(student, init=init)
        return build_distill_task(
            student, self.config.distill, self.config.trial, self.resolved, seed=self.seed
        )


def teacher_spec(config: StudyConfig, resolved: Resolved) -> TeacherSpec:
    """Return what a study's teacher depends on, apart from the data."""
    student = config.student
    codec = build_codec(student.codec, resolved.input_size, student.sigma)
    return TeacherSpec(
        teacher=config.teacher,
        distill=config.distill,
        trial=config.trial,
        resolved=resolved,
        seed=config.seed if config.teacher.seed is None else config.teacher.seed,
        student_frame=codec.frame,
    )


def run_trial(trial: Trial, workers: Workers, report: Report) -> None:
    """Train stage 1, then stage 2, from the last checkpoint until ``report`` says to stop.

    A trial with a parent has only stage 2.
    """
    data = open_training_data(trial, workers)
    recorder = Recorder(Checkpoints(trial.folder), workers, report)
    if recorder.replay():
        return
    has_student = trial.parent is not None or recorder.has_reached(RefineTask.name)
    if not has_student and distill(trial, data, recorder):
        return
    if trial.config.refine.epochs:
        if workers.rank == 0:
            failpoints.point("handed over")
        refine(trial, data, recorder)


def open_training_data(trial: Trial, workers: Workers) -> TrainingData:
    """Open the trial's stores; with ``teacher.mode=online`` its targets come from the teacher."""
    data = TrainingData.open(trial.prepared, trial.resolved, workers, trial.targets)
    if trial.targets is None or trial.config.teacher.mode != ONLINE:
        return data
    spec = teacher_spec(trial.config, trial.resolved)
    teacher = open_online_teacher(spec, trial.prepared, trial.targets.parent, workers)
    return dataclasses.replace(data, targets=teacher)


def distill(trial: Trial, data: TrainingData, recorder: Recorder) -> bool:
    """Train stage 1, in which the student learns from the teacher; return whether to stop."""
    config, workers = trial.config, data.workers
    task = trial.build_student().to(workers.device)
    stage = data.stage(
        DistillTask.name,
        config.distill,
        config.distill.augment,
        task.codec.frame,
        seed=trial.seed,
        diagnose=config.distill.diagnose,
    )
    progress = recorder.resume(stage, task)
    if progress.epoch == 0 and config.distill.normalize == "initial":
        measure_scales(task, trial, data)
    compile_network(task.student, config.trial.compile, stage, workers.device)
    return run_stage(task, stage, progress, workers, recorder.finish_epoch)


def measure_scales(task: DistillTask, trial: Trial, data: TrainingData) -> None:
    """Set the scale of each loss term to its mean over some batches before training."""
    settings = trial.config.distill

    def means(measured: DistillTask) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed_of(trial.seed, "scales"))
        count, world = len(data.train), data.workers.world
        order = epoch_rows(count, settings.batch_size, world, generator)[:SCALE_BATCHES]
        batches = data.batches(settings.augment, measured.codec.frame, order, generator)
        return mean_terms(measured.train(), batches, data.workers)

    random_means = None
    if task.is_pretrained:
        random_means = means(trial.build_student(init=RANDOM).to(data.workers.device))
    task.set_scales(means(task), random_means)


def refine(trial: Trial, data: TrainingData, recorder: Recorder) -> bool:
    """Train stage 2: IGP-GCN on top of the best student, the trial's own or its parent's.

    Returns:
        Whether to stop.
    """
    config, workers = trial.config, data.workers
    settings = config.refine
    history = Checkpoints(trial.parent or trial.folder)
    distilled = trial.build_student()
    distilled.load_state_dict(history.best(DistillTask.name).weights())
    torch.manual_seed(seed_of(trial.seed, "refiner"))
    refiner = build_refiner(settings, data.skeleton, distilled.student.pyramid_channels)
    task = build_refine_task(settings, distilled, refiner).to(workers.device)
    if settings.perturb and settings.start == STUDENT:
        task.errors = unseen_errors(task, data)
    starts = data.starts(settings.start)
    stage = data.stage(
        RefineTask.name,
        settings,
        settings.augment,
        task.codec.frame,
        seed=trial.seed,
        starts=starts,
    ).after(
        epochs=config.distill.epochs,
        steps=history.rows(DistillTask.name)[-1]["step"],
    )
    progress = recorder.resume(stage, task)
    if progress.epoch == 0 and refiner.mirror_pairs is not None:
        train_swap_resolver(task, data, starts, seed_of(trial.seed, "mirror_pairs"))
    return run_stage(task, stage, progress, workers, recorder.finish_epoch)


def unseen_errors(task: RefineTask, data: TrainingData) -> PoseErrors:
    """Return the errors that the student makes more often on held-out than on training people.

    Both are measured on equally many people.
    """
    estimator = RefinedPose(task.student, task.codec, None)

    def errors(store: CropStore, count: int) -> PoseErrors:
        keypoints, _ = predict_crops(estimator, store, data.skeleton, data.workers, count)
        rows = np.arange(len(keypoints))
        labels = Labels(
            keypoints=torch.from_numpy(store.keypoints_stored[rows]),
            visibility=torch.from_numpy(store.visibility[rows]),
            neighbor_keypoints=torch.from_numpy(store.neighbor_keypoints(rows)),
            neighbor_visibility=torch.from_numpy(store.neighbor_visibility(rows)),
            areas=torch.from_numpy(store.areas[rows]),
        )
        return measure_errors(torch.from_numpy(keypoints).float(), labels, data.skeleton)

    held_out = len(data.search)
    return excess(errors(data.search, held_out), errors(data.train, held_out))
