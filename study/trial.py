"""One trial: stage 1, then stage 2, on one worker or several.

This module knows no Ray: ``launch/trials.py`` runs it in a Tune process or under Ray Train. Its
``report`` sends each epoch to the owner of the Optuna study, which answers whether to go on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.refined_pose import RefinedPose
from study.cache.crop_store import CropStore
from study.cache.prepare import PreparedData
from study.config.derived import Resolved, seed_of
from study.config.schema import ONLINE, RANDOM, STUDENT, StudyConfig
from study.storage import failpoints
from study.storage.checkpoint import Checkpoints, best_row
from study.teachers.adapters import TeacherSpec
from study.teachers.make import open_online_teacher
from study.training.batches import epoch_rows
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
    """What one trial is: its settings, its data, and where it keeps its epochs."""

    number: int
    config: StudyConfig
    """The study's settings with the trial's values in place."""
    resolved: Resolved
    data: PreparedData
    folder: Path
    targets: Path | None
    """What the teacher says of the people to train on; None where labels alone teach."""
    own_seed: int | None = None
    """In place of the seed that its number gives it."""
    parent: Path | None = None
    """The folder of the trial whose student it refines; None where it trains its own."""

    @property
    def seed(self) -> int:
        """What everything random in the trial is drawn from."""
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
    """Return what the teacher of a study depends on."""
    return TeacherSpec(
        teacher=config.teacher,
        distill=config.distill,
        trial=config.trial,
        resolved=resolved,
        seed=config.seed,
    )


def run_trial(trial: Trial, workers: Workers, report: Report) -> None:
    """Trains stage 1, then stage 2, from the last checkpoint on, until told to stop.

    A trial with a parent has stage 2 alone.
    """
    ground = TrainingData.open(trial.data, trial.resolved, workers, trial.targets)
    if trial.targets and trial.config.teacher.mode == ONLINE:
        spec = teacher_spec(trial.config, trial.resolved)
        live = open_online_teacher(spec, trial.data, trial.targets.parent, workers)
        ground = dataclasses.replace(ground, teacher=live)
    recorder = Recorder(Checkpoints(trial.folder), workers, report)
    if recorder.replay():
        return
    has_student = trial.parent is not None
    has_student |= bool(recorder.rows) and recorder.rows[-1]["stage"] == RefineTask.name
    if not has_student and distill(trial, ground, recorder):
        return
    if trial.config.refine.epochs:
        if workers.rank == 0:
            failpoints.point("handed over")
        refine(trial, ground, recorder)


def distill(trial: Trial, ground: TrainingData, recorder: Recorder) -> bool:
    """Stage 1: the teacher teaches the student. Returns whether the trial is to stop."""
    config, workers = trial.config, ground.workers
    task = trial.build_student().to(workers.device)
    stage = ground.stage(
        "distill",
        config.distill,
        config.distill.augment,
        task.codec.frame,
        seed=trial.seed,
        diagnose=config.distill.diagnose,
    )
    progress = recorder.resume(stage, task)
    if progress.epoch == 0 and config.distill.normalize == "initial":
        measure_scales(task, trial, ground)
    compile_network(task.student, config.trial.compile, stage, workers.device)
    return run_stage(task, stage, progress, workers, recorder.finish)


def measure_scales(task: DistillTask, trial: Trial, ground: TrainingData) -> None:
    """Sets what each term is divided by: its mean over some batches before training."""
    settings = trial.config.distill

    def means(of: DistillTask) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed_of(trial.seed, "scales"))
        count, world = len(ground.train), ground.workers.world
        order = epoch_rows(count, settings.batch_size, world, generator)[:SCALE_BATCHES]
        batches = ground.batches(settings.augment, of.codec.frame, order, generator)
        return mean_terms(of.train(), batches, ground.workers)

    random_means = None
    if task.is_pretrained:
        random_means = means(trial.build_student(init=RANDOM).to(ground.workers.device))
    task.set_scales(means(task), random_means)


def refine(trial: Trial, ground: TrainingData, recorder: Recorder) -> bool:
    """Stage 2: IGP-GCN learns on top of the best student, the trial's own or its parent's.

    Returns whether the trial is to stop.
    """
    config, workers = trial.config, ground.workers
    settings = config.refine
    history = Checkpoints(trial.parent or trial.folder)
    last = history.last()
    assert last is not None
    students = [row for row in last.rows if row["stage"] == DistillTask.name]
    distilled = trial.build_student()
    distilled.load_state_dict(history.at(best_row(students)["epoch"]).weights())
    torch.manual_seed(seed_of(trial.seed, "refiner"))
    refiner = build_refiner(settings, ground.skeleton, distilled.student.pyramid_channels)
    task = build_refine_task(settings, distilled, refiner).to(workers.device)
    if settings.perturb and settings.start == STUDENT:
        task.errors = unseen_errors(task, ground)
    starts = ground.starts(settings.start)
    stage = ground.stage(
        "refine",
        settings,
        settings.augment,
        task.codec.frame,
        seed=trial.seed,
        first_epoch=config.distill.epochs,
        first_step=students[-1]["step"],
        starts=starts,
    )
    progress = recorder.resume(stage, task)
    if progress.epoch == 0 and refiner.mirror_pairs is not None:
        train_swap_resolver(task, ground, starts, seed_of(trial.seed, "mirror_pairs"))
    return run_stage(task, stage, progress, workers, recorder.finish)


def unseen_errors(task: RefineTask, ground: TrainingData) -> PoseErrors:
    """What the student does worse on held-out people than on as many that it was trained on."""
    estimator = RefinedPose(task.student, task.codec, None)

    def errors(store: CropStore, count: int) -> PoseErrors:
        keypoints, _ = predict_crops(estimator, store, ground.skeleton, ground.workers, count)
        rows = np.arange(len(keypoints))
        return measure_errors(
            torch.from_numpy(keypoints).float(),
            torch.from_numpy(store.keypoints_stored[rows]),
            torch.from_numpy(store.visibility[rows]),
            torch.from_numpy(store.neighbor_keypoints(rows)),
            torch.from_numpy(store.neighbor_visibility(rows)),
            torch.from_numpy(store.areas[rows]),
            ground.skeleton,
        )

    held_out = len(ground.search)
    return excess(errors(ground.search, held_out), errors(ground.train, held_out))
