"""Teacher stores: targets are read back as written, small, and never half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from study.cache.teacher_store import (
    TeacherStore,
    TeacherTargets,
    open_teacher_store,
    write_teacher_store,
)
from study.workers import Workers

STORED = (384, 288)


class Killed(BaseException):
    """Stand-in for whatever ends a process in the middle of a write."""


def random_targets(count: int, joints: int = 5) -> TeacherTargets:
    """Return random targets, some of them beyond the stored crop."""
    rng = torch.Generator().manual_seed(2)
    modes = torch.rand(count, joints, 3, 4, generator=rng)
    modes[..., :2] = modes[..., :2] * torch.tensor([500.0, 660.0]) - 100
    relation = torch.rand(count, joints, joints, generator=rng) * 2 - 1
    relation = (relation + relation.mT) / 2
    relation[:, range(joints), range(joints)] = 1
    return TeacherTargets(
        modes, torch.arange(count)[:, None] % 2 + torch.zeros(count, joints), relation
    )


def write_and_open(targets: TeacherTargets, path: Path) -> TeacherStore:
    write_teacher_store(path, STORED, len(targets.modes_crop), targets.part)
    return open_teacher_store(path)


def test_targets_are_read_back_in_order_to_a_hundredth_of_a_pixel(tmp_path: Path) -> None:
    targets = random_targets(150)  # more than two batches of 64
    store = write_and_open(targets, tmp_path / "sub" / "targets.arrow")
    assert len(store) == 150
    modes = store.modes_stored()
    expected = targets.modes_crop.numpy()
    np.testing.assert_allclose(modes[..., :2], expected[..., :2], atol=0.01)
    np.testing.assert_allclose(modes[..., 2:], expected[..., 2:], atol=5e-4)
    assert store.known.tolist() == [[number % 2] * 5 for number in range(150)]
    assert targets.relation is not None
    np.testing.assert_allclose(store.relations(), targets.relation, atol=0.51 / 127)
    rows = np.array([140, 3, 3])
    assert np.array_equal(store.modes_stored(rows), modes[rows])
    assert np.array_equal(store.relations(rows), store.relations()[rows])


def test_places_far_outside_are_clamped_to_the_stored_range(tmp_path: Path) -> None:
    targets = random_targets(1)
    targets.modes_crop[0, 0, 0, :2] = torch.tensor([-1e4, float("inf")])
    targets.modes_crop[0, 0, 0, 2] = 1e6  # from a diverged network
    x, y = write_and_open(targets, tmp_path / "t.arrow").modes_stored()[0, 0, 0, :2]
    assert x == pytest.approx(-144) and y == pytest.approx(576)


def test_150000_people_of_17_joints_take_less_than_100_megabytes(tmp_path: Path) -> None:
    store = write_and_open(random_targets(64, joints=17), tmp_path / "t.arrow")
    assert store.num_bytes / 64 * 150_000 < 100e6
    assert store.num_bytes < (tmp_path / "t.arrow").stat().st_size < store.num_bytes + 5000


def test_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    store = write_and_open(random_targets(64), tmp_path / "t.arrow")
    arrays = (store.places, store.peaks, store.known, store.relation)
    assert all(array is not None and not array.flags.owndata for array in arrays)
    assert not store.places.flags.writeable


def test_teacher_without_features_has_no_relation(tmp_path: Path) -> None:
    assert (
        write_and_open(random_targets(3)._replace(relation=None), tmp_path / "t.arrow").relation
        is None
    )


class OneOfTwo(Workers):
    """One of two workers; it receives the other's value once that is known."""

    def __init__(self, rank: int, known: dict[int, Any]) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world, self.known = rank, 2, known

    def gather(self, value: Any) -> list[Any]:
        self.known[self.rank] = value
        return [self.known.get(0), self.known.get(1)]


def test_each_worker_predicts_half_and_the_first_writes_the_store_of_one_worker(
    tmp_path: Path,
) -> None:
    targets = random_targets(150)
    alone = write_and_open(targets, tmp_path / "alone.arrow")
    known: dict[int, Any] = {}
    queried: dict[int, list[int]] = {0: [], 1: []}
    reported: list[tuple[int, int]] = []
    for rank in (1, 0):

        def predict(start: int, stop: int, rank: int = rank) -> TeacherTargets:
            queried[rank].append(start)
            return targets.part(start, stop)

        target = tmp_path / f"{rank}.arrow"
        write_teacher_store(
            target,
            STORED,
            150,
            predict,
            workers=OneOfTwo(rank, known),
            progress=lambda done, total: reported.append((done, total)),
        )
    assert queried == {0: [0, 128], 1: [64]}
    assert reported == [(128, 150), (128, 150), (150, 150)]
    assert not (tmp_path / "1.arrow").exists()
    both = open_teacher_store(tmp_path / "0.arrow")
    for name in ("places", "peaks", "known", "relation"):
        assert np.array_equal(getattr(both, name), getattr(alone, name))


def test_interrupted_write_keeps_the_previous_store(tmp_path: Path) -> None:
    path = tmp_path / "targets.arrow"
    write_and_open(random_targets(3), path)

    def interrupted(start: int, stop: int) -> TeacherTargets:
        if start:
            raise Killed
        return random_targets(64)

    with pytest.raises(Killed):
        write_teacher_store(path, STORED, 100, interrupted)
    assert len(open_teacher_store(path)) == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_store_without_people_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one person"):
        write_teacher_store(tmp_path / "none.arrow", STORED, 0, random_targets(1).part)
    assert not list(tmp_path.iterdir())
