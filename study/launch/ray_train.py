"""Run a worker function under Ray Train, and release what a killed controller left behind."""

from __future__ import annotations

import contextlib
import signal
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from study.launch.context import StudyContext
from study.storage.files import write_atomic
from study.storage.paths import ray_storage
from study.workers import Workers, configure_process


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
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


def run_under_train(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    plan: StudyContext,
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
        release_placement_group(plan.folder, job)
        try:
            _trainer(partial(worker, {**config, "job": job}), plan).fit()
            return
        except ray.exceptions.RayActorError:  # its controller died
            if not retries:
                raise
            retries -= 1


def _trainer(worker: Callable[[], None], plan: StudyContext) -> LeanTrainer:
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
            storage_path=str(ray_storage(Path(plan.folder))),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


class LeanTrainer(TorchTrainer):
    """Without two of Ray Train's own callbacks, each a further process for each trial.

    One is to free what a killed controller held, but is at a loss without Ray's dashboard, or
    beside another Ray; ``release_placement_group`` does it everywhere. The other hands out the
    shards of Ray's data sets, of which there are none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        idle = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [callback for callback in callbacks if type(callback).__name__ not in idle]


def job_of_trial(number: int) -> str:
    """What ``run_under_train`` knows the trial by."""
    return f"trial-{number}"


def _record_placement_group(plan: StudyContext, job: str) -> None:
    group = get_current_placement_group()
    assert group is not None
    write_atomic(_record_path(plan.folder, job), group.id.hex())


def release_placement_group(study_folder: str | Path, job: str) -> None:
    """The CPUs and GPUs of an earlier try whose controller was killed are free.

    Ray itself frees them only when the driver ends.
    """
    note = _record_path(study_folder, job)
    if note.is_file():
        group = ray.PlacementGroupID(bytes.fromhex(note.read_text()))
        remove_placement_group(PlacementGroup(group))
        note.unlink()


def _record_path(study_folder: str | Path, job: str) -> Path:
    return ray_storage(Path(study_folder)) / f"{job}.held"


def join_workers(config: dict[str, Any]) -> Workers:
    """This process as one of Ray Train's workers, with the threads of its CPUs.

    Args:
        config: as ``run_under_train`` hands it to each worker.
    """
    resources = ray.get_runtime_context().get_assigned_resources()
    configure_process(resources.get("CPU", 1))
    workers = Workers(ray.train.torch.get_device())
    if workers.rank == 0:
        _record_placement_group(config["plan"], config["job"])
    return workers
