"""A study's stores, open in one worker, and the batches that stages train on."""

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
from study.training.batches import Batch, TrainingPeople, epoch_rows, training_batches
from study.training.evaluation import Estimator, evaluate
from study.training.loop import Stage
from study.workers import Workers


class Starts(NamedTuple):
    """Another method's poses, from which stage 2 starts."""

    train: NDArray[np.float32]
    """Poses of the training people: x, y in stored-crop pixels and score, (N, K, 3)."""
    search: NDArray[np.float32]
    """Poses of the people of the search slice, likewise."""


@dataclass(frozen=True)
class TrainingData:
    """The stores of a study, open in one worker."""

    workers: Workers
    skeleton: Skeleton
    evaluation: Kind
    train: CropStore
    search: CropStore
    search_truth: Path
    targets: TargetSource | None
    """Source of the teacher's targets; None trains on labels alone."""

    @classmethod
    def open(
        cls, prepared: PreparedData, resolved: Resolved, workers: Workers, targets: Path | None
    ) -> TrainingData:
        """Open the stores.

        Args:
            targets: the teacher store; None trains on labels alone.
        """
        return cls(
            workers=workers,
            skeleton=resolved.skeleton,
            evaluation=resolved.evaluation,
            train=open_crop_store(Path(prepared.train)),
            search=open_crop_store(Path(prepared.search)),
            search_truth=Path(prepared.search_truth),
            targets=open_teacher_store(targets) if targets else None,
        )

    def stage(
        self,
        name: str,
        settings: TeacherConfig | DistillConfig | RefineConfig,
        augment: AugmentConfig,
        frame: CropFrame,
        *,
        seed: int,
        diagnose: bool = False,
        starts: Starts | None = None,
    ) -> Stage:
        """Return a stage that trains on the training people and is scored on the search slice."""

        def order(generator: torch.Generator) -> list[torch.Tensor]:
            return epoch_rows(len(self.train), settings.batch_size, self.workers.world, generator)

        return Stage(
            name=name,
            epochs=settings.epochs,
            steps_per_epoch=len(order(torch.Generator())),
            optimizer=settings.optimizer,
            seed=seed,
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
        """Yield this worker's share of each global batch.

        Args:
            frame: the frame of the codec that reads the crops.
            order: rows of the people in each global batch.
        """
        people = TrainingPeople(
            self.train, self.skeleton, self.targets, starts.train if starts else None
        )
        return training_batches(people, frame, augment, order, generator, self.workers)

    def score(self, estimator: Estimator, starts: Starts | None = None) -> dict[str, float]:
        """Return AP and its variants on the search slice, the same on every worker."""
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
        return Starts(
            train=stored_starts(Path(start), self.train, self.skeleton),
            search=stored_starts(Path(start), self.search, self.skeleton),
        )


def prepare_start(
    refine: RefineConfig,
    prepared: PreparedData,
    skeleton: Skeleton,
    notify: Callable[[str], None],
) -> None:
    """Check the poses file of ``refine.start``, if it names one.

    Raises:
        InputError: the file is broken, or holds poses of other people.
    """
    if refine.epochs and refine.start not in (STUDENT, JITTER):
        store = open_crop_store(Path(prepared.train))
        found, left = check_start(Path(refine.start), store, skeleton)
        notify(
            f"refine.start has {found} people to train on; {left} start from the student's pose"
        )
