"""What a worker trains on: the study's stores, opened, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore, open_crop_store
from study.cache.predictions import check_start, stored_starts
from study.cache.prepare import PreparedData
from study.cache.teacher_store import TargetSource, open_teacher_store
from study.config.derived import Resolved
from study.config.schema import (
    JITTER,
    STUDENT,
    AugmentConfig,
    DistillConfig,
    Kind,
    RefineConfig,
    TeacherConfig,
)
from study.training.batches import Batch, epoch_rows, training_batches
from study.training.evaluation import Estimator, evaluate
from study.training.loop import Stage
from study.workers import Workers


class Starts(NamedTuple):
    """Another method's poses of the people to train on and of the search slice."""

    train: NDArray[np.float32]
    """x, y in stored-crop pixels and score, (N, K, 3)."""
    search: NDArray[np.float32]


@dataclass(frozen=True)
class TrainingData:
    """The stores of a study, open in one worker."""

    workers: Workers
    skeleton: Skeleton
    evaluation: Kind
    train: CropStore
    search: CropStore
    search_truth: Path
    teacher: TargetSource | None

    @classmethod
    def open(
        cls, data: PreparedData, resolved: Resolved, workers: Workers, teacher: Path | None
    ) -> TrainingData:
        return cls(
            workers=workers,
            skeleton=resolved.skeleton,
            evaluation=resolved.evaluation,
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
            self.evaluation,
            self.workers,
            starts.search if starts else None,
        )

    def starts(self, start: str) -> Starts | None:
        """Return the poses of the file that ``refine.start`` names; None if it names no file."""
        if start in (STUDENT, JITTER):
            return None
        stores = (self.train, self.search)
        return Starts(*(stored_starts(Path(start), store, self.skeleton) for store in stores))


def prepare_start(
    refine: RefineConfig,
    data: PreparedData,
    skeleton: Skeleton,
    notify: Callable[[str], None],
) -> None:
    """Checks the file of ``refine.start``, if it is one, before anything is started for it.

    Raises:
        InputError: the file is broken, or of other people.
    """
    if refine.epochs and refine.start not in (STUDENT, JITTER):
        store = open_crop_store(Path(data.train))
        found, left = check_start(Path(refine.start), store, skeleton)
        notify(
            f"refine.start has {found} people to train on; {left} start from the student's pose"
        )
