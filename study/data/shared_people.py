"""People of one annotation file who are in another one, whatever their images are called.

Ids and names find copies that were left as they are; the content of the images finds the others:
files of the same bytes, and images that were saved again, in another format, size or quality.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from study.data.image_files import decode_image, gray_thumbnail
from study.data.people import People, box_iou, same_people

SIDE = 32
"""Pixels along each side of the gray thumbnails that are compared."""
MIN_CORRELATION = 0.98
"""Least correlation of the thumbnails of one image that was saved twice. In 52 million pairs of
10,100 images of Leeds Sports and of composed ones, all 5 above it, and all 11 above 0.97, show the
same. Images of COCO's size had more than 0.998 in half their size or after JPEG at quality 30;
99 % of images of 100 to 200 px had more than 0.98."""
MAX_DIFFERENCE = 0.5
"""Largest mean difference of 3 x 3 places of the thumbnails, standard deviations. It tells frames
of a fixed camera apart: of those that correlate so well, 92 % differ more where a person of a
fortieth of the image moved. Images of COCO's size that were saved again differed by 0.3 at most,
98 % of those of 100 to 200 px by less than 0.5."""
MAX_STRETCH = 1.03
"""Largest ratio of their aspect ratios, which rounding of the size may change."""
MIN_CONTRAST = 4.0
"""Least standard deviation of gray levels of a thumbnail: plain images all look the same."""
SAME_BOX = 0.5
"""IoU of the boxes from which two people of one image are the same."""
ROWS = 2048
"""Thumbnails that are compared at a time."""
THREADS = min(16, os.cpu_count() or 1)
SAME_FILE = "the same image file"
SAME_BYTES, SAME_CONTENT = "image file of the same bytes", "image that was saved again"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SharedPerson:
    """A person of one file who is in another one, or whose image is."""

    row: int
    """Of ``People``."""
    reason: str
    other_row: int | None
    """Row of the same person in the other file; None if it has the image, not the person."""
    other_image: Path


@dataclass(frozen=True)
class _Look:
    """The content of an image file."""

    digest: str
    """SHA-256 of its bytes."""
    size: tuple[int, int] | None
    """(height, width), upright; None if it can't be decoded."""
    thumbnail: NDArray[np.uint8] | None
    """(SIDE, SIDE) gray levels; None if it can't be decoded, or has no contrast."""


def shared_people(
    ours: People, theirs: People, progress: Callable[[str], Progress]
) -> list[SharedPerson]:
    """List our people who are in the other file, or whose image is, by row.

    Args:
        progress: makes a progress bar of a name.
    """
    own_looks = _looks(ours.image_paths, progress(f"reading images of {ours.annotations.name}"))
    other_looks = _looks(
        theirs.image_paths, progress(f"reading images of {theirs.annotations.name}")
    )
    pairs = _same_content(own_looks, other_looks, progress("comparing images"))
    pairs |= _same_bytes(own_looks, other_looks)
    others: dict[Path, list[int]] = {}
    for row, path in enumerate(theirs.image_paths):
        others.setdefault(path, []).append(row)
    known, found = same_people(ours, theirs), []
    for row, path in enumerate(ours.image_paths):
        reason, same = known.get(row, ("", None))
        if same is not None:
            kind = reason.rstrip("0123456789 ")  # "source person 12"
            found.append(SharedPerson(row, kind, same, theirs.image_paths[same]))
        elif path in others or path in pairs:
            other, seen = (path, SAME_FILE) if path in others else pairs[path]
            zoom = _zoom(own_looks[path], other_looks[other])
            same = _same_box(ours.boxes[row] * zoom, theirs, others[other])
            found.append(SharedPerson(row, seen, same, other))
    return found


def _looks(paths: Sequence[Path], progress: Progress) -> dict[Path, _Look]:
    """Read each image once."""
    images = list(dict.fromkeys(paths))
    looks: dict[Path, _Look] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for path, look in zip(images, pool.map(_look, images), strict=True):
            looks[path] = look
            progress(len(looks), len(images))
    return looks


def _look(path: Path) -> _Look:
    data = path.read_bytes()
    digest, image = hashlib.sha256(data).hexdigest(), decode_image(data)
    if isinstance(image, str):
        return _Look(digest, None, None)
    gray = gray_thumbnail(image, SIDE)
    thumbnail = gray if gray.std() >= MIN_CONTRAST else None
    return _Look(digest, (image.shape[0], image.shape[1]), thumbnail)


def _same_bytes(
    ours: Mapping[Path, _Look], theirs: Mapping[Path, _Look]
) -> dict[Path, tuple[Path, str]]:
    """Return their first image of the same bytes by ours."""
    known: dict[str, Path] = {}
    for path, look in theirs.items():
        known.setdefault(look.digest, path)
    return {
        path: (known[look.digest], SAME_BYTES)
        for path, look in ours.items()
        if look.digest in known
    }


def _same_content(
    ours: Mapping[Path, _Look], theirs: Mapping[Path, _Look], progress: Progress
) -> dict[Path, tuple[Path, str]]:
    """Return their most similar image by ours, if it shows the same."""
    found: dict[Path, tuple[float, Path]] = {}
    done, total = 0, sum(look.thumbnail is not None for look in theirs.values())
    for other_paths, other_units in _unit_thumbnails(theirs):
        other_aspects = _aspects(theirs, other_paths)
        for paths, units in _unit_thumbnails(ours):
            stretch = np.abs(np.log(_aspects(ours, paths)[:, None] / other_aspects))
            likeness = np.where(stretch <= np.log(MAX_STRETCH), units @ other_units.T, -1.0)
            best = likeness.argmax(axis=1)
            for row in np.flatnonzero(likeness.max(axis=1) >= MIN_CORRELATION):
                value, other = float(likeness[row, best[row]]), other_paths[best[row]]
                is_best = value > found.get(paths[row], (0.0, other))[0]
                if is_best and _is_same_everywhere(units[row], other_units[best[row]]):
                    found[paths[row]] = value, other
        done += len(other_paths)
        progress(done, total)
    return {path: (other, SAME_CONTENT) for path, (_, other) in found.items()}


def _is_same_everywhere(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Return whether two thumbnails of mean 0 and length 1 differ little in every place."""
    difference = SIDE * np.abs(one - other).reshape(SIDE, SIDE)  # standard deviations
    places = np.lib.stride_tricks.sliding_window_view(difference, (3, 3))
    return bool(places.mean(axis=(2, 3)).max() <= MAX_DIFFERENCE)


def _unit_thumbnails(
    looks: Mapping[Path, _Look],
) -> Iterator[tuple[list[Path], NDArray[np.float32]]]:
    """Yield ROWS images at a time, and their thumbnails with mean 0 and length 1, (N, SIDE^2)."""
    paths = [path for path, look in looks.items() if look.thumbnail is not None]
    for start in range(0, len(paths), ROWS):
        chosen = paths[start : start + ROWS]
        thumbnails = [looks[path].thumbnail for path in chosen]
        rows = np.array(thumbnails, np.float32).reshape(len(chosen), -1)
        rows -= rows.mean(axis=1, keepdims=True)
        yield chosen, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _aspects(looks: Mapping[Path, _Look], paths: Sequence[Path]) -> NDArray[np.float64]:
    """Return width over height of these images."""
    sizes = np.array([looks[path].size for path in paths], float)
    return sizes[:, 1] / sizes[:, 0]


def _zoom(own: _Look, other: _Look) -> NDArray[np.float64]:
    """Return the factors that turn a box xywh of one image into that of the other."""
    if own.size is None or other.size is None:  # of the same bytes
        return np.ones(4)
    (height, width), (other_height, other_width) = own.size, other.size
    return np.array([other_width / width, other_height / height] * 2)


def _same_box(box: NDArray[np.float64], theirs: People, rows: Sequence[int]) -> int | None:
    overlaps = box_iou(box, theirs.boxes[rows])
    best = int(overlaps.argmax())
    return rows[best] if overlaps[best] >= SAME_BOX else None
