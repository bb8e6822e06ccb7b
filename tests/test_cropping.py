"""Crops cut by Ray's tasks: the same store, all nodes' cores, no pixel through Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from study import cropping
from study.config import InputError
from study.crop_files import Part, Tell
from study.cropping import cut_by_ray, cut_by_size
from study.dataset import People
from study.store import CropStore, make_crop_store, open_crop_store

SIZE = (96, 64)
EVERYONE = np.arange(13)


def never() -> None:
    raise AssertionError("Ray is not to be started")


def test_few_people_are_cut_without_ray(
    five_people: People, five_store: CropStore, tmp_path: Path
) -> None:
    cut = partial(cut_by_size, start_ray=never)
    store = open_crop_store(make_crop_store(five_people, SIZE, tmp_path, cut=cut))
    assert np.array_equal(store.crops(EVERYONE), five_store.crops(EVERYONE))


def test_many_people_are_cut_by_ray_which_is_started_once(
    five_people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    started: list[bool] = []
    by_ray: list[int] = []

    def cut_there(parts: Sequence[Part], tell: Tell) -> None:
        by_ray.append(len(parts))
        cropping.cut_here(parts, tell)

    monkeypatch.setattr(cropping, "PEOPLE_FOR_RAY", 13)
    monkeypatch.setattr(cropping, "cut_by_ray", cut_there)
    monkeypatch.setattr(cropping.ray, "is_initialized", lambda: bool(started))
    cut = partial(cut_by_size, start_ray=lambda: started.append(True))
    for number in (1, 2):
        make_crop_store(five_people, SIZE, tmp_path / str(number), cut=cut)
    assert started == [True] and by_ray == [3, 3]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = str(Path(__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", root)
    cropping.ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    cropping.ray.shutdown()


@pytest.mark.slow
def test_ray_makes_the_same_store_tells_its_progress_and_stops_at_a_fault(
    five_people: People,
    five_store: CropStore,
    tmp_path: Path,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    started: None,
) -> None:
    told: list[int] = []
    path = make_crop_store(
        *(five_people, SIZE, tmp_path / "by-ray", lambda done, _: told.append(done)),
        cut=cut_by_ray,
    )
    assert sorted(np.diff([0, *told]).tolist()) == [4, 4, 5] and told[-1] == 13
    store = open_crop_store(path)
    assert np.array_equal(store.crops(EVERYONE), five_store.crops(EVERYONE))

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    paths = (*five_people.image_paths[:-1], broken)
    people = People(**{**vars(five_people), "image_paths": paths})
    with pytest.raises(InputError, match=r"broken\.png.*replace the file"):
        make_crop_store(people, SIZE, tmp_path / "bad", cut=cut_by_ray)
    assert not list((tmp_path / "bad").rglob("people.arrow"))
