"""Batches: crops, truth, neighbor and teacher targets in one frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore
from study.cache.teacher_store import (
    TeacherStore,
    TeacherTargets,
    open_teacher_store,
    write_teacher_store,
)
from study.config.schema import AugmentConfig
from study.data.augmentation import draw_augmentation
from study.data.crops import apply_affine
from study.data.people import People
from study.training.batches import (
    Batch,
    TrainingPeople,
    epoch_rows,
    evaluation_batches,
    shard,
    training_batches,
)
from study.workers import Workers

STILL = AugmentConfig(scale=0, rotation=0, flip=0, half_body=0, color=0, erase=0, occlude=0)
MIRROR = AugmentConfig(scale=0, rotation=0, flip=1, half_body=0, color=0, erase=0, occlude=0)
WILD = AugmentConfig(
    scale=0.35, rotation=40, flip=0.5, half_body=0.3, color=0.2, erase=0, occlude=0
)
FRAME = CropFrame((96, 64))
MARGIN = torch.tensor([16.0, 24.0])
"""Margin of the stored crop of a (96, 64) input on the left and above, px."""
HALF = {"atol": 1e-3, "rtol": 0.0}
"""Tolerance of values that are stored in half precision."""
STEP = {"atol": 0.02, "rtol": 0.0}
"""Tolerance of places: stored in steps of 2/65535 of the crop, 0.004 px, zoomed by up to 4."""
ORDER = [0, 2, 1, 4, 3]
"""Joints of the five-joint skeleton in mirrored order."""


def one_of(rank: int, world: int) -> Workers:
    """Return one of several workers; the others do not run."""
    worker = Workers(torch.device("cpu"))
    worker.rank, worker.world = rank, world
    return worker


@pytest.fixture(scope="module")
def perfect(five_store: CropStore, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    """Targets whose first mode is the truth and whose relation encodes both joints."""
    modes = np.zeros((13, 5, 3, 4), np.float32)
    modes[:, :, 0, :2] = five_store.keypoints_stored
    modes[:, :, 0, 2] = 0.1 * np.arange(5) + 0.5
    modes[:, :, 1, :2] = five_store.keypoints_stored + np.array([5, 0], np.float32)
    relation = torch.eye(5).expand(13, 5, 5).clone()
    for i, j in zip(*np.triu_indices(5, 1), strict=True):
        relation[:, i, j] = relation[:, j, i] = (10 * i + j) / 127
    known = torch.ones(13, 5)
    known[:, 3] = 0
    path = tmp_path_factory.mktemp("perfect") / "targets.arrow"
    targets = TeacherTargets(torch.from_numpy(modes), known, relation)
    write_teacher_store(path, (144, 96), 13, targets.part)
    return open_teacher_store(path)


def batches(
    store: CropStore,
    skeleton: Skeleton,
    augment: AugmentConfig,
    worker: Workers,
    *,
    teacher: TeacherStore | None = None,
    rows: list[list[int]] | None = None,
    starts: np.ndarray | None = None,
) -> Iterator[Batch]:
    order = [torch.tensor(part) for part in rows or [list(range(13))]]
    generator = torch.Generator().manual_seed(8)
    return training_batches(
        TrainingPeople(store, skeleton, teacher, starts), FRAME, augment, order, generator, worker
    )


def plain_keypoints(store: CropStore) -> Tensor:
    return torch.from_numpy(store.keypoints_stored.copy()) - MARGIN


def test_people_without_augmentation_are_as_stored(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    (batch,) = batches(five_store, five, STILL, workers)
    stored = torch.from_numpy(np.stack(five_store.crops(np.arange(13))))[:, 24:120, 16:80]
    torch.testing.assert_close(batch.crops, stored.permute(0, 3, 1, 2).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.keypoints_crop, plain_keypoints(five_store))
    assert np.array_equal(batch.visibility, five_store.visibility)
    assert np.array_equal(batch.areas_crop, five_store.areas)
    assert batch.teacher_modes is batch.teacher_mask is batch.teacher_relation is None


def test_mirrored_people_have_their_joints_in_mirrored_order(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    (batch,) = batches(five_store, five, MIRROR, workers)
    (plain,) = batches(five_store, five, STILL, workers)
    expected = plain.keypoints_crop[:, ORDER] * torch.tensor([-1.0, 1.0])
    expected += torch.tensor([63.0, 0.0])
    torch.testing.assert_close(batch.keypoints_crop, expected)
    assert torch.equal(batch.visibility, plain.visibility[:, ORDER])
    assert torch.equal(batch.neighbor_visibility, plain.neighbor_visibility[:, ORDER])
    torch.testing.assert_close(batch.crops, plain.crops.flip(-1), atol=1e-3, rtol=0)


def test_mirrored_people_have_their_teacher_in_mirrored_order(
    five_store: CropStore, five: Skeleton, workers: Workers, perfect: TeacherStore
) -> None:
    (batch,) = batches(five_store, five, MIRROR, workers, teacher=perfect)
    assert batch.teacher_modes is not None and batch.teacher_relation is not None
    heights = batch.teacher_modes[:, :, 0, 2]
    torch.testing.assert_close(heights[0], torch.tensor([0.5, 0.7, 0.6, 0.9, 0.8]), **HALF)
    named = [[10 * min(i, j) + max(i, j) if i != j else 127 for j in ORDER] for i in ORDER]
    assert (127 * batch.teacher_relation[3]).round().int().tolist() == named
    assert batch.teacher_mask is not None  # joint 3 has no target, and is joint 4 in the mirror
    assert batch.teacher_mask.tolist() == [[1, 1, 1, 1, 0]] * 13


@pytest.mark.parametrize("augment", [STILL, MIRROR, WILD])
def test_given_poses_are_augmented_like_the_truth(
    augment: AugmentConfig, five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    scores = np.broadcast_to(np.arange(5)[:, None] / 10, (13, 5, 1))
    starts = np.concatenate((five_store.keypoints_stored, scores), axis=2).astype(np.float32)
    (batch,) = batches(five_store, five, augment, workers, starts=starts)
    assert batch.start_crop is not None
    assert torch.equal(batch.start_crop[..., :2], batch.keypoints_crop)
    mirrored = torch.from_numpy(scores[:, ORDER, 0].copy()).float()
    if augment is MIRROR:
        torch.testing.assert_close(batch.start_crop[..., 2], mirrored)
    assert next(batches(five_store, five, augment, workers)).start_crop is None


def test_teacher_without_features_lacks_only_the_relation(
    five_store: CropStore, five: Skeleton, workers: Workers, perfect: TeacherStore
) -> None:
    without_relation = dataclasses.replace(perfect, relation=None)
    (batch,) = batches(five_store, five, STILL, workers, teacher=without_relation)
    assert batch.teacher_relation is None and batch.teacher_modes is not None
    assert batch.teacher_mask is not None
    assert batch.teacher_mask.tolist() == [[1, 1, 1, 0, 1]] * 13


def test_augmented_teacher_modes_match_the_augmented_joints(
    five_store: CropStore, five: Skeleton, workers: Workers, perfect: TeacherStore
) -> None:
    (batch,) = batches(five_store, five, WILD, workers, teacher=perfect)
    assert batch.teacher_modes is not None
    places = batch.teacher_modes[..., :2]
    torch.testing.assert_close(places[:, :, 0], batch.keypoints_crop, **STEP)
    # a second mode 5 px away stays 5 px times the zoom away, and zoom squared is that of areas
    away = (places[:, :, 1] - places[:, :, 0]).norm(dim=-1)[:, 0]
    zoom = (batch.areas_crop / torch.from_numpy(five_store.areas.copy())).sqrt()
    torch.testing.assert_close(away, 5 * zoom, **STEP)


def test_areas_follow_the_affine(five_store: CropStore, five: Skeleton, workers: Workers) -> None:
    (batch,) = batches(five_store, five, WILD, workers)
    keypoints = torch.from_numpy(five_store.keypoints_stored.copy())
    visibility = torch.from_numpy(five_store.visibility.copy())
    generator = torch.Generator().manual_seed(8)
    drawn = draw_augmentation(keypoints, visibility, five, FRAME, WILD, generator)
    expected = (
        torch.from_numpy(five_store.areas.copy()) * torch.linalg.det(drawn.affine[..., :2]).abs()
    )
    torch.testing.assert_close(batch.areas_crop, expected)


def test_neighbor_is_in_pixels_of_the_persons_crop(
    five_people: People, five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    (batch,) = batches(five_store, five, STILL, workers)
    for row, neighbor in enumerate(five_people.neighbors):
        if neighbor < 0:
            continue
        in_image = five_people.keypoints_image[neighbor][None]
        expected = apply_affine(in_image, five_store.image_to_stored[row][None])[0]
        np.testing.assert_allclose(
            batch.neighbor_crop[row] + MARGIN, expected.astype(np.float32), atol=1e-3
        )
        assert np.array_equal(batch.neighbor_visibility[row], five_people.visibility[neighbor])


def test_person_without_overlap_has_a_neighbor_without_joints(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    (batch,) = batches(five_store, five, WILD, workers)
    alone = torch.from_numpy(five_store.neighbors < 0)
    assert alone.any() and (batch.neighbor_visibility[alone] == 0).all()
    assert (batch.neighbor_visibility[~alone] > 0).any(dim=1).all()


@pytest.mark.parametrize("world", [2, 3])
def test_workers_shares_are_the_global_batch(
    world: int, five_store: CropStore, five: Skeleton, workers: Workers, perfect: TeacherStore
) -> None:
    rows = [[3, 1, 12, 7, 0, 4], [2, 5, 9, 8, 10, 6]]
    starts = np.concatenate((five_store.keypoints_stored, np.ones((13, 5, 1))), 2, dtype="f4")

    def shares_of(worker: Workers) -> list[Batch]:
        found = batches(five_store, five, WILD, worker, teacher=perfect, rows=rows, starts=starts)
        return list(found)

    whole = shares_of(workers)
    shares = [shares_of(one_of(rank, world)) for rank in range(world)]
    for step, one in enumerate(whole):
        for name, value in vars(one).items():
            together = torch.stack([getattr(share[step], name) for share in shares], 1)
            torch.testing.assert_close(together.flatten(0, 1), value, atol=1e-5, rtol=1e-5)


def test_shards_hold_each_row_once() -> None:
    rows = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    parts = [shard(rows, one_of(rank, 4)).tolist() for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    assert sorted(row for part in parts for row in part) == list(range(11))


@pytest.mark.parametrize(
    ("count", "batch_size", "world", "sizes"),
    [
        (13, 4, 1, [4, 4, 4, 1]),
        (13, 4, 2, [4, 4, 4]),
        (15, 4, 2, [4, 4, 4, 2]),
        (12, 4, 2, [4, 4, 4]),
        (5, 32, 2, [4]),
        (8, 3, 3, [3, 3]),
    ],
)
def test_last_batch_is_cut_to_a_multiple_of_the_workers(
    count: int, batch_size: int, world: int, sizes: list[int]
) -> None:
    rows = epoch_rows(count, batch_size, world, torch.Generator().manual_seed(0))
    assert [len(part) for part in rows] == sizes
    everyone = torch.cat(rows).tolist()
    assert len(set(everyone)) == len(everyone)


def test_every_epoch_has_another_order_and_leaves_out_other_people() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat(epoch_rows(9, 4, 2, generator)).tolist() for _ in range(20)]
    left_out = [set(range(9)) - set(order) for order in epochs]
    assert all(len(out) == 1 for out in left_out)
    assert len(set.union(*left_out)) > 4 and len({tuple(order) for order in epochs}) == 20


def test_evaluation_has_each_of_the_first_people_once_and_plain(
    five_store: CropStore, five: Skeleton
) -> None:
    seen: list[int] = []
    for rank in range(2):
        for rows, batch in evaluation_batches(five_store, five, FRAME, 11, 3, one_of(rank, 2)):
            seen += rows.tolist()
            assert len(rows) <= 3
            torch.testing.assert_close(batch.keypoints_crop, plain_keypoints(five_store)[rows])
    assert sorted(seen) == list(range(11))


def test_the_same_generator_gives_the_same_batch(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    first, second = (next(batches(five_store, five, WILD, workers)) for _ in range(2))
    assert torch.equal(first.crops, second.crops)


def test_to_moves_existing_fields_and_keeps_missing_ones(
    five_store: CropStore, five: Skeleton, workers: Workers
) -> None:
    moved = next(batches(five_store, five, STILL, workers)).to(torch.device("meta"))
    assert moved.crops.device.type == "meta" and moved.teacher_modes is None
