"""Run a function on workers under Ray Train, and release what a killed controller held."""

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
    """Raise KeyboardInterrupt on Ctrl-C in the block, and restore the handler after it.

    Ray Train's handler exits with status 0. It and Tune's stay installed after the training.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


def run_under_train(worker: Callable[[Workers], None], context: StudyContext, job: str) -> None:
    """Run ``worker`` on ``trial.num_workers`` workers under Ray Train, and wait for its end.

    Ray Train restarts failed workers up to ``trial.max_failures`` times, and this function Ray
    Train itself as often if its controller died. Workers resume from the study's own checkpoints:
    Ray Train can't resume from its own once the study has deleted one.

    Args:
        job: unique name among all jobs of the study, part of a file's name.

    Raises:
        ray.train.TrainingFailedError: the workers failed too often.
        ray.exceptions.RayActorError: the controller died too often.
    """
    retries = context.config.trial.max_failures
    while True:
        release_placement_group(context.folder, job)
        try:
            _trainer(partial(_run_as_worker, worker, context, job), context).fit()
            return
        except ray.exceptions.RayActorError:  # the controller died
            if not retries:
                raise
            retries -= 1


def _trainer(train_loop: Callable[[], None], context: StudyContext) -> LeanTrainer:
    settings = context.config.trial
    resources = {"CPU": settings.cpus}
    if settings.gpus:
        resources["GPU"] = settings.gpus
    return LeanTrainer(
        train_loop,
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:12]}",
            storage_path=str(ray_storage(Path(context.folder))),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


class LeanTrainer(TorchTrainer):
    """TorchTrainer without two default callbacks that each start a process per trial.

    PlacementGroupCleanerCallback releases what a killed controller held, but fails without Ray's
    dashboard or next to another Ray; ``release_placement_group`` always works. DatasetsCallback
    splits Ray datasets, which a study does not use.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        unused = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [callback for callback in callbacks if type(callback).__name__ not in unused]


def _run_as_worker(worker: Callable[[Workers], None], context: StudyContext, job: str) -> None:
    """Set up this process as one of Ray Train's workers, and run ``worker``."""
    resources = ray.get_runtime_context().get_assigned_resources()
    configure_process(resources.get("CPU", 1))
    workers = Workers(ray.train.torch.get_device())
    if workers.rank == 0:
        _record_placement_group(context.folder, job)
    worker(workers)


def _record_placement_group(study_folder: str | Path, job: str) -> None:
    group = get_current_placement_group()
    assert group is not None
    write_atomic(_record_path(study_folder, job), group.id.hex())


def release_placement_group(study_folder: str | Path, job: str) -> None:
    """Release the placement group that a killed controller left behind.

    Ray itself releases its CPUs and GPUs only when the driver ends.
    """
    record = _record_path(study_folder, job)
    if record.is_file():
        group = ray.PlacementGroupID(bytes.fromhex(record.read_text()))
        remove_placement_group(PlacementGroup(group))
        record.unlink()


def _record_path(study_folder: str | Path, job: str) -> Path:
    return ray_storage(Path(study_folder)) / f"{job}.held"
