"""Crops of people, cut once and read by all trials.

A crop store is a folder of part files with the pixels and an index with everything else, which is
written last. All are Arrow files, memory-mapped, so that the trials of a machine share one copy in
the page cache. A store's name is the fingerprint of all that it depends on, and every file is
written to a temporary name and renamed; so a stale or partial store is never read.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.cache import crop_bucket, crop_parts
from study.cache.arrow_file import read_columns, write_columns
from study.cache.crop_bucket import INDEX, cut_locally
from study.cache.crop_parts import (
    RAW,
    CountDone,
    Part,
    StoredPixels,
    readable,
    require_disk_space,
)
from study.data.crops import (
    STORED_MARGIN,
    apply_affine,
    image_to_crop_affine,
    invert_affine,
    stored_frame,
    stored_size,
)
from study.data.people import People
from study.errors import InputError
from study.storage.files import fingerprint, hash_file
from study.storage.paths import cached_crops

VERSION = 3
"""Raise it when the content of a store changes."""
NEIGHBORS = "neighbours"
"""Column of ``CropStore.neighbors`` in the index; stores on disk keep this spelling."""
SEEN_WITHIN_S = 60.0
"""Seconds to wait for another node's files to appear in a shared file system."""
Progress = Callable[[int, int], None]
"""Called with (done, total)."""
Cut = Callable[[Sequence[Part], CountDone], None]
"""Builds these parts, each at its own place."""


@dataclass(frozen=True)
class StoreSpec:
    """Size, format and place of a crop store."""

    input_size: tuple[int, int]
    """(height, width) of the crops that networks see."""
    cache: Path
    """Folder that holds the store's folder; with ``url``, this node's copy."""
    form: str = RAW
    """raw | jpeg."""
    url: str | None = None
    """Object store where all machines find it; None without one."""


@dataclass(frozen=True)
class CropStore:
    """N stored crops and their people's labels, one row per person."""

    path: Path
    input_size: tuple[int, int]
    pixels: StoredPixels
    places: NDArray[np.int64]
    """(N,), position of each person's crop in ``pixels``."""
    keypoints_stored: NDArray[np.float32]
    """(N, K, 2), stored-crop pixels."""
    visibility: NDArray[np.uint8]
    """(N, K), COCO visibility."""
    areas: NDArray[np.float32]
    """(N,), squared stored-crop pixels."""
    boxes_image: NDArray[np.float64]
    """xywh in image pixels, (N, 4)."""
    image_to_stored: NDArray[np.float64]
    """(N, 2, 3)."""
    image_ids: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    """(N,), row of the person that overlaps most in the same image; -1 if none overlaps."""
    box_scores: NDArray[np.float64] | None = None
    """(N,), scores of a detector's boxes; None for the boxes of annotations."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def crops(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return the crops of these rows, (hs, ws, 3) RGB each, read-only."""
        return self.pixels.crops(self.places[rows])

    def neighbor_keypoints(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the keypoints of each row's neighbor in the row's stored crop, (B, K, 2).

        They are meaningless for a row without a neighbor.
        """
        others = self.neighbors[rows]
        stored_to_image = invert_affine(self.image_to_stored[others])
        in_image = apply_affine(self.keypoints_stored[others].astype(float), stored_to_image)
        return apply_affine(in_image, self.image_to_stored[rows]).astype(np.float32)

    def neighbor_visibility(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return COCO visibility of each row's neighbor, (B, K); all 0 without a neighbor."""
        others = self.neighbors[rows]
        return np.where(others[:, None] >= 0, self.visibility[others], np.uint8(0))


def make_crop_store(
    people: People,
    spec: StoreSpec,
    *,
    name: str = "people",
    folder: Path | None = None,
    cut: Cut = cut_locally,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Path:
    """Cut and store the crops of these people, unless the store exists; return its folder.

    Parts that an interrupted run finished are used again.

    Args:
        name: names the people in messages.
        folder: result of ``store_folder``, if it is known; its fingerprint reads every image's
            size.
        cut: builds the parts that are missing.
        notify: called with the size of the store before it is cut.

    Raises:
        InputError: the disk is too small, an image can't be decoded, or the object store can't be
            used.
    """
    url = spec.url
    folder = folder or store_folder(people, spec)
    sizes = {} if url is None else crop_bucket.sizes_in(url, folder.name)
    if url is None and is_complete(folder):
        _note_later_images(people, folder, name, notify)
        return folder
    if url is not None and INDEX in sizes:
        spec.cache.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).is_file():
            notify(f"fetching the crops of {name}: {readable(sum(sizes.values()))}")
        return crop_bucket.fetch_store(url, folder, sizes)
    size = stored_size(spec.input_size)
    affines = image_to_crop_affine(
        people.boxes, stored_frame(spec.input_size), margin=STORED_MARGIN
    )
    parts, places = crop_parts.plan_parts(
        people.image_paths, affines, size, spec.form, folder, url
    )
    missing = [part for part in parts if not _is_built(part, sizes)]
    folder.mkdir(parents=True, exist_ok=True)
    uncut = [part for part in missing if not crop_parts.is_complete_part(part.file, part)]
    require_disk_space(uncut, folder, notify, name)
    if url is not None:
        crop_bucket.check_writable(url)
    done = len(people) - sum(map(len, missing))

    def count_done(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(people))

    cut(missing, count_done)
    _write_index(people, affines, places, parts, spec.input_size)
    return folder


def _note_later_images(
    people: People, folder: Path, name: str, notify: Callable[[str], None]
) -> None:
    """Report images that were written after their crops, which an equal size hides."""
    cut_at = (folder / INDEX).stat().st_mtime_ns
    paths = sorted(set(people.image_paths))
    later = [path for path in paths if path.stat().st_mtime_ns > cut_at]
    if later:
        notify(
            f"warning: {len(later)} of {len(paths)} images of {name} were written after their "
            f"crops were cut, such as {later[0]}; if they show something else now, delete {folder}"
        )


def store_folder(people: People, spec: StoreSpec) -> Path:
    """Return the folder of these people's crops, which need not exist."""
    return cached_crops(spec.cache, _people_fingerprint(people, spec.input_size, spec.form))


def is_complete(folder: Path) -> bool:
    """Return whether the store has its index, and every part in the length listed there."""
    if not (folder / INDEX).is_file():
        return False
    _, meta = read_columns(folder / INDEX)
    files = {folder / name: length for name, length in meta["parts"].items()}
    return all(file.is_file() and file.stat().st_size == n for file, n in files.items())


def _is_built(part: Part, sizes: dict[str, int]) -> bool:
    if part.url is not None:
        return crop_bucket.is_uploaded(part.url, part, sizes)
    return crop_parts.is_complete_part(part.file, part)


def _write_index(
    people: People,
    affines: NDArray[np.float64],
    places: NDArray[np.int64],
    parts: Sequence[Part],
    input_size: tuple[int, int],
) -> None:
    """Write everything but the pixels, to the object store first, if there is one."""
    columns = {
        "places": places,
        "keypoints_stored": apply_affine(people.keypoints_image, affines).astype(np.float32),
        "visibility": people.visibility,
        "areas": (people.areas * np.abs(np.linalg.det(affines[..., :2]))).astype(np.float32),
        "boxes_image": people.boxes,
        "image_to_stored": affines,
        "image_ids": people.image_ids,
        "annotation_ids": people.annotation_ids,
        NEIGHBORS: people.neighbors,
    }
    if people.box_scores is not None:
        columns["box_scores"] = people.box_scores
    folder, form, url = parts[0].file.parent, parts[0].form, parts[0].url

    def write(index: Path, lengths: dict[str, int]) -> None:
        named = {part.file.name: lengths[part.file.name] for part in parts}
        meta = {"input_size": list(input_size), "form": form, "parts": named}
        write_columns(index, columns, meta)

    if url is None:
        write(folder / INDEX, _lengths(parts))
        return
    with tempfile.TemporaryDirectory() as aside:
        write(Path(aside) / INDEX, crop_bucket.sizes_in(url, folder.name))
        crop_bucket.upload(url, folder.name, Path(aside) / INDEX)
    crop_bucket.fetch_store(url, folder)


def _lengths(parts: Sequence[Part]) -> dict[str, int]:
    """Wait until this node sees all parts; return their bytes.

    Raises:
        InputError: a part that another node wrote doesn't appear here.
    """
    deadline = time.monotonic() + SEEN_WITHIN_S
    while unseen := [part.file for part in parts if not part.file.is_file()]:
        if time.monotonic() > deadline:
            raise InputError(
                f"all nodes must share {unseen[0].parent}, but {unseen[0].name}, which another "
                "node wrote, does not appear here; set data.store to a shared folder or to a "
                "bucket"
            )
        time.sleep(0.2)
    return {part.file.name: part.file.stat().st_size for part in parts}


def open_crop_store(path: Path) -> CropStore:
    """Open the store, memory-mapped.

    Raises:
        InputError: the store is missing or incomplete.
    """
    if not is_complete(path):
        raise InputError(
            f"{path} must hold its {INDEX} and all parts that it lists, in full length, but does "
            "not; run the study again, which makes the missing files"
        )
    columns, meta = read_columns(path / INDEX)
    columns["neighbors"] = columns.pop(NEIGHBORS)
    height, width = meta["input_size"]
    parts = [path / name for name in meta["parts"]]
    pixels = StoredPixels(parts, stored_size((height, width)), meta["form"])
    return CropStore(path=path, input_size=(height, width), pixels=pixels, **columns)


def _people_fingerprint(people: People, input_size: tuple[int, int], form: str) -> str:
    """Fingerprint of the annotations, the images' names and sizes, the people and the crop."""
    paths = set(people.image_paths)
    images = {path.name: path.stat().st_size for path in paths}
    if len(images) < len(paths):  # folders of videos have equal names: 000001.jpg in each
        top = os.path.commonpath(paths)
        images = {path.relative_to(top).as_posix(): path.stat().st_size for path in paths}
    annotations = hash_file(people.annotations)
    arrays = (people.annotation_ids, people.neighbors, people.boxes)
    who = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    layout = (crop_parts.PEOPLE_PER_PART, crop_parts.PEOPLE_PER_BATCH, crop_parts.JPEG_SETTINGS)
    cut: tuple[Any, ...] = (list(input_size), form, layout)
    if people.joint_order is not None:
        cut += (people.joint_order,)
    return fingerprint(VERSION, annotations, sorted(images.items()), who, *cut)
