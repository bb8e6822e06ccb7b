"""An annotation file in COCO's format, as columns: COCO, CrowdPose and files like theirs.

``data/audit.py`` searches the columns for faults, ``data/people.py`` builds people from them.
Which annotation is a person follows the official readers (HRNet's for COCO, mmpose's for
CrowdPose): no crowd region, nobody without labeled joints (``num_keypoints`` 0, where the file
has it), no area of 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.skeleton import Skeleton
from study.data.coco_json import LISTS, read_records
from study.errors import InputError

SCORED_JOINT = 0.2
"""A joint counts in a person's score from this confidence on (HRNet's ``in_vis_thre``)."""
CROWD_BOUNDS = (0.2, 0.8)
"""Where crowdIndex divides easy, medium and hard, in all released code (the paper has 0.1)."""
PERSON_ID = 1
"""The only category in an evaluation, whatever number the file gives it."""
AREA_OF_BOX = 0.53
"""A person's area over the box's, where the file has no area (CrowdPose's evaluation)."""
PERSON = "person"
BLOCK = 4096
"""Records that are in memory at once."""
LARGEST = 2**63
"""Whole numbers are below it."""
NUMBERS = "biuf"
"""Kinds of arrays that hold numbers alone."""
Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotationTable:
    """The N annotations of a file in the file's order; the arrays are read-only."""

    path: Path
    ids: np.ndarray
    image_ids: np.ndarray
    image_rows: np.ndarray
    """Where the image stands in the file; -1 where its id stands there not at all or twice."""
    picture_ids: np.ndarray
    """Per image of the file, (M,)."""
    image_names: tuple[str, ...]
    """Per image of the file."""
    picture_sizes: np.ndarray
    """Height and width per image of the file, (M, 2)."""
    image_sizes: np.ndarray
    """Height and width of the annotation's image, NaN where ``image_rows`` is -1, (N, 2)."""
    keypoints: np.ndarray
    """x and y in image pixels, visibility; NaN where the file has another length, (N, K, 3)."""
    num_numbers: np.ndarray
    """How many numbers the annotation has as keypoints, (N,)."""
    boxes: np.ndarray
    """xywh in image pixels as in the file, NaN where that is not four finite numbers, (N, 4)."""
    clipped_boxes: np.ndarray
    """The boxes as ``clip_boxes`` leaves them, (N, 4)."""
    areas: np.ndarray
    """Square image pixels, (N,)."""
    source_ids: np.ndarray
    """Id of the person whom a composed image shows, -1 where the file has none, (N,)."""
    category_ids: np.ndarray
    """-1 where the file has none, (N,)."""
    num_keypoints: np.ndarray
    """The file's count of labeled joints, -1 where it has none, (N,)."""
    is_crowd: np.ndarray
    is_labeled: np.ndarray
    is_used: np.ndarray
    """Whether the official readers take the annotation as a person, (N,)."""
    crowd_indices: np.ndarray
    """CrowdPose's crowdIndex per image of the file, NaN where it has none."""
    categories: tuple[Any, ...]
    """As in the file; empty where it has none."""

    @property
    def person(self) -> dict[str, Any] | None:
        """The category of people: the one of that name, or the only one; None where none is."""
        named = [c for c in self.categories if isinstance(c, dict)]
        people = [c for c in named if c.get("name") == PERSON]
        if people:
            return people[0]
        return named[0] if len(named) == 1 else None

    def joints_outside(self) -> np.ndarray:
        """How many pixels beyond its image each labeled joint lies; 0 inside; (N, K)."""
        x, y, visibility = np.moveaxis(self.keypoints, 2, 0)  # 3 x (N, K)
        height, width = self.image_sizes.T[:, :, None]  # 2 x (N, 1)
        beyond = np.maximum.reduce([-x, -y, x - width, y - height])
        return np.where((visibility > 0) & (beyond > 0), beyond, 0.0)


def file_stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change when the file is replaced or written to; none where there is no file."""
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_table(annotations: Path, skeleton: Skeleton) -> AnnotationTable:
    """The file's columns, kept for the two latest files while these stay as they are on disk."""
    return _read_table(annotations, skeleton.num_joints, file_stamp(annotations))


@functools.lru_cache(maxsize=2)
def _read_table(path: Path, num_joints: int, _stamp: tuple[int, ...]) -> AnnotationTable:
    images, people, categories = _read_columns(path, num_joints)
    image_rows, image_sizes = _match_images(images, people["image_ids"])
    keypoints, num_numbers = people.pop("keypoints"), people.pop("num_numbers")
    boxes, areas = people.pop("boxes"), people.pop("areas")
    is_crowd = people.pop("iscrowd") > 0
    # Keypoints that cannot be read are a fault of a person, not a person without joints.
    has_some = (num_numbers > 0) | (people["num_keypoints"] > 0)
    is_illegible = has_some & ~np.isfinite(keypoints).all(axis=(1, 2))
    is_labeled = is_illegible | (keypoints[:, :, 2] > 0).any(axis=1)
    is_labeled &= people["num_keypoints"] != 0
    # A box of zero size is a fault even where the area is 0 too, so the person stays in sight.
    has_no_area = (areas <= 0) & (boxes[:, 2:] > 0).all(axis=1)
    table = AnnotationTable(
        path=path,
        image_rows=image_rows,
        picture_ids=images["ids"],
        image_names=tuple(images["names"].tolist()),
        picture_sizes=images["sizes"],
        image_sizes=image_sizes,
        keypoints=keypoints,
        num_numbers=num_numbers,
        boxes=boxes,
        clipped_boxes=clip_boxes(boxes, image_sizes),
        areas=np.where(np.isnan(areas), AREA_OF_BOX * boxes[:, 2] * boxes[:, 3], areas),
        is_crowd=is_crowd,
        is_labeled=is_labeled,
        is_used=is_labeled & ~is_crowd & ~has_no_area,
        crowd_indices=images["crowd_indices"],
        categories=categories,
        **people,
    )
    for value in vars(table).values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return table


def _read_columns(path: Path, num_joints: int) -> tuple[Columns, Columns, tuple[Any, ...]]:
    """Columns of the images and of the annotations, and the categories as in the file."""
    parts = {
        "images": [_image_columns(path, [], 0)],
        "annotations": [_annotation_columns(path, [], 0, num_joints)],
    }
    counts = dict.fromkeys(LISTS, 0)
    categories: Any = ()
    for key, group in itertools.groupby(read_records(path), operator.itemgetter(0)):
        if key == "categories":
            categories = next(group)[1]
        while key in LISTS and (block := [r for _, r in itertools.islice(group, BLOCK)]):
            if key == "images":
                parts[key].append(_image_columns(path, block, counts[key]))
            else:
                parts[key].append(_annotation_columns(path, block, counts[key], num_joints))
            counts[key] += len(block)
    images, people = (_joined(parts[key]) for key in LISTS)
    return images, people, tuple(categories) if isinstance(categories, list) else ()


def _joined(parts: list[Columns]) -> Columns:
    """One array per column; each part's goes as soon as it is copied."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _image_columns(path: Path, records: Sequence[Any], start: int) -> Columns:
    column = functools.partial(_column, f"images of {path}", records, start)
    ids = column("id", np.int64)
    names = [image.get("file_name") for image in records]
    wrong = next((i for i, name in enumerate(names) if not _is_file_name(name)), None)
    if wrong is not None:
        raise InputError(
            f"every image must have a 'file_name', got {records[wrong]!a} as number "
            f"{start + wrong} (from 0) of the images of {path}; mend the file"
        )
    sizes = np.stack([column("height", np.float64), column("width", np.float64)], axis=1)
    crowd_indices = column("crowdIndex", np.float64, math.nan)
    names_of = np.array(names, object)
    return {"ids": ids, "names": names_of, "sizes": sizes, "crowd_indices": crowd_indices}


def _annotation_columns(
    path: Path, records: Sequence[Any], start: int, num_joints: int
) -> Columns:
    column = functools.partial(_column, f"annotations of {path}", records, start)
    image_ids = column("image_id", np.int64)
    keypoints, num_numbers = _number_lists(records, "keypoints", 3 * num_joints)
    boxes, _ = _number_lists(records, "bbox", 4)
    boxes[~np.isfinite(boxes).all(axis=1)] = math.nan
    return {
        "ids": column("id", np.int64),
        "image_ids": image_ids,
        "keypoints": keypoints.reshape(-1, num_joints, 3),
        "num_numbers": num_numbers,
        "boxes": boxes,
        "areas": column("area", np.float64, math.nan),
        "iscrowd": column("iscrowd", np.int64, 0),
        "num_keypoints": column("num_keypoints", np.int64, -1),
        "source_ids": column("source_id", np.int64, -1),
        "category_ids": column("category_id", np.int64, -1),
    }


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The boxes inside their images, one pixel narrower and lower, as HRNet's reader has them.

    A width or height of 0 or less is left where nothing of the box lies in the image.

    Args:
        boxes: xywh in image pixels, (N, 4).
        sizes: height and width of the image of each, (N, 2).
    """
    start = np.maximum(boxes[:, :2], 0)  # (N, 2)
    stop = np.minimum(sizes[:, ::-1] - 1, start + np.maximum(boxes[:, 2:] - 1, 0))
    return np.concatenate([start, stop - start], axis=1)


def _match_images(images: Columns, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row of each annotation's image (N,), its height and width (N, 2)."""
    known, rows, counts = np.unique(images["ids"], return_index=True, return_counts=True)
    if not len(known):
        return np.full(len(image_ids), -1), np.full((len(image_ids), 2), math.nan)
    place = np.minimum(np.searchsorted(known, image_ids), len(known) - 1)
    is_match = (known[place] == image_ids) & (counts[place] == 1)
    image_rows = np.where(is_match, rows[place], -1)
    return image_rows, np.where(is_match[:, None], images["sizes"][image_rows], math.nan)


def _column(
    what: str,
    records: Sequence[Any],
    start: int,
    key: str,
    dtype: type[np.int64] | type[np.float64],
    default: float | None = None,
) -> np.ndarray:
    """One number of every record, the default where a record has none; (N,).

    Args:
        start: how many records of the list came before these.
    """
    values = [record.get(key) if isinstance(record, dict) else str(record) for record in records]
    values = [default if value is None else value for value in values]
    wrong = next((i for i, value in enumerate(values) if not _is_number(value, dtype)), None)
    if wrong is not None:
        kind = "an integer" if dtype is np.int64 else "a number"
        raise InputError(
            f"every record must have {kind} {key!r}, got {str(records[wrong])[:200]} as number "
            f"{start + wrong} (from 0) of the {what}; mend the file"
        )
    return np.array(values, dtype)


def _is_number(value: object, dtype: type[np.int64] | type[np.float64]) -> bool:
    """Whether it is one that the column can hold."""
    if isinstance(value, float):
        return dtype is np.float64 or (value.is_integer() and abs(value) < LARGEST)
    return isinstance(value, int) and abs(value) < LARGEST


def _is_file_name(name: object) -> bool:
    """Whether it is text that a file system can have."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_lists(
    records: Sequence[dict[str, Any]], key: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The lists of that length as rows, NaN for others, (N, length); all lists' lengths, (N,)."""
    lists = [record.get(key) for record in records]
    lengths = np.array([len(v) if isinstance(v, list) else 0 for v in lists], np.int64)
    rows = np.full((len(lists), length), math.nan)
    fitting = np.flatnonzero(lengths == length)
    for chunk in np.array_split(fitting, max(1, len(fitting) // 4096)):
        try:
            values = np.array([lists[i] for i in chunk])
            if values.dtype.kind not in NUMBERS:
                raise TypeError
            rows[chunk] = values.reshape(-1, length)
        except (TypeError, ValueError):  # something in a list of this chunk is no number
            for i in chunk:
                if all(_is_number(value, np.float64) for value in lists[i] or ()):
                    rows[i] = lists[i]
    return rows, lengths
