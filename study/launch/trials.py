"""Starts trials and the teacher's training: in a Tune process, or under Ray Train on workers.

Reports go to the owner of the Optuna study, whose answer, go on or stop, ends the loop on all
workers by itself; nothing is stopped from outside, so that no resources are left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.train import TrainingFailedError

from study.errors import InputError
from study.launch.context import OwnerLink, StudyContext, brief, last_line, trial_of
from study.launch.ray_train import interruptible, job_of_trial, join_workers, run_under_train
from study.launch.watchdog import exit_on_stall, stall_reason
from study.storage.checkpoint import Row
from study.storage.files import disk_full_message, is_full_disk
from study.teachers.make import make_teacher
from study.trial import run_trial, teacher_spec
from study.workers import Workers, configure_process


def inline_trial(suggestion: dict[str, Any], plan: StudyContext) -> None:
    """A trial in its own Tune process: one worker, no further process."""
    settings = plan.config.trial
    link = OwnerLink(plan, suggestion["number"])
    configure_process(settings.cpus)
    workers = Workers(torch.device("cuda" if settings.gpus else "cpu"))
    _run(suggestion, plan, link, workers, tune.report)


def train_trial(suggestion: dict[str, Any], plan: StudyContext) -> None:
    """A trial whose workers run under Ray Train; its Tune process only waits for them."""
    loop_config = {"plan": plan, "suggestion": suggestion}
    job = job_of_trial(suggestion["number"])
    try:
        run_under_train(_trial_worker, loop_config, plan, job)
    except TrainingFailedError as error:
        OwnerLink(plan, suggestion["number"]).fail(error)


def train_teacher(plan: StudyContext) -> None:
    """Makes the study's teacher under Ray Train.

    Raises:
        InputError: it could not be trained; says why.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    try:
        with interruptible():
            run_under_train(_teacher_worker, {"plan": plan}, plan, "teacher")
    except TrainingFailedError as error:
        if is_full_disk(error):
            raise InputError(disk_full_message(Path(plan.targets).parent)) from error
        raise InputError(f"the teacher could not be trained: {last_line(error)}") from error


def _trial_worker(config: dict[str, Any]) -> None:
    plan, suggestion = config["plan"], config["suggestion"]
    workers = join_workers(config)
    link = OwnerLink(plan, suggestion["number"], is_first=workers.rank == 0)
    _run(suggestion, plan, link, workers, ray.train.report)


def _run(
    suggestion: dict[str, Any],
    plan: StudyContext,
    link: OwnerLink,
    workers: Workers,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """The trial on this worker; one that hung fails, since another try would hang again.

    Nothing happens once the study has been halted.

    Args:
        tell: Ray's own report of an epoch.
    """
    if link.is_halted():
        return
    if reason := stall_reason(link.folder):
        link.fail(reason)
        return
    timeout_s = plan.config.trial.timeout_s
    with link.watching(), exit_on_stall(link.folder, workers.rank, timeout_s) as heartbeat:

        def report(row: Row) -> bool:
            heartbeat()
            stop = link.report(row)
            tell(brief(row))
            return stop

        trial = trial_of(plan, suggestion)
        link.report_costs(trial, workers)
        run_trial(trial, workers, report)


def _teacher_worker(config: dict[str, Any]) -> None:
    plan = config["plan"]
    workers = join_workers(config)
    owner = ray.get_actor(plan.owner)

    def report(row: Row) -> bool:
        if workers.rank == 0:
            ray.get(owner.report_teacher.remote(row))
        ray.train.report(brief(row))
        return False

    def tell(row: Row) -> None:
        if workers.rank == 0:
            owner.report_teacher.remote(row)  # nobody waits for it

    spec = teacher_spec(plan.config, plan.resolved)
    make_teacher(spec, plan.config.student, plan.data.here(), workers, report, tell)
