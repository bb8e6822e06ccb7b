"""Crops of people, made once for all trials.

A crop store is a folder of part files with the pixels and an index, which is written last and
holds the rest. All are Arrow files, memory-mapped, so that all trials of a machine share one copy
in the page cache. A store's name is the fingerprint of all it depends on; each file is written
aside and renamed, so a stale or half-written one is never read.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from study.cache import crop_bucket, crop_parts
from study.cache.arrow_file import read_columns, write_columns
from study.cache.crop_bucket import INDEX, cut_locally
from study.cache.crop_parts import RAW, Part, StoredPixels, Tell, readable, require_room
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
"""Raise it when what a store holds changes."""
NEIGHBORS = "neighbours"
"""Column of ``CropStore.neighbors`` in the index; stores on disk keep this spelling."""
SEEN_WITHIN_S = 60.0
"""File systems that machines share may be so late in showing what another one wrote."""
Progress = Callable[[int, int], None]
Cut = Callable[[Sequence[Part], Tell], None]
"""Makes these parts, each where it belongs."""


@dataclass(frozen=True)
class CropStore:
    """N stored crops, row by row in the order of the people they were made of."""

    path: Path
    input_size: tuple[int, int]
    pixels: StoredPixels
    places: NDArray[np.int64]
    """(N,), where each person's crop lies in the pixels."""
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
    """(N,), the row of the person that overlaps most in the same image, -1 where none does."""
    box_scores: NDArray[np.float64] | None = None
    """(N,), of people whom a detector found; None where they are labeled."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def crops(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """These rows' crops, (hs, ws, 3) RGB each, not to be written to."""
        return self.pixels.crops(self.places[rows])

    def neighbor_keypoints(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Each row's neighbor's keypoints in the row's own stored crop, (B, K, 2).

        Where a row has no neighbor they mean nothing.
        """
        others = self.neighbors[rows]
        stored_to_image = invert_affine(self.image_to_stored[others])
        in_image = apply_affine(self.keypoints_stored[others].astype(float), stored_to_image)
        return apply_affine(in_image, self.image_to_stored[rows]).astype(np.float32)

    def neighbor_visibility(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """COCO visibility of each row's neighbor, (B, K); 0 throughout where there is none."""
        others = self.neighbors[rows]
        return np.where(others[:, None] >= 0, self.visibility[others], np.uint8(0))


def make_crop_store(
    people: People,
    input_size: tuple[int, int],
    cache: Path,
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
    form: str = RAW,
    url: str | None = None,
    cut: Cut = cut_locally,
    notify: Callable[[str], None] = lambda text: None,
    name: str = "people",
) -> Path:
    """The folder of these people's crops, made unless it is there already.

    Parts that were finished before a kill are used again.

    Args:
        folder: what ``store_folder`` says of them, where that is known already: a fingerprint
            looks at every image.
        form: raw or jpeg.
        url: the object store where all machines find it; ``cache`` is then this node's copy.
        say: is told how large it becomes, before it is made.
        name: whose crops they are, for messages.

    Raises:
        InputError: there is no room for it, an image can't be decoded, or the object store
            can't be used.
    """
    size = stored_size(input_size)
    folder = folder or store_folder(people, input_size, cache, form)
    sizes = {} if url is None else crop_bucket.sizes_in(url, folder.name)
    if url is None and is_there(folder):
        return folder
    if url is not None and INDEX in sizes:
        cache.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX).is_file():
            notify(f"fetching the crops of {name}: {readable(sum(sizes.values()))}")
        return crop_bucket.fetch_store(url, folder, sizes)
    affines = image_to_crop_affine(people.boxes, stored_frame(input_size), margin=STORED_MARGIN)
    parts, places = crop_parts.plan_parts(people.image_paths, affines, size, form, folder, url)
    missing = [part for part in parts if not _is_made(part, sizes)]
    folder.mkdir(parents=True, exist_ok=True)
    uncut = [part for part in missing if not crop_parts.is_whole(part.file, part)]
    require_room(uncut, folder, notify, name)
    if url is not None:
        crop_bucket.check_writable(url)
    done = len(people) - sum(map(len, missing))

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(people))

    cut(missing, tell)
    _write_index(people, affines, places, parts, input_size)
    return folder


def store_folder(people: People, input_size: tuple[int, int], cache: Path, form: str) -> Path:
    """Where these people's crops lie, or will."""
    return cached_crops(cache, _people_fingerprint(people, input_size, form))


def is_there(folder: Path) -> bool:
    """Whether the store is whole: the index, and each part as long as it says."""
    if not (folder / INDEX).is_file():
        return False
    _, meta = read_columns(folder / INDEX)
    files = {folder / name: length for name, length in meta["parts"].items()}
    return all(file.is_file() and file.stat().st_size == n for file, n in files.items())


def _is_made(part: Part, sizes: dict[str, int]) -> bool:
    if part.url is not None:
        return crop_bucket.is_uploaded(part.url, part, sizes)
    return crop_parts.is_whole(part.file, part)


def _write_index(
    people: People,
    affines: NDArray[np.float64],
    places: NDArray[np.int64],
    parts: Sequence[Part],
    input_size: tuple[int, int],
) -> None:
    """Writes all but the pixels, to the object store first, if there is one."""
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
    """Bytes of each part, as soon as all are seen here.

    Raises:
        InputError: another node wrote one where this one doesn't see it.
    """
    deadline = time.monotonic() + SEEN_WITHIN_S
    while unseen := [part.file for part in parts if not part.file.is_file()]:
        if time.monotonic() > deadline:
            raise InputError(
                f"all nodes must share {unseen[0].parent}, but {unseen[0].name}, which one of "
                "them wrote, is not seen here; set data.store to a folder that they share, or to "
                "a bucket"
            )
        time.sleep(0.2)
    return {part.file.name: part.file.stat().st_size for part in parts}


def open_crop_store(path: Path) -> CropStore:
    """The store, memory-mapped.

    Raises:
        InputError: it is not there, or not whole.
    """
    if not is_there(path):
        raise InputError(
            f"{path} must hold all parts that its {INDEX} names, each as long as it says, but "
            "does not; run the study again, which makes what is missing"
        )
    columns, meta = read_columns(path / INDEX)
    columns["neighbors"] = columns.pop(NEIGHBORS)
    height, width = meta["input_size"]
    parts = [path / name for name in meta["parts"]]
    pixels = StoredPixels(parts, stored_size((height, width)), meta["form"])
    return CropStore(path=path, input_size=(height, width), pixels=pixels, **columns)


def _people_fingerprint(people: People, input_size: tuple[int, int], form: str) -> str:
    """Of the annotations' content, the images' names and sizes, who is taken, and the crop."""
    images = {path.name: path.stat().st_size for path in set(people.image_paths)}
    annotations = hash_file(people.annotations)
    arrays = (people.annotation_ids, people.neighbors, people.boxes)
    who = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    layout = (crop_parts.PEOPLE_PER_PART, crop_parts.PEOPLE_PER_BATCH, crop_parts.JPEG_SETTINGS)
    cut = (list(input_size), form, layout)
    return fingerprint(VERSION, annotations, sorted(images.items()), who, *cut)
