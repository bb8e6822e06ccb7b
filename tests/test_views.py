"""Views that were drawn once: what is taught of each is what the teacher said of that crop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.batches import Batch, training_batches
from study.live_teacher import LiveTeacher
from study.schema import AugmentConfig
from study.store import CropStore
from study.teacher import ask_views
from study.teacher_store import Answer
from study.training import TrainingData
from study.views import VIEWS, Views, open_views
from study.workers import Workers

CPU = torch.device("cpu")
FRAME = CropFrame((96, 64))
STILL = AugmentConfig(scale=0, rotation=0, flip=0, half_body=0, colour=0, erase=0, occlude=0)
MIRROR = dataclasses.replace(STILL, flip=1)
WILD = AugmentConfig(
    scale=0.35, rotation=40, flip=0.5, half_body=0.3, colour=0.2, erase=0.0, occlude=0.0
)
NUMBER = 6


class Finder:
    """Finds each joint at the brightest place of a colour; no two joints look for the same."""

    frame = FRAME

    def ask(self, crops: Tensor) -> Answer:
        blurred = torch.nn.functional.avg_pool2d(crops, 9, 1, 4)
        colours = torch.tensor(
            [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0], [0, 1, -1]], device=crops.device
        )
        maps = torch.einsum("kc,bchw->bkhw", colours, blurred).flatten(2)
        values, place = maps.max(dim=-1)
        width = crops.shape[-1]
        modes = torch.zeros(len(crops), 5, 3, 4)
        modes[:, :, 0, :2] = torch.stack((place % width, place // width), -1).float()
        modes[:, :, 0, 2], modes[:, :, 0, 3] = values / 256, 1
        apart = (modes[:, :, None, 0, 0] - modes[:, None, :, 0, 0]).abs()
        taught = torch.tensor([1.0, 1, 0, 1, 1]).expand(len(crops), 5)
        return Answer(modes, taught, 1 - apart / width)

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def asked(
    store: CropStore, five: Skeleton, augment: AugmentConfig, folder: Path, seed: int = 1
) -> Views:
    ask_views(
        *(LiveTeacher(Finder(), store, store), five, FRAME, augment),
        number=NUMBER,
        seed=seed,
        device=CPU,
        target=folder / VIEWS,
    )
    return open_views(folder / VIEWS)


def batch_of(
    store: CropStore,
    five: Skeleton,
    augment: AugmentConfig,
    workers: Workers,
    views: Views | None,
    seed: int = 8,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.arange(13)]
    (batch,) = training_batches(
        *(store, None, five, FRAME, augment, order, generator, workers), views=views
    )
    return batch


def assert_same_answer(found: Batch, expected: Answer) -> None:
    assert found.teacher_modes is not None and found.teacher_relation is not None
    first, wanted = found.teacher_modes[:, :, 0], expected.modes_crop[:, :, 0]
    torch.testing.assert_close(first[..., :2], wanted[..., :2], atol=0.03, rtol=0)
    torch.testing.assert_close(first[..., 2], wanted[..., 2], atol=1e-3, rtol=0)
    assert found.teacher_taught is not None
    assert torch.equal(found.teacher_taught, expected.taught)
    assert expected.relation is not None
    torch.testing.assert_close(found.teacher_relation, expected.relation, atol=0.6 / 127, rtol=0)


@pytest.mark.parametrize("augment", [STILL, MIRROR, WILD])
def test_what_is_taught_is_what_the_teacher_says_of_the_very_crop(
    augment: AugmentConfig, five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    batch = batch_of(
        five_store, five, augment, workers, asked(five_store, five, augment, tmp_path)
    )
    assert_same_answer(batch, Finder().ask(batch.crops))


def test_a_mirrored_view_is_the_mirrored_person(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = asked(five_store, five, MIRROR, tmp_path)
    found = batch_of(five_store, five, MIRROR, workers, views)
    drawn = batch_of(five_store, five, MIRROR, workers, None)
    for name in ("crops", "keypoints_crop", "visibility", "areas_crop", "neighbour_crop"):
        torch.testing.assert_close(getattr(found, name), getattr(drawn, name))


def test_each_person_comes_in_all_its_views_and_no_other(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = asked(five_store, five, WILD, tmp_path)
    seen: list[set[float]] = [set() for _ in range(13)]
    for seed in range(100):
        batch = batch_of(five_store, five, WILD, workers, views, seed=seed)
        for crops, brightness in zip(seen, batch.crops.sum(dim=(1, 2, 3)).tolist(), strict=True):
            crops.add(brightness)
    assert [len(crops) for crops in seen] == [NUMBER] * 13


def test_workers_shares_of_views_together_are_the_global_batch(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    views = asked(five_store, five, WILD, tmp_path)
    whole = batch_of(five_store, five, WILD, workers, views)
    assert whole.teacher_modes is not None
    for rank in range(2):
        worker = Workers(CPU)
        worker.rank, worker.world = rank, 2
        part = batch_of(five_store, five, WILD, worker, views)
        assert part.teacher_modes is not None
        assert torch.equal(part.crops, whole.crops[rank::2])
        assert torch.equal(part.teacher_modes, whole.teacher_modes[rank::2])


def test_another_seed_draws_other_views(
    five_store: CropStore, five: Skeleton, tmp_path: Path
) -> None:
    first, again, other = (
        asked(five_store, five, WILD, tmp_path / name, seed).affine
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert np.array_equal(first, again) and not np.isclose(first, other).all(axis=(1, 2)).any()


def test_patches_are_drawn_anew_over_a_view(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    hidden = dataclasses.replace(WILD, erase=1.0)
    views = asked(five_store, five, hidden, tmp_path)
    assert views.augment == WILD
    bare = batch_of(five_store, five, WILD, workers, views)
    patched = batch_of(five_store, five, hidden, workers, views)
    assert torch.equal(bare.keypoints_crop, patched.keypoints_crop)
    changed = (bare.crops != patched.crops).any(dim=1).flatten(1).float().mean(dim=1)
    assert (changed > 0).all() and (changed < 0.2).all()
    assert_same_answer(patched, Finder().ask(bare.crops))


def test_a_stage_that_is_augmented_otherwise_draws_anew(
    five_store: CropStore, five: Skeleton, workers: Workers, tmp_path: Path
) -> None:
    nothing: Any = None
    data = TrainingData(
        *(nothing, workers, five, five_store, five_store, tmp_path, None),
        views=asked(five_store, five, WILD, tmp_path),
    )

    def different_crops(augment: AugmentConfig) -> int:
        found = set()
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            (batch,) = data.batches(augment, FRAME, [torch.arange(1)], generator)
            found.add(float(batch.crops.sum()))
        return len(found)

    assert different_crops(WILD) <= NUMBER
    assert different_crops(dataclasses.replace(WILD, scale=0.2)) == 20
