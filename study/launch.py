"""Starts trials and the teacher's training: in a Tune process, or under Ray Train on workers.

Reports go to the owner of the Optuna study, whose answer, go on or stop, ends the loop on all
workers by itself; nothing is stopped from outside, so that no resources are left behind.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from study.checkpoint import trial_folder
from study.config import InputError, with_values
from study.costs import measure_costs
from study.full_disk import is_full_disk, no_room
from study.hanging import ended_if_it_hangs, hang_in
from study.loop import Row, TrainingDiverged
from study.prepare import StudyData
from study.schema import StudyConfig
from study.teacher import make_teacher
from study.trial import Trial, run_trial
from study.whole_files import write_whole
from study.workers import Workers, settle_in

ERROR_LOG = "error.log"
RAY_FOLDER = ".ray"
"""In the study's folder while it runs: what Tune and Train keep of their own."""


@dataclass(frozen=True)
class StudyPlan:
    """What all trials of a study share; travels to every worker."""

    config: StudyConfig
    data: StudyData
    folder: str
    """The study's folder."""
    targets: str
    """The teacher store."""
    owner: str
    """Name of the actor that owns the Optuna study."""


class OwnerLink:
    """One trial's line to the owner of the Optuna study; only the first worker speaks."""

    def __init__(self, plan: StudyPlan, number: int, *, is_first: bool = True) -> None:
        self.number = number
        self.folder = trial_folder(Path(plan.folder), number)
        self.is_first = is_first
        self.owner = ray.get_actor(plan.owner)

    def report(self, row: Row) -> bool:
        """Tells an epoch's row; returns whether the trial is to stop."""
        return self.is_first and bool(ray.get(self.owner.report.remote(self.number, row)))

    def report_costs(self, trial: Trial, workers: Workers) -> None:
        """Measures what the trial's estimator costs, where the trial runs, and tells it.

        A trial that goes on was measured before it was broken off.
        """
        if self.is_first and not ray.get(self.owner.knows_costs.remote(self.number)):
            costs = measure_costs(trial.config, workers.device)
            ray.get(self.owner.report_costs.remote(self.number, costs))

    def is_halted(self) -> bool:
        """Whether the study is to end, and this trial to wait until it goes on."""
        return ray.get(self.owner.halted.remote()) is not None

    def fail(self, error: BaseException | str) -> None:
        """Ends the trial as failed, for this reason; a full disk ends the study instead."""
        if isinstance(error, BaseException):
            if self.halts(error):
                return
            error = last_line(error)
        if self.is_first:
            ray.get(self.owner.fail.remote(self.number, error))

    def halts(self, error: BaseException) -> bool:
        """Whether the error is that of a full disk; the study ends then."""
        if is_full := is_full_disk(error):
            ray.get(self.owner.halt.remote(no_room(self.folder.parent.parent)))
        return is_full

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A loss that is no number ends the trial; any other error is noted, and raised on.

        The traceback goes to ERROR_LOG in the trial's folder, unless its disk is full.
        """
        try:
            yield
        except TrainingDiverged as error:
            self.fail(str(error))
        except Exception as error:
            if self.halts(error):
                raise
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ERROR_LOG).open("a") as log:
                traceback.print_exc(file=log)
            if self.is_first:
                ray.get(
                    self.owner.note_error.remote(self.number, f"{type(error).__name__}: {error}")
                )
            raise


def trial_of(plan: StudyPlan, suggestion: dict[str, Any]) -> Trial:
    """The trial that a suggestion stands for: number, values by config path, parent's number."""
    folder, parent = Path(plan.folder), suggestion["parent"]
    return Trial(
        number=suggestion["number"],
        config=with_values(plan.config, suggestion["values"]),
        data=plan.data.here(),
        folder=trial_folder(folder, suggestion["number"]),
        targets=Path(plan.targets),
        parent=None if parent is None else trial_folder(folder, parent),
    )


def inline_trial(suggestion: dict[str, Any], plan: StudyPlan) -> None:
    """A trial in its own Tune process: one worker, no further process."""
    settings = plan.config.trial
    link = OwnerLink(plan, suggestion["number"])
    settle_in(settings.cpus)
    workers = Workers(torch.device("cuda" if settings.gpus else "cpu"))
    _run(suggestion, plan, link, workers, tune.report)


def train_trial(suggestion: dict[str, Any], plan: StudyPlan) -> None:
    """A trial whose workers run under Ray Train; its Tune process only waits for them."""
    loop_config = {"plan": plan, "suggestion": suggestion}
    job = job_of_trial(suggestion["number"])
    try:
        run_under_train(_trial_worker, loop_config, plan, job)
    except TrainingFailedError as error:
        OwnerLink(plan, suggestion["number"]).fail(error)


def train_teacher(plan: StudyPlan) -> None:
    """Makes the study's teacher under Ray Train.

    Raises:
        InputError: it could not be trained; says why.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    try:
        with _interruptible():
            run_under_train(_teacher_worker, {"plan": plan}, plan, "teacher")
    except TrainingFailedError as error:
        if is_full_disk(error):
            raise InputError(no_room(Path(plan.targets).parent)) from error
        raise InputError(f"the teacher could not be trained: {last_line(error)}") from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, within and from then on.

    Ray Train's own answer is an exit of status 0, even long after its training is over.
    """
    answer = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not answer:
            signal.signal(signal.SIGINT, answer)


@contextlib.contextmanager
def ray_folder(study_folder: Path) -> Iterator[None]:
    """``RAY_FOLDER`` is empty at first, whatever a killed driver left there, and gone at last."""
    folder = study_folder / RAY_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_under_train(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    plan: StudyPlan,
    job: str,
) -> None:
    """Runs ``worker(config)`` on all workers of a trial under Ray Train, and waits for the end.

    Ray Train starts a broken worker again, up to ``trial.max_failures`` times; it goes on from the
    study's own checkpoints. Those are not Ray Train's, which refuses to go on once one of its
    checkpoints was dropped by anybody else. As often, all of Ray Train is started again.

    Args:
        job: tells what is run from all else that the study runs; names a file.
    """
    retries = plan.config.trial.max_failures
    while True:
        free_what_was_held(plan.folder, job)
        try:
            _trainer(partial(worker, {**config, "job": job}), plan).fit()
            return
        except ray.exceptions.RayActorError:  # its controller died
            if not retries:
                raise
            retries -= 1


def _trainer(worker: Callable[[], None], plan: StudyPlan) -> LeanTrainer:
    settings = plan.config.trial
    resources = {"CPU": settings.cpus}
    if settings.gpus:
        resources["GPU"] = settings.gpus
    return LeanTrainer(
        worker,
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:12]}",
            storage_path=str(Path(plan.folder) / RAY_FOLDER),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


class LeanTrainer(TorchTrainer):
    """Without two of Ray Train's own callbacks, each a further process for each trial.

    One is to free what a killed controller held, but is at a loss without Ray's dashboard, or
    beside another Ray; ``free_what_was_held`` does it everywhere. The other hands out the shards
    of Ray's data sets, of which there are none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        idle = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [callback for callback in callbacks if type(callback).__name__ not in idle]


def job_of_trial(number: int) -> str:
    """What ``run_under_train`` knows the trial by."""
    return f"trial-{number}"


def _note_what_is_held(plan: StudyPlan, job: str) -> None:
    group = get_current_placement_group()
    assert group is not None
    write_whole(_note_of(plan.folder, job), group.id.hex())


def free_what_was_held(study_folder: str | Path, job: str) -> None:
    """The CPUs and GPUs of an earlier try whose controller was killed are free.

    Ray itself frees them only when the driver ends.
    """
    note = _note_of(study_folder, job)
    if note.is_file():
        group = ray.PlacementGroupID(bytes.fromhex(note.read_text()))
        remove_placement_group(PlacementGroup(group))
        note.unlink()


def _note_of(study_folder: str | Path, job: str) -> Path:
    return Path(study_folder) / RAY_FOLDER / f"{job}.held"


def _trial_worker(config: dict[str, Any]) -> None:
    plan, suggestion = config["plan"], config["suggestion"]
    workers = join_workers(config)
    link = OwnerLink(plan, suggestion["number"], is_first=workers.rank == 0)
    _run(suggestion, plan, link, workers, ray.train.report)


def _run(
    suggestion: dict[str, Any],
    plan: StudyPlan,
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
    if reason := hang_in(link.folder):
        link.fail(reason)
        return
    timeout_s = plan.config.trial.timeout_s
    with link.watching(), ended_if_it_hangs(link.folder, workers.rank, timeout_s) as beat:

        def report(row: Row) -> bool:
            beat()
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

    make_teacher(plan.config, plan.data.here(), workers, report, tell)


def resources_in_use() -> dict[str, tuple[float, float]]:
    """CPU and GPU: how many are in use of how many there are; without what there is none of."""
    there_are, free = ray.cluster_resources(), ray.available_resources()
    return {
        name: (there_are[name] - free.get(name, 0.0), there_are[name])
        for name in ("CPU", "GPU")
        if there_are.get(name)
    }


def join_workers(config: dict[str, Any]) -> Workers:
    """This process as one of Ray Train's workers, with the threads of its CPUs.

    Args:
        config: as ``run_under_train`` hands it to each worker.
    """
    resources = ray.get_runtime_context().get_assigned_resources()
    settle_in(resources.get("CPU", 1))
    workers = Workers(ray.train.torch.get_device())
    if workers.rank == 0:
        _note_what_is_held(config["plan"], config["job"])
    return workers


def brief(row: Row) -> dict[str, Any]:
    """What Tune and Train need to know of an epoch; the rest goes to the owner."""
    return {"val_ap": row["val_ap"], "epoch": row["epoch"], "stage": row["stage"]}


def last_line(error: BaseException) -> str:
    """The end of an error's text, where a traceback says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
