"""Trials of the search and the teacher's training as Ray jobs.

The owner of the Optuna study answers each report with whether to stop, which ends the loop on all
workers. Nothing is stopped from outside, so that no resources stay held.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train import TrainingFailedError

from study.config.compose import with_values
from study.errors import InputError
from study.launch.context import StudyContext
from study.launch.jobs import last_line, ray_columns, run_inline, run_with_workers
from study.launch.ray_train import interruptible, run_under_train
from study.storage.checkpoint import Row
from study.storage.files import disk_full_message, is_full_disk
from study.storage.paths import error_log, trial_folder
from study.teachers.make import make_teacher
from study.training.networks import measure_costs
from study.trial import Trial, teacher_spec
from study.workers import Workers


@dataclass(frozen=True)
class TrialJob:
    """A trial of the search as a job."""

    context: StudyContext
    suggestion: dict[str, Any]
    """The trial's ``number``, ``values`` by config path, and ``parent``: a number or None."""

    @property
    def number(self) -> int:
        return int(self.suggestion["number"])

    @property
    def name(self) -> str:
        return job_name(self.number)

    @property
    def folder(self) -> Path:
        return trial_folder(Path(self.context.folder), self.number)

    def trial(self) -> Trial:
        """Return the trial with its data on this machine."""
        context, parent = self.context, self.suggestion["parent"]
        return Trial(
            number=self.number,
            config=with_values(context.config, self.suggestion["values"]),
            resolved=context.resolved,
            prepared=context.prepared.here(),
            folder=self.folder,
            targets=Path(context.targets),
            parent=None if parent is None else trial_folder(Path(context.folder), parent),
        )

    def open_record(self, *, is_first: bool) -> OwnerLink:
        """Connect a worker to the owner of the Optuna study."""
        return OwnerLink(self.context, self.number, is_first=is_first)


class OwnerLink:
    """The record of a trial: reports to the owner of the Optuna study from the first worker."""

    def __init__(self, context: StudyContext, number: int, *, is_first: bool) -> None:
        self.number = number
        self.study_folder = Path(context.folder)
        self.is_first = is_first
        self.owner = ray.get_actor(context.owner)

    def is_closed(self) -> bool:
        """Return whether the study is halted; the trial is resumed with the study."""
        return ray.get(self.owner.halt_reason.remote()) is not None

    def start(self, trial: Trial, workers: Workers) -> None:
        """Measure and report the costs of the trial's estimator, unless an earlier try did."""
        if self.is_first and not ray.get(self.owner.has_costs.remote(self.number)):
            config = trial.config
            costs = measure_costs(
                config.student, config.refine, config.trial, trial.resolved, workers.device
            )
            ray.get(self.owner.report_costs.remote(self.number, costs))

    def report(self, row: Row) -> bool:
        """Report an epoch; return the owner's answer, whether to stop."""
        return self.is_first and bool(ray.get(self.owner.report.remote(self.number, row)))

    def finish(self, trial: Trial, workers: Workers) -> None:
        """Do nothing: the owner ended the trial at its last report."""

    def fail(self, reason: str) -> None:
        """End the trial as failed."""
        if self.is_first:
            ray.get(self.owner.fail.remote(self.number, reason))

    def record_error(self, error: Exception) -> None:
        """Append the traceback to the trial's error log, and report the error.

        A full disk halts the study instead.
        """
        if self._halt_if_disk_full(error):
            return
        log = error_log(trial_folder(self.study_folder, self.number))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        if self.is_first:
            message = f"{type(error).__name__}: {error}"
            ray.get(self.owner.record_error.remote(self.number, message))

    def give_up(self, error: Exception) -> None:
        """End the trial as failed; a full disk halts the study instead."""
        if not self._halt_if_disk_full(error):
            self.fail(last_line(error))

    def _halt_if_disk_full(self, error: Exception) -> bool:
        if is_full := is_full_disk(error):
            ray.get(self.owner.halt.remote(disk_full_message(self.study_folder)))
        return is_full


def job_name(number: int) -> str:
    """Return the name of a trial's job."""
    return f"trial-{number}"


def inline_trial(suggestion: dict[str, Any], context: StudyContext) -> None:
    """Train a trial in its Tune process."""
    run_inline(TrialJob(context, suggestion), tune.report)


def train_trial(suggestion: dict[str, Any], context: StudyContext) -> None:
    """Train a trial with workers under Ray Train; its Tune process only waits."""
    run_with_workers(TrialJob(context, suggestion))


def train_teacher(context: StudyContext) -> None:
    """Train the teacher and predict its targets under Ray Train.

    Raises:
        InputError: the training failed, or the disk is full.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    try:
        with interruptible():
            run_under_train(partial(_teacher_worker, context), context, "teacher")
    except TrainingFailedError as error:
        if is_full_disk(error):
            raise InputError(disk_full_message(Path(context.targets).parent)) from error
        raise InputError(f"the teacher's training failed: {last_line(error)}") from error


def _teacher_worker(context: StudyContext, workers: Workers) -> None:
    owner = ray.get_actor(context.owner)

    def send_epoch(row: Row) -> bool:
        if workers.rank == 0:
            ray.get(owner.report_teacher.remote(row))
        ray.train.report(ray_columns(row))
        return False

    def progress(row: Row) -> None:
        if workers.rank == 0:
            owner.report_teacher.remote(row)  # without waiting for an answer

    spec = teacher_spec(context.config, context.resolved)
    make_teacher(
        spec, context.config.student, context.prepared.here(), workers, send_epoch, progress
    )
