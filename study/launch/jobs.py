"""Train a trial as a Ray job: in one process, or with workers under Ray Train.

Trials of the search and confirming runs are jobs. They differ in what they train and where they
record epochs, results and errors; the training, the stall watchdog and the retries are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray
import ray.train
import torch
from ray.train import TrainingFailedError

from study.errors import TrainingDiverged
from study.launch.context import StudyContext
from study.launch.ray_train import release_placement_group, run_under_train
from study.launch.watchdog import exit_on_stall, stall_reason
from study.storage.checkpoint import Row
from study.trial import Trial, run_trial
from study.workers import Workers, configure_process

HEAD_SHARE = {"node:__internal_head__": 0.001}
"""Ray resources of a process that only waits for workers: no CPU, but Tune needs something."""

ReportToRay = Callable[[dict[str, Any]], None]
"""Takes an epoch's columns for Ray's own bookkeeping."""


class JobRecord(Protocol):
    """Records a job's epochs, results and errors, from one of its workers."""

    def is_closed(self) -> bool:
        """Return whether there is nothing to train."""

    def start(self, trial: Trial, workers: Workers) -> None:
        """Record what is known before the training."""

    def report(self, row: Row) -> bool:
        """Record an epoch; return whether to stop."""

    def finish(self, trial: Trial, workers: Workers) -> None:
        """Record the result of the training."""

    def fail(self, reason: str) -> None:
        """Record that the job failed, without another try."""

    def record_error(self, error: Exception) -> None:
        """Record the error of one try; Ray may start another."""

    def give_up(self, error: Exception) -> None:
        """Record that Ray starts no further try after this error."""


class Job(Protocol):
    """A trial that runs as a Ray job; travels to every worker."""

    @property
    def context(self) -> StudyContext: ...

    @property
    def name(self) -> str:
        """Unique name among all jobs of the study, part of a file's name."""

    @property
    def folder(self) -> Path:
        """Folder of the trial's checkpoints."""

    def trial(self) -> Trial:
        """Return the trial with its data on this machine."""

    def open_record(self, *, is_first: bool) -> JobRecord:
        """Open the record on a worker; only that of the first worker writes results."""


JobT = TypeVar("JobT", bound=Job)


def run_inline(job: Job, report_to_ray: ReportToRay = lambda columns: None) -> None:
    """Train the job in this process."""
    settings = job.context.config.trial
    configure_process(settings.cpus)
    workers = Workers(torch.device("cuda" if settings.gpus else "cpu"))
    run_on_worker(job, report_to_ray, workers)


def run_with_workers(job: Job) -> None:
    """Train the job under Ray Train; this process only waits."""
    try:
        run_under_train(partial(_run_under_train, job), job.context, job.name)
    except TrainingFailedError as error:
        job.open_record(is_first=True).give_up(error)


def _run_under_train(job: Job, workers: Workers) -> None:
    run_on_worker(job, ray.train.report, workers)


def run_on_worker(job: Job, report_to_ray: ReportToRay, workers: Workers) -> None:
    """Train the job on this worker and record what comes of it.

    A job that stalled in an earlier try fails, since it would stall again.
    """
    record = job.open_record(is_first=workers.rank == 0)
    if record.is_closed():
        return
    if reason := stall_reason(job.folder):
        record.fail(reason)
        return
    timeout_s = job.context.config.trial.timeout_s
    try:
        with exit_on_stall(job.folder, workers.rank, timeout_s) as heartbeat:

            def send_epoch(row: Row) -> bool:
                heartbeat()
                stop = record.report(row)
                report_to_ray(ray_columns(row))
                return stop

            trial = job.trial()
            record.start(trial, workers)
            run_trial(trial, workers, send_epoch)
            record.finish(trial, workers)
    except TrainingDiverged as error:
        record.fail(str(error))
    except Exception as error:
        record.record_error(error)
        raise


def run_all(jobs: Sequence[JobT], context: StudyContext, concurrent: int) -> Iterator[JobT]:
    """Train the jobs as Ray tasks, ``concurrent`` at once, and yield each once it has ended."""
    task = _ray_task(context)
    waiting = list(jobs)
    running: dict[Any, JobT] = {}
    while waiting or running:
        while waiting and len(running) < concurrent:
            job = waiting.pop(0)
            running[task.remote(job)] = job
        (ended,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(ended)
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            release_placement_group(context.folder, job.name)
            job.open_record(is_first=True).give_up(error)
        yield job


def _ray_task(context: StudyContext) -> Any:
    """Return the Ray task that trains a job, with its resources and retries."""
    settings = context.config.trial
    if context.resolved.launcher == "inline":
        return ray.remote(run_inline).options(
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_retries=settings.max_failures,
            retry_exceptions=True,
        )
    return ray.remote(run_with_workers).options(
        num_cpus=0,
        resources=HEAD_SHARE,
        max_retries=settings.max_failures,
        retry_exceptions=True,
    )


def ray_columns(row: Row) -> dict[str, Any]:
    """Return the columns of an epoch that Tune and Train need."""
    return {"val_ap": row["val_ap"], "epoch": row["epoch"], "stage": row["stage"]}


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where a traceback has its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
