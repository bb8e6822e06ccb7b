"""What a worker trains on, and how its epochs are kept: the teacher and the trials alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.build import build_codec, build_model
from models.codec import HeatmapCodec
from models.crop_frame import CropFrame
from models.igp_gcn import IgpGcn
from models.movenet import load_movenet
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from models.weights import load_weights
from study import faults
from study.batches import Batch, epoch_rows, training_batches
from study.checkpoint import Checkpoint, Checkpoints
from study.config import RANDOM, InputError
from study.distill import DistillTask
from study.evaluation import Estimator, evaluate
from study.limits import JITTER, STUDENT
from study.loop import Progress, Row, Stage, seed_of
from study.predictions import check_start, stored_starts
from study.prepare import StudyData, evaluation_of, input_size_of, skeleton_of
from study.refine import RefineTask
from study.schema import (
    AugmentConfig,
    DistillConfig,
    ModelConfig,
    RefineConfig,
    StudyConfig,
    TeacherConfig,
    TrialConfig,
)
from study.store import CropStore, open_crop_store
from study.teacher_store import Targets, open_teacher_store
from study.workers import Workers

Report = Callable[[Row], bool]
"""Takes an epoch's row, on every worker; the first worker's answer is whether to stop."""


def build_network(
    model: ModelConfig, trial: TrialConfig, codec: HeatmapCodec, skeleton: Skeleton, seed: int
) -> tuple[PoseNetwork, frozenset[str]]:
    """The teacher's or the student's network, and its parameters that are from ``init``, by name.

    All other weights are random and follow the seed.

    Raises:
        InputError: ``init`` is no file of weights that fit.
    """
    torch.manual_seed(seed)
    network = build_model(model.name, model.size, skeleton, codec)
    trained: frozenset[str] = frozenset()
    if model.init != RANDOM:
        try:
            path = Path(model.init)
            left_random = (
                load_movenet(network, path, skeleton)
                if path.suffix == ".json"
                else load_weights(network, path)
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        trained = frozenset(name for name, _ in network.named_parameters()) - set(left_random)
    return with_arithmetic(network, trial), trained


def with_arithmetic(network: PoseNetwork, trial: TrialConfig) -> PoseNetwork:
    """The network, which computes as the settings say from now on."""
    network.precision = trial.precision
    if trial.channels_last == "false":
        network.memory_format = torch.contiguous_format
    return network.to(memory_format=network.memory_format)  # type: ignore[call-overload]


def build_distill_task(config: StudyConfig, seed: int) -> DistillTask:
    """Stage 1 of a trial: its student, before training."""
    skeleton, settings = skeleton_of(config), config.student
    codec = build_codec(settings.codec, input_size_of(config), settings.sigma)
    seed = seed_of(seed, "student")
    student, trained = build_network(settings, config.trial, codec, skeleton, seed)
    return DistillTask(
        student,
        codec,
        skeleton,
        config.distill,
        trained,
        flip_test=config.student.flip_test,
    )


def build_refiner(config: StudyConfig, pyramid_channels: tuple[int, int, int]) -> IgpGcn:
    """The IGP-GCN of these settings, for a student with these features."""
    settings = config.refine
    return IgpGcn(
        skeleton_of(config),
        pyramid_channels,
        levels=settings.levels,
        depth=settings.depth,
        width=settings.width,
        dropout=settings.dropout,
        gate=settings.gate,
        candidates=settings.candidates,
        mirror_pairs=settings.start != STUDENT,
    )


def build_refine_task(config: StudyConfig, distilled: DistillTask, refiner: IgpGcn) -> RefineTask:
    """Stage 2 of a trial on top of its student, before training."""
    return RefineTask(
        distilled.student,
        distilled.codec,
        refiner,
        distilled.skeleton,
        config.refine,
        flip_test=config.student.flip_test,
    )


def load_estimator(config: StudyConfig, checkpoint: Checkpoint) -> RefinedPose:
    """The pose estimator of a trial's epoch, in eval mode; ``config`` holds the trial's values."""
    distilled = build_distill_task(config, seed=0)
    task: DistillTask | RefineTask = distilled
    if checkpoint.stage == RefineTask.name:
        refiner = build_refiner(config, distilled.student.pyramid_channels)
        task = build_refine_task(config, distilled, refiner)
    task.load_state_dict(checkpoint.weights())
    return task.estimator().eval()


class Starts(NamedTuple):
    """Another method's poses of the people to train on and of the search slice."""

    train: NDArray[np.float32]
    """x, y in stored-crop pixels and score, (N, K, 3)."""
    search: NDArray[np.float32]


@dataclass(frozen=True)
class TrainingData:
    """The stores of a study, open in one worker."""

    config: StudyConfig
    workers: Workers
    skeleton: Skeleton
    train: CropStore
    search: CropStore
    search_truth: Path
    teacher: Targets | None

    @classmethod
    def open(
        cls, config: StudyConfig, data: StudyData, workers: Workers, teacher: Path | None
    ) -> TrainingData:
        return cls(
            config=config,
            workers=workers,
            skeleton=skeleton_of(config),
            train=open_crop_store(Path(data.train)),
            search=open_crop_store(Path(data.search)),
            search_truth=Path(data.search_truth),
            teacher=open_teacher_store(teacher) if teacher else None,
        )

    def stage(
        self,
        name: str,
        settings: TeacherConfig | DistillConfig | RefineConfig,
        augment: AugmentConfig,
        frame: CropFrame,
        *,
        seed: int,
        first_epoch: int = 0,
        first_step: int = 0,
        diagnose: bool = False,
        starts: Starts | None = None,
    ) -> Stage:
        """A stage of these settings over the people to train on, scored on the search slice."""

        def order(generator: torch.Generator) -> list[torch.Tensor]:
            return epoch_rows(len(self.train), settings.batch_size, self.workers.world, generator)

        return Stage(
            name=name,
            epochs=settings.epochs,
            steps_per_epoch=len(order(torch.Generator())),
            optimizer=settings.optimizer,
            seed=seed,
            first_epoch=first_epoch,
            first_step=first_step,
            batches=lambda generator: self.batches(
                augment, frame, order(generator), generator, starts
            ),
            evaluate=lambda estimator: self.score(estimator, starts),
            diagnose=diagnose,
        )

    def batches(
        self,
        augment: AugmentConfig,
        frame: CropFrame,
        order: list[torch.Tensor],
        generator: torch.Generator,
        starts: Starts | None = None,
    ) -> Iterator[Batch]:
        """This worker's share of these global batches, cut in the frame of a network's codec."""
        return training_batches(
            self.train,
            self.teacher,
            self.skeleton,
            frame,
            augment,
            order,
            generator,
            self.workers,
            starts.train if starts else None,
        )

    def score(self, estimator: Estimator, starts: Starts | None = None) -> dict[str, float]:
        """AP and its kin on the search slice, the same on every worker."""
        return evaluate(
            estimator,
            self.search,
            self.search_truth,
            self.skeleton,
            evaluation_of(self.config),
            self.workers,
            starts.search if starts else None,
        )

    def starts(self) -> Starts | None:
        """The poses of ``refine.start``'s file; None where it names no file."""
        start = self.config.refine.start
        if start in (STUDENT, JITTER):
            return None
        stores = (self.train, self.search)
        return Starts(*(stored_starts(Path(start), store, self.skeleton) for store in stores))


def prepare_start(config: StudyConfig, data: StudyData, say: Callable[[str], None]) -> None:
    """Checks the file of ``refine.start``, if it is one, before anything is started for it.

    Raises:
        InputError: the file is broken, or of other people.
    """
    if config.refine.epochs and config.refine.start not in (STUDENT, JITTER):
        store = open_crop_store(Path(data.train))
        found, left = check_start(Path(config.refine.start), store, skeleton_of(config))
        say(f"refine.start has {found} people to train on; {left} start from the student's pose")


class Recorder:
    """Keeps each epoch on disk, then reports it: in this order a kill loses neither."""

    def __init__(self, checkpoints: Checkpoints, workers: Workers, report: Report) -> None:
        self.checkpoints = checkpoints
        self.workers = workers
        self.report = report
        last = checkpoints.last()
        self.rows: list[Row] = list(last.rows) if last else []

    def replay(self) -> bool:
        """Reports again what the last checkpoint tells; returns whether to stop."""
        stops = [self.report(row) for row in self.rows]
        return bool(self.workers.from_first(any(stops)))

    def finish(self, row: Row, task: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Saves and reports an epoch; returns whether to stop, the same on every worker."""
        self.rows.append(row)
        if self.workers.rank == 0:
            self.checkpoints.save(task.state_dict(), optimizer.state_dict(), self.rows)
            faults.point("saved")
        return bool(self.workers.from_first(self.report(row)))

    def resume(self, stage: Stage, task: nn.Module) -> Progress:
        """The task as its last checkpoint in this stage left it, and how far it had come."""
        seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        last = self.checkpoints.last()
        if last is None or last.stage != stage.name:
            return Progress(epoch=0, seconds=seconds, optimizer=None)
        task.load_state_dict(last.weights())
        return Progress(last.epoch - stage.first_epoch, seconds, last.optimizer())
