"""Views: targets of a crop are the teacher's prediction for that very crop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore
from study.cache.teacher_store import TeacherStore, TeacherTargets, open_teacher_store
from study.config.schema import AugmentConfig
from study.data.augmentation import no_augmentation
from study.storage.paths import TARGETS
from study.teachers.make import draw_views, store_targets
from study.teachers.online import OnlineTeacher
from study.training.batches import Batch, TrainingPeople, plain_batch, training_batches
from study.workers import Workers

CPU = torch.device("cpu")
FRAME = CropFrame((96, 64))
STILL = AugmentConfig(scale=0, rotation=0, flip=0, half_body=0, color=0, erase=0, occlude=0)
TURNED = AugmentConfig(scale=0.35, rotation=40, flip=0, half_body=0.3, color=0, erase=0, occlude=0)
WILD = dataclasses.replace(TURNED, flip=0.5, color=0.2)
NUMBER = 6


class Finder:
    """Teacher that finds each joint at the brightest place of its color."""

    frame = FRAME

    def predict_targets(self, crops: Tensor) -> TeacherTargets:
        blurred = torch.nn.functional.avg_pool2d(crops, 9, 1, 4)
        colors = torch.tensor(
            [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0], [0, 1, -1]], device=crops.device
        )
        maps = torch.einsum("kc,bchw->bkhw", colors, blurred).flatten(2)
        values, place = maps.max(dim=-1)
        width = crops.shape[-1]
        modes = torch.zeros(len(crops), 5, 3, 4)
        modes[:, :, 0, :2] = torch.stack((place % width, place // width), -1).float()
        modes[:, :, 0, 2], modes[:, :, 0, 3] = values / 256, 1
        apart = (modes[:, :, None, 0, 0] - modes[:, None, :, 0, 0]).abs()
        known = torch.tensor([1.0, 1, 0, 1, 1]).expand(len(crops), 5)
        return TeacherTargets(modes, known, 1 - apart / width)

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def stored_views(
    store: CropStore, five: Skeleton, augment: AugmentConfig, folder: Path, seed: int = 1
) -> TeacherStore:
    views = draw_views(store, five, FRAME, augment, number=NUMBER, seed=seed)
    store_targets(
        OnlineTeacher(Finder(), store, store), views, five, Workers(CPU), folder / TARGETS
    )
    return open_teacher_store(folder / TARGETS)


def affines(targets: TeacherStore) -> np.ndarray:
    """Return the affines by view and person, (NUMBER, 13, 6)."""
    assert targets.views is not None
    return targets.views.affine.reshape(NUMBER, 13, 6)


def batch_of(
    store: CropStore,
    five: Skeleton,
    augment: AugmentConfig,
    workers: Workers,
    targets: TeacherStore,
    seed: int = 8,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.arange(13)]
    (batch,) = training_batches(
        TrainingPeople(store, five, targets), FRAME, augment, order, generator, workers
    )
    return batch


def assert_same_targets(found: Batch, expected: TeacherTargets) -> None:
    assert found.teacher_modes is not None and found.teacher_relation is not None
    first, wanted = found.teacher_modes[:, :, 0], expected.modes_crop[:, :, 0]
    torch.testing.assert_close(first[..., :2], wanted[..., :2], atol=0.03, rtol=0)
    torch.testing.assert_close(first[..., 2], wanted[..., 2], atol=1e-3, rtol=0)
    assert found.teacher_mask is not None
    assert torch.equal(found.teacher_mask, expected.known)
    assert expected.relation is not None
    torch.testing.assert_close(found.teacher_relation, expected.relation, atol=0.6 / 127, rtol=0)


@pytest.mark.parametrize("augment", [STILL, TURNED])
def test_targets_of_a_view_equal_the_teachers_prediction_for_its_crop(
    augment: AugmentConfig, five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    batch = batch_of(
        five_store, five, augment, workers, stored_views(five_store, five, augment, tmp_path)
    )
    assert_same_targets(batch, Finder().predict_targets(batch.crops))


def test_mirrored_view_has_a_mirrored_crop_and_mirrored_targets(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = stored_views(five_store, five, TURNED, tmp_path)
    bare = batch_of(five_store, five, TURNED, workers, views)
    found = batch_of(five_store, five, dataclasses.replace(TURNED, flip=1), workers, views)
    # cut by another affine, so rounded differently
    assert (found.crops - bare.crops.flip(-1)).abs().mean() < 0.5
    order = list(five.flip_order)
    for name in ("keypoints_crop", "neighbor_crop", "teacher_modes"):
        there, here = getattr(found, name)[..., 0], getattr(bare, name)[:, order][..., 0]
        torch.testing.assert_close(there, 63 - here, atol=1e-3, rtol=0)
    assert bare.teacher_relation is not None
    assert torch.equal(found.teacher_relation, bare.teacher_relation[:, order][:, :, order])


def test_half_of_the_chosen_views_are_mirrored(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    half = dataclasses.replace(STILL, flip=0.5)
    views = stored_views(five_store, five, half, tmp_path)
    plain = torch.from_numpy(five_store.keypoints_stored[:, 0, 0].copy()) - 16  # of a plain crop
    mirrored = [
        (batch_of(five_store, five, half, workers, views, seed).keypoints_crop[:, 0, 0] - plain)
        .abs()
        .gt(0.01)
        for seed in range(100)
    ]
    assert torch.stack(mirrored).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_each_person_has_only_its_views_and_all_of_them(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = stored_views(five_store, five, TURNED, tmp_path)
    seen: list[set[float]] = [set() for _ in range(13)]
    for seed in range(100):
        batch = batch_of(five_store, five, TURNED, workers, views, seed=seed)
        for crops, brightness in zip(seen, batch.crops.sum(dim=(1, 2, 3)).tolist(), strict=True):
            crops.add(brightness)
    places = affines(views).swapaxes(0, 1)  # a few of them are drawn twice
    distinct = [len(np.unique(of_person, axis=0)) for of_person in places]
    assert [len(crops) for crops in seen] == distinct and min(distinct) > NUMBER / 2


def test_colors_and_patches_vary_over_a_view_with_the_same_targets(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = stored_views(five_store, five, TURNED, tmp_path)
    bare = batch_of(five_store, five, TURNED, workers, views)
    for augment in (
        dataclasses.replace(TURNED, color=0.2),
        dataclasses.replace(TURNED, erase=1.0),
    ):
        batch = batch_of(five_store, five, augment, workers, views)
        assert torch.equal(bare.keypoints_crop, batch.keypoints_crop)
        changed = (bare.crops != batch.crops).any(dim=1).flatten(1).float().mean(dim=1)
        assert (changed > 0.5).all() if augment.color else (changed < 0.2).all()
        assert (changed > 0).all()
        assert_same_targets(batch, Finder().predict_targets(bare.crops))


def test_workers_shares_of_views_are_the_global_batch(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = stored_views(five_store, five, WILD, tmp_path)
    whole = batch_of(five_store, five, WILD, workers, views)
    assert whole.teacher_modes is not None
    for rank in range(2):
        worker = Workers(CPU)
        worker.rank, worker.world = rank, 2
        part = batch_of(five_store, five, WILD, worker, views)
        assert part.teacher_modes is not None
        assert torch.equal(part.crops, whole.crops[rank::2])
        assert torch.equal(part.teacher_modes, whole.teacher_modes[rank::2])


def test_another_seed_draws_other_views_except_the_plain_one(
    five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    first, again, other = (
        affines(stored_views(five_store, five, TURNED, tmp_path / name, seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert np.array_equal(first, again) and np.array_equal(first[0], other[0])
    assert not np.isclose(first[1:], other[1:]).all(axis=2).any()


def test_the_first_view_is_the_plain_crop(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    several = stored_views(five_store, five, TURNED, tmp_path)
    assert len(several) == 13 and len(several.places) == 13 * NUMBER
    plain = plain_batch(five_store, five, FRAME, torch.arange(13), CPU)
    plain_targets = several.augmented(np.arange(13), no_augmentation(13, five, FRAME))
    expected = Finder().predict_targets(plain.crops).modes_crop
    torch.testing.assert_close(
        plain_targets.modes_crop[:, :, 0], expected[:, :, 0], atol=0.03, rtol=0
    )


@pytest.mark.parametrize("frame", [FRAME, CropFrame((96, 64), align_corners=True)])
@pytest.mark.parametrize("scale", [0.35, 0.2])
def test_views_are_used_only_with_their_augmentation_and_frame(
    scale: float,
    frame: CropFrame,
    five_store: CropStore,
    five: Skeleton,
    workers: Workers,
    tmp_path: Path,
) -> None:
    targets = stored_views(five_store, five, TURNED, tmp_path)
    augment = dataclasses.replace(TURNED, scale=scale)
    found = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        (batch,) = training_batches(
            TrainingPeople(five_store, five, targets),
            frame,
            augment,
            [torch.arange(1)],
            generator,
            workers,
        )
        found.add(float(batch.crops.sum()))
    if (frame, scale) == (FRAME, 0.35):
        assert len(found) <= NUMBER
        mirrored = dataclasses.replace(augment, flip=0.5)
        assert targets.has_views(mirrored, frame)
    else:
        assert len(found) > 3 * NUMBER
