"""An online teacher sees the student's crops, and stored targets agree with its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.codecs.gaussian import Dark
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.prepare import PreparedData
from study.cache.teacher_store import TeacherTargets, open_teacher_store
from study.config.compose import with_values
from study.config.derived import resolve
from study.config.schema import AugmentConfig, StudyConfig
from study.data.augmentation import draw_augmentation
from study.data.crops import transform_points
from study.data.people import People
from study.errors import InputError
from study.storage.paths import TARGETS
from study.teachers.adapters import TeacherSpec
from study.teachers.identity import teacher_folder
from study.teachers.make import draw_views, make_teacher, store_targets
from study.teachers.online import OnlineTeacher
from study.teachers.target_error import describe_targets, target_error
from study.training.batches import TrainingPeople, crops_of, training_batches
from study.trial import Trial, run_trial, teacher_spec
from study.workers import Workers

CPU = torch.device("cpu")
FRAME = CropFrame((96, 64))
WILD = AugmentConfig(
    scale=0.35, rotation=40, flip=0.5, half_body=0.3, color=0.2, erase=0.3, occlude=0.3
)


def spec_of(config: StudyConfig) -> TeacherSpec:
    return teacher_spec(config, resolve(config))


class Finder:
    """Teacher that finds joint j where the blurred color channel j % 3 is highest."""

    def __init__(self, frame: CropFrame) -> None:
        self.frame = frame
        self.seen: list[Tensor] = []

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        self.seen.append(crops)
        blurred = torch.nn.functional.avg_pool2d(crops, 9, 1, 4)
        width = crops.shape[-1]
        modes = torch.zeros(len(crops), 5, 3, 4)
        for joint in range(5):
            place = blurred[:, joint % 3].flatten(1).argmax(1)
            modes[:, joint, 0, :2] = torch.stack((place % width, place // width), -1).float()
        modes[:, :, 0, 2:] = 1
        return TeacherTargets(modes, torch.ones(len(crops), 5), None)

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Truthful:
    """Teacher that predicts the given joints, whatever it sees."""

    def __init__(self, frame: CropFrame, truth: Tensor) -> None:
        self.frame = frame
        self.truth = truth

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        modes = torch.zeros(len(crops), 5, 3, 4)
        modes[:, :, 0, :2] = self.truth
        modes[:, :, 0, 2:] = 1
        return TeacherTargets(modes, torch.ones(len(crops), 5), None)

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def square_store(five_people: People, tmp_path_factory: pytest.TempPathFactory) -> CropStore:
    return open_crop_store(
        make_crop_store(five_people, StoreSpec((128, 128), tmp_path_factory.mktemp("square")))
    )


def wild(store: CropStore, five: Skeleton) -> tuple[Any, Tensor]:
    rows = torch.arange(13)
    stored = (store.keypoints_stored, store.visibility)
    points, seen = (torch.from_numpy(part.copy()) for part in stored)
    generator = torch.Generator().manual_seed(4)
    return draw_augmentation(points, seen, five, FRAME, WILD, generator), rows


def test_teacher_of_the_students_frame_sees_the_same_crops(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    teacher = Finder(FRAME)
    online = OnlineTeacher(teacher, five_store, five_store)
    (batch,) = training_batches(
        TrainingPeople(five_store, five, online),
        FRAME,
        WILD,
        [torch.arange(13)],
        torch.Generator(),
        workers,
    )
    (seen,) = teacher.seen
    assert torch.equal(seen, batch.crops)
    assert batch.teacher_modes is not None and batch.teacher_relation is None
    assert torch.equal(batch.teacher_modes, teacher.predict_targets(batch.crops).modes_crop)


def test_teacher_of_another_frame_sees_the_same_places_in_its_frame(
    five_store: CropStore, square_store: CropStore, five: Skeleton
) -> None:
    drawn, rows = wild(five_store, five)
    drawn = dataclasses.replace(drawn, patches=None)
    crops = crops_of(five_store, rows, drawn, rows, FRAME, CPU)
    teacher = Finder(CropFrame((128, 128)))
    online = OnlineTeacher(teacher, square_store, five_store)
    online.targets(rows.numpy(), drawn, FRAME, crops)
    (seen,) = teacher.seen
    assert seen.shape == (13, 3, 128, 128)
    # the middle half of a square crop, shrunk, is the middle of the student's crop
    zoom = online._student_to_own(rows.numpy(), FRAME)[:, 0, 0]
    for person, factor in enumerate(zoom):
        side = round(40 * factor)
        middle = seen[person, :, 64 - side // 2 : 64 + side // 2, 64 - side // 2 : 64 + side // 2]
        small = torch.nn.functional.interpolate(middle[None], (40, 40), mode="area")[0]
        assert (small - crops[person, :, 28:68, 12:52]).abs().mean() < 9


def test_targets_are_transformed_to_the_students_crop(
    five_store: CropStore, square_store: CropStore, five: Skeleton
) -> None:
    drawn, rows = wild(five_store, five)
    crops = crops_of(five_store, rows, drawn, rows, FRAME, CPU)
    square = CropFrame((128, 128))
    truth = transform_points(drawn.in_flip_order(five_store.keypoints_stored.copy()), drawn.affine)
    online = OnlineTeacher(Truthful(square, torch.zeros(13, 5, 2)), square_store, five_store)
    student_to_own = torch.from_numpy(online._student_to_own(rows.numpy(), FRAME)).float()
    truth_own = transform_points(truth, student_to_own)
    online = OnlineTeacher(Truthful(square, truth_own), square_store, five_store)
    targets = online.targets(rows.numpy(), drawn, FRAME, crops)
    torch.testing.assert_close(targets.modes_crop[:, :, 0, :2], truth, atol=1e-3, rtol=0)


class ShiftedTruth:
    """Online teacher that predicts the truth, shifted by ``off`` pixels to the right."""

    def __init__(self, store: CropStore, five: Skeleton, off: float) -> None:
        self.frame, self.store, self.off = FRAME, store, off

    def targets(self, rows: Any, drawn: Any, frame: CropFrame, crops: Tensor) -> TeacherTargets:
        truth = transform_points(
            drawn.in_flip_order(self.store.keypoints_stored[rows].copy()), drawn.affine
        )
        modes = torch.zeros(len(rows), 5, 3, 4)
        modes[:, :, 0, :2] = truth + torch.tensor([self.off, 0.0])
        modes[:, :, 0, 2:] = 1
        return TeacherTargets(modes, torch.ones(len(rows), 5), None)


@pytest.mark.parametrize("off", [0.0, 3.0])
def test_target_error_equals_the_shift_of_the_targets(
    off: float, five_store: CropStore, five: Skeleton, tmp_path: Path, workers: Workers
) -> None:
    truth = torch.from_numpy(five_store.keypoints_stored.copy()) - torch.tensor([16.0, 24.0])
    truthful = OnlineTeacher(Truthful(FRAME, truth), five_store, five_store)
    views = draw_views(five_store, five, FRAME, AugmentConfig(*[0.0] * 7), number=1, seed=0)
    store_targets(truthful, views, five, workers, tmp_path / TARGETS)
    online: Any = ShiftedTruth(five_store, five, off)
    online.student = five_store
    codec = Dark((96, 64), (24, 16))
    error = target_error(open_teacher_store(tmp_path / TARGETS), online, five, codec, CPU, seed=1)
    assert error["joints"] > 20
    assert error["median_px"] == pytest.approx(off, abs=0.02)
    assert error["p90_px"] == pytest.approx(off, abs=0.02)
    assert error["height"] == pytest.approx(0, abs=1e-3)
    # a Gaussian of 2 cells moved by 3/4 cell: 2 - 2 exp(-0.75^2 / 16), apart from what is cut off
    assert error["energy"] == pytest.approx(2 - 2 * np.exp(-((off / 4) ** 2) / 16), abs=0.012)


@pytest.mark.slow
def test_trial_learns_from_an_online_teacher(
    mini_config: StudyConfig, mini_data: PreparedData, workers: Workers, tmp_path: Path
) -> None:
    # a separate seed, because other tests need a study without a teacher
    mini_config = with_values(mini_config, {"seed": 9})
    make_teacher(
        spec_of(mini_config),
        mini_config.student,
        mini_data,
        workers,
        lambda row: False,
    )
    folder = teacher_folder(spec_of(mini_config), mini_data)
    description = describe_targets(folder)
    assert "561 bytes a person, 84 MB for COCO's 150,000 (here times 2," in description
    losses = {}
    for mode in ("cached", "online"):
        config = with_values(mini_config, {"teacher.mode": mode})
        assert teacher_folder(spec_of(config), mini_data) == folder
        rows: list[dict[str, Any]] = []
        trial = Trial(1, config, resolve(config), mini_data, tmp_path / mode, folder / TARGETS)
        run_trial(trial, workers, lambda row, rows=rows: bool(rows.append(row)))  # type: ignore[misc]
        losses[mode] = [row["loss.heatmap"] for row in rows if row["stage"] == "distill"]
        assert len(rows) == 4
    assert losses["cached"] != losses["online"]
    np.testing.assert_allclose(losses["cached"], losses["online"], rtol=0.5)


def test_predictions_cannot_be_an_online_teacher(mini_config: StudyConfig) -> None:
    values = {
        "teacher.name": "predictions",
        "teacher.epochs": 0,
        "teacher.init": "poses.json",
        "teacher.mode": "online",
        "distill.structure.kind": "none",
    }
    with pytest.raises(InputError, match="has no network to run online"):
        with_values(mini_config, values)
