"""What a worker trains on, and how its epochs are kept: the teacher and the trials alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.build import build_codec, build_model, load_weights
from models.codec import HeatmapCodec
from models.igp_gcn import IgpGcn
from models.movenet import load_movenet
from models.pose_features import PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.batches import Batch, epoch_rows, training_batches
from study.checkpoint import Checkpoint, Checkpoints
from study.config import (
    RANDOM,
    AugmentConfig,
    DistillConfig,
    InputError,
    ModelConfig,
    RefineConfig,
    StudyConfig,
    TeacherConfig,
)
from study.distill import DistillTask
from study.evaluation import evaluate
from study.loop import Progress, Row, Stage, seed_of
from study.prepare import StudyData, evaluation_of, input_size_of, skeleton_of
from study.refine import RefineTask
from study.store import CropStore, TeacherStore, open_crop_store, open_teacher_store
from study.workers import Workers

Report = Callable[[Row], bool]
"""Takes an epoch's row, on every worker; the first worker's answer is whether to stop."""


def build_network(
    model: ModelConfig, config: StudyConfig, seed: int
) -> tuple[PoseNetwork, frozenset[str]]:
    """The teacher's or the student's network, and its parameters that are from ``init``, by name.

    All other weights are random and follow the seed.

    Raises:
        InputError: ``init`` is no file of weights that fit.
    """
    torch.manual_seed(seed)
    skeleton, codec = skeleton_of(config), codec_of(model, config)
    network = build_model(model.name, model.size, skeleton, codec)
    trained: frozenset[str] = frozenset()
    if model.init != RANDOM:
        try:
            path = Path(model.init)
            is_movenet = path.suffix == ".json"
            left_random = (
                load_movenet(network, path, skeleton)
                if is_movenet
                else load_weights(network, path)
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        trained = frozenset(name for name, _ in network.named_parameters()) - set(left_random)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, trained


def codec_of(model: ModelConfig, config: StudyConfig) -> HeatmapCodec:
    """The codec of a network's heatmaps at the study's input size."""
    return build_codec(model.codec, input_size_of(config), model.sigma)


def build_distill_task(config: StudyConfig, seed: int) -> DistillTask:
    """Stage 1 of a trial: its student, before training."""
    student, trained = build_network(config.student, config, seed_of(seed, "student"))
    codec = codec_of(config.student, config)
    return DistillTask(student, codec, skeleton_of(config), config.distill, trained)


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
    )


def load_estimator(config: StudyConfig, checkpoint: Checkpoint) -> RefinedPose:
    """The pose estimator of a trial's epoch, in eval mode; ``config`` holds the trial's values."""
    task: DistillTask | RefineTask = build_distill_task(config, seed=0)
    if checkpoint.stage == RefineTask.name:
        refiner = build_refiner(config, task.student.pyramid_channels)
        task = RefineTask(task.student, task.codec, refiner, task.skeleton, config.refine)
    task.load_state_dict(checkpoint.weights())
    return task.estimator().eval()


@dataclass(frozen=True)
class TrainingData:
    """The stores of a study, open in one worker."""

    config: StudyConfig
    workers: Workers
    skeleton: Skeleton
    train: CropStore
    search: CropStore
    search_truth: Path
    teacher: TeacherStore | None

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
        *,
        seed: int,
        first_epoch: int = 0,
        first_step: int = 0,
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
            batches=lambda generator: self.batches(augment, order(generator), generator),
            evaluate=self.score,
        )

    def batches(
        self, augment: AugmentConfig, order: list[torch.Tensor], generator: torch.Generator
    ) -> Iterator[Batch]:
        """This worker's share of these global batches."""
        return training_batches(
            self.train,
            self.teacher,
            self.skeleton,
            augment,
            order,
            generator,
            self.workers,
        )

    def score(self, estimator: RefinedPose) -> dict[str, float]:
        """AP and its kin on the search slice, the same on every worker."""
        kind = evaluation_of(self.config)
        return evaluate(
            estimator, self.search, self.search_truth, self.skeleton, kind, self.workers
        )


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
        return bool(self.workers.from_first(self.report(row)))

    def resume(self, stage: Stage, task: nn.Module) -> Progress:
        """The task as its last checkpoint in this stage left it, and how far it had come."""
        seconds = float(self.rows[-1]["seconds"]) if self.rows else 0.0
        last = self.checkpoints.last()
        if last is None or last.stage != stage.name:
            return Progress(epoch=0, seconds=seconds, optimizer=None)
        task.load_state_dict(last.weights())
        return Progress(last.epoch - stage.first_epoch, seconds, last.optimizer())
