"""Crops cut by Ray tasks: the same store, progress, and errors."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study.cache import crop_parts
from study.cache.crop_parts import CountDone, Part
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.data.people import People
from study.errors import InputError
from study.launch import crop_tasks
from study.launch.crop_tasks import cut_by_ray, cut_by_size

SIZE = (96, 64)
EVERYONE = np.arange(13)


def never() -> None:
    raise AssertionError("Ray was started")


def test_few_people_are_cut_without_ray(
    five_people: People, five_store: CropStore, tmp_path: Path
) -> None:
    cut = partial(cut_by_size, start_ray=never)
    store = open_crop_store(make_crop_store(five_people, StoreSpec(SIZE, tmp_path), cut=cut))
    assert np.array_equal(store.crops(EVERYONE), five_store.crops(EVERYONE))


def test_many_people_are_cut_by_ray_tasks_and_ray_starts_once(
    five_people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    started: list[bool] = []
    by_ray: list[int] = []

    def cut_by_tasks(parts: Sequence[Part], count_done: CountDone) -> None:
        by_ray.append(len(parts))
        crop_tasks.cut_locally(parts, count_done)

    monkeypatch.setattr(crop_tasks, "PEOPLE_FOR_RAY", 13)
    monkeypatch.setattr(crop_tasks, "cut_by_ray", cut_by_tasks)
    monkeypatch.setattr(crop_tasks.ray, "is_initialized", lambda: bool(started))
    cut = partial(cut_by_size, start_ray=lambda: started.append(True))
    for number in (1, 2):
        make_crop_store(five_people, StoreSpec(SIZE, tmp_path / str(number)), cut=cut)
    assert started == [True] and by_ray == [3, 3]


def cut_in_ray(people: People, broken: People, folder: Path, answers: Any) -> None:
    """Make both stores; runs in a process of its own, which ends its Ray."""
    crop_parts.PEOPLE_PER_PART = 4
    crop_tasks.ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    reported: list[int] = []
    try:
        make_crop_store(
            people,
            StoreSpec(SIZE, folder),
            progress=lambda done, _: reported.append(done),
            cut=cut_by_ray,
        )
        make_crop_store(broken, StoreSpec(SIZE, folder / "broken"), cut=cut_by_ray)
    except InputError as error:
        answers.put((reported, str(error)))
    finally:
        crop_tasks.ray.shutdown()


@pytest.mark.slow
def test_ray_tasks_make_the_same_store_report_progress_and_stop_at_an_error(
    five_people: People, five_store: CropStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    broken = dataclasses.replace(five_people, image_paths=(*five_people.image_paths[:-1], bad))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    driver = context.Process(target=cut_in_ray, args=(five_people, broken, tmp_path, answers))
    driver.start()
    reported, error = answers.get(timeout=300)
    driver.join()
    assert driver.exitcode == 0
    assert sorted(np.diff([0, *reported]).tolist()) == [4, 4, 5] and reported[-1] == 13
    assert "bad.png" in error and error.endswith("replace the file")
    assert not list((tmp_path / "broken").rglob("people.arrow"))
    (path,) = tmp_path.glob("crops-*")
    assert len(list(path.glob("part-*"))) == 3
    store = open_crop_store(path)
    assert np.array_equal(store.crops(EVERYONE), five_store.crops(EVERYONE))
