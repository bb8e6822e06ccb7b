"""Crop stores: rows are read back as written, and changed inputs make another store."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.skeleton import Skeleton
from study.cache.crop_store import (
    CropStore,
    StoreSpec,
    make_crop_store,
    open_crop_store,
    store_folder,
)
from study.data.annotations import read_table
from study.data.crops import (
    STORED_MARGIN,
    apply_affine,
    image_to_crop_affine,
    invert_affine,
    read_image,
    stored_frame,
    stored_size,
    warp,
)
from study.data.people import People, build_people
from study.storage.files import fingerprint, hash_file

SIZE = (96, 64)


@pytest.fixture
def moved(five_people: People, tmp_path: Path, five: Skeleton) -> People:
    """The five-joint people in a folder that the test may change."""
    root = tmp_path / "data"
    shutil.copytree(five_people.annotations.parent, root)
    return build_people(read_table(root / "five.json", five), root / "images")


def test_each_person_has_the_crop_of_its_own_image(
    five_people: People, five_store: CropStore
) -> None:
    affines = image_to_crop_affine(five_people.boxes, stored_frame(SIZE), margin=STORED_MARGIN)
    crops = five_store.crops(np.arange(len(five_people)))
    for crop, path, affine in zip(crops, five_people.image_paths, affines, strict=True):
        assert np.array_equal(crop, warp(read_image(path), affine, stored_size(SIZE)))


def test_labels_are_read_back_as_written(five_people: People, five_store: CropStore) -> None:
    assert len(five_store) == 13 and five_store.input_size == SIZE
    assert np.array_equal(five_store.visibility, five_people.visibility)
    assert np.array_equal(five_store.image_ids, five_people.image_ids)
    assert np.array_equal(five_store.annotation_ids, five_people.annotation_ids)
    assert np.array_equal(five_store.boxes_image, five_people.boxes)
    assert np.array_equal(five_store.neighbors, five_people.neighbors)
    assert (five_store.neighbors == -1).any() and (five_store.neighbors >= 0).any()
    restored = apply_affine(
        five_store.keypoints_stored.astype(float), invert_affine(five_store.image_to_stored)
    )
    np.testing.assert_allclose(restored, five_people.keypoints_image, atol=1e-4)
    zoom = five_store.image_to_stored[:, 0, 0]
    np.testing.assert_allclose(five_store.areas, five_people.areas * zoom**2, rtol=1e-6)


def test_rows_are_returned_in_the_requested_order(five_store: CropStore) -> None:
    everyone = np.stack(five_store.crops(np.arange(13)))
    wanted = np.array([7, 0, 7, 12])
    assert np.array_equal(five_store.crops(wanted), everyone[wanted])


def test_rows_are_found_in_every_part_and_batch(
    five_people: People,
    five_store: CropStore,
    tmp_path: Path,
    small_parts: None,
) -> None:
    small = open_crop_store(make_crop_store(five_people, StoreSpec(SIZE, tmp_path)))
    assert len(list(small.path.glob("part-*"))) == 3
    assert [len(batch) for batch in small.pixels.batches] == [2, 2, 3, 2, 3, 1]
    everyone = np.arange(13)
    assert np.array_equal(small.crops(everyone), five_store.crops(everyone))
    assert np.array_equal(small.visibility, five_store.visibility)
    assert np.array_equal(small.image_to_stored, five_store.image_to_stored)


def test_opening_a_store_copies_no_crop(five_store: CropStore) -> None:
    before = pa.total_allocated_bytes()
    opened = open_crop_store(five_store.path)
    crops_bytes = 0
    for batch in opened.pixels.batches:
        assert isinstance(batch, np.ndarray)
        crops_bytes += batch.nbytes
        assert not batch.flags.owndata and not batch.flags.writeable
    assert crops_bytes == 13 * 144 * 96 * 3
    assert pa.total_allocated_bytes() - before < crops_bytes / 20


def test_existing_store_is_reused(five_people: People, tmp_path: Path) -> None:
    path = make_crop_store(five_people, StoreSpec(SIZE, tmp_path))
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert make_crop_store(five_people, StoreSpec(SIZE, tmp_path)) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_people_who_are_read_again_have_the_same_store(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    table = read_table(five_people.annotations, five)
    again = build_people(table, five_people.annotations.parent / "images")
    assert make_crop_store(again, StoreSpec(SIZE, tmp_path)) == make_crop_store(
        five_people, StoreSpec(SIZE, tmp_path)
    )


def test_other_annotations_people_sizes_or_images_make_another_store(
    moved: People, five: Skeleton, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    paths = [make_crop_store(moved, StoreSpec(SIZE, cache))]
    paths.append(make_crop_store(moved, StoreSpec((64, 96), cache)))
    paths.append(make_crop_store(moved.take(np.arange(12)), StoreSpec(SIZE, cache)))
    paths.append(make_crop_store(moved.take(np.arange(13)[::-1]), StoreSpec(SIZE, cache)))
    content = json.loads(moved.annotations.read_text())
    content["annotations"][0]["keypoints"][0] += 1
    moved.annotations.write_text(json.dumps(content))
    images = moved.annotations.parent / "images"
    paths.append(
        make_crop_store(
            build_people(read_table(moved.annotations, five), images), StoreSpec(SIZE, cache)
        )
    )
    with moved.image_paths[0].open("ab") as image:
        image.write(b"another image under the same name")
    paths.append(
        make_crop_store(
            build_people(read_table(moved.annotations, five), images), StoreSpec(SIZE, cache)
        )
    )
    assert len(set(paths)) == len(paths)


def test_images_of_one_name_in_several_folders_all_count(moved: People, tmp_path: Path) -> None:
    folders = [moved.image_paths[0].parent / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(moved.image_paths[0], folder / "1.png")
    paths = tuple(folders[row % 2] / "1.png" for row in range(len(moved)))
    people, spec = dataclasses.replace(moved, image_paths=paths), StoreSpec(SIZE, tmp_path)
    found = [store_folder(people, spec)]
    for path in paths[:2]:
        with path.open("ab") as image:
            image.write(b"another image under the same name")
        found.append(store_folder(people, spec))
    assert len(set(found)) == 3


def test_images_written_after_their_crops_are_reported(moved: People, tmp_path: Path) -> None:
    notes: list[str] = []
    spec = StoreSpec(SIZE, tmp_path / "cache")
    folder = make_crop_store(moved, spec)
    make_crop_store(moved, spec, notify=notes.append)
    assert notes == []
    image = moved.image_paths[3]
    later = (folder / "people.arrow").stat().st_mtime_ns + 1
    os.utime(image, ns=(later, later))
    assert make_crop_store(moved, spec, notify=notes.append) == folder
    assert len(notes) == 1 and f"such as {image}; if they show something else" in notes[0]


def test_fingerprint_depends_on_every_part_but_not_on_the_order_of_keys() -> None:
    assert fingerprint(1, {"a": 2, "b": 3}) == fingerprint(1, {"b": 3, "a": 2})
    assert len({fingerprint(1, 2), fingerprint(2, 1), fingerprint(1, "2"), fingerprint(12)}) == 4
    assert len(fingerprint("x")) == 16


def test_file_that_changes_in_the_same_tick_has_another_hash(tmp_path: Path) -> None:
    file, now = tmp_path / "weights", time.time_ns()
    for ns in (now, now - 10**10):
        file.write_text("one")
        os.utime(file, ns=(ns, ns))
        before = hash_file(file)
        assert hash_file(file) == before
        file.write_text("two")
        os.utime(file, ns=(ns, ns))
        assert (hash_file(file) != before) == (ns == now)  # an old file is trusted by its time


def test_store_opens_from_a_copy_of_its_folder(five_store: CropStore, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(five_store.path, copy)
    opened = open_crop_store(copy)
    assert dataclasses.replace(opened, path=five_store.path).input_size == SIZE
    rows = np.arange(13)
    assert np.array_equal(opened.crops(rows), five_store.crops(rows))
