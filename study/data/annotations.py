"""An annotation file in COCO's format, as arrays: COCO, CrowdPose and files like theirs.

``data/audit.py`` searches the table for faults, ``data/people.py`` builds people from it.
``data/categories.py`` decides which category is the people's and how their joints are read.
Which annotations count as people follows the official readers (HRNet's for COCO, mmpose's for
CrowdPose): no crowd regions, no people without labeled joints (``num_keypoints`` 0, if the file
has it), no area of 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.skeleton import Skeleton
from study.data.categories import PERSON as PERSON
from study.data.categories import PersonCategory, read_category
from study.data.coco_json import LISTS, read_records
from study.errors import InputError

SCORED_JOINT = 0.2
"""Joints with at least this confidence count in a person's score (HRNet's ``in_vis_thre``)."""
CROWD_BOUNDS = (0.2, 0.8)
"""crowdIndex between easy, medium and hard images, as in all released code (the paper has 0.1)."""
PERSON_ID = 1
"""The only category in an evaluation, whatever its id in the annotation file."""
AREA_OF_BOX = 0.53
"""Area of a person over the area of its box, for files without areas (CrowdPose's evaluation)."""
BLOCK = 4096
"""Records in memory at once."""
LARGEST = 2**63
"""Integers must be below it to fit into an int64."""
NUMBERS = {int, float}
"""Types of JSON numbers; true and false are none."""
Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTable:
    """The M images of an annotation file, in the file's order; the arrays are read-only."""

    path: Path
    """The annotation file."""
    ids: np.ndarray
    """(M,), int64."""
    names: tuple[str, ...]
    """File names."""
    sizes: np.ndarray
    """Height and width in pixels, (M, 2)."""
    crowd_indices: np.ndarray
    """CrowdPose's crowdIndex, NaN if the file has none, (M,)."""

    def __len__(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotationTable:
    """The N annotations of a file, in the file's order, and its images; arrays are read-only."""

    skeleton: Skeleton
    """Joints that the keypoints are read as."""
    images: ImageTable
    category: PersonCategory
    """The category of people, and how its keypoints were read."""
    ids: np.ndarray
    """(N,), int64 like all ids."""
    image_ids: np.ndarray
    image_rows: np.ndarray
    """Row of the annotation's image in ``images``; -1 if its id is missing or duplicated, (N,)."""
    image_sizes: np.ndarray
    """Height and width of the annotation's image, NaN if ``image_rows`` is -1, (N, 2)."""
    keypoints: np.ndarray
    """x and y in image pixels, visibility; NaN if the file has another length, (N, K, 3)."""
    num_numbers: np.ndarray
    """Length of the annotation's list of keypoints, -1 if they are not a list, (N,)."""
    is_blank: np.ndarray
    """Whether unlabeled joints had no coordinates and are read as 0, 0, 0; (N,)."""
    unread: dict[tuple[str, int], str]
    """By key and row: the start of ``keypoints`` and ``bbox`` that are not read as numbers."""
    boxes: np.ndarray
    """xywh in image pixels as in the file, NaN unless they are four finite numbers, (N, 4)."""
    clipped_boxes: np.ndarray
    """Boxes after ``clip_boxes``, (N, 4)."""
    areas: np.ndarray
    """Square image pixels, (N,)."""
    source_ids: np.ndarray
    """Id of the person shown in a composed image, -1 if the file has none, (N,)."""
    category_ids: np.ndarray
    """-1 if the file has none, (N,)."""
    num_keypoints: np.ndarray
    """The file's count of labeled joints, -1 if it has none, (N,)."""
    is_crowd: np.ndarray
    is_labeled: np.ndarray
    is_person: np.ndarray
    """Whether the annotation is of the people's category, or should be, (N,)."""
    is_used: np.ndarray
    """Whether the official readers take the annotation as a person, (N,)."""

    @property
    def path(self) -> Path:
        """The annotation file."""
        return self.images.path

    @property
    def num_people(self) -> int:
        """Number of annotations that the official readers take as people."""
        return int(np.count_nonzero(self.is_used))

    def pixels_outside(self) -> np.ndarray:
        """Return how far each labeled joint lies outside its image, px; 0 if inside; (N, K)."""
        x, y, visibility = np.moveaxis(self.keypoints, 2, 0)  # 3 x (N, K)
        height, width = self.image_sizes.T[:, :, None]  # 2 x (N, 1)
        beyond = np.maximum.reduce([-x, -y, x - width, y - height])
        return np.where((visibility > 0) & (beyond > 0), beyond, 0.0)


def read_table(
    annotations: Path, skeleton: Skeleton, category: str | None = None
) -> AnnotationTable:
    """Read an annotation file; its joints are put into the skeleton's order by their names.

    Args:
        category: name of the people's category; None finds it.

    Raises:
        InputError: the file is missing or is not in COCO's format, a record lacks a number that
            every record must have, or it is not clear which category is the people's.
    """
    images, people, categories, unread = _read_columns(annotations, skeleton.num_joints)
    image_rows, image_sizes = _match_images(images, people["image_ids"])
    keypoints, num_keypoints = people["keypoints"], people["num_keypoints"]
    boxes, areas = people["boxes"], people["areas"]
    is_crowd = people["iscrowd"] > 0
    is_blank = _fill_unlabeled(keypoints, people["is_read"])
    # Keypoints that cannot be read are a fault of a person, not a person without joints.
    has_some = (people["num_numbers"] != 0) | (num_keypoints > 0)
    is_illegible = has_some & ~np.isfinite(keypoints).all(axis=(1, 2))
    is_labeled = is_illegible | (keypoints[:, :, 2] > 0).any(axis=1)
    is_labeled &= num_keypoints != 0
    person = read_category(
        categories, annotations, skeleton, people["category_ids"], is_labeled, category
    )
    if person.order is not None:
        _reorder(keypoints, person.order)
    is_other = np.isin(people["category_ids"], list(person.others))
    should_be = np.isin(people["category_ids"], list(person.without_joints)) & is_labeled
    is_person = ~is_other | should_be
    # A box of zero size is a fault even if the area is 0 too, so the audit must see the person.
    has_no_area = (areas == 0) & (boxes[:, 2:] > 0).all(axis=1)
    table = AnnotationTable(
        skeleton=skeleton,
        images=ImageTable(
            path=annotations,
            ids=images["ids"],
            names=tuple(images["names"].tolist()),
            sizes=images["sizes"],
            crowd_indices=images["crowd_indices"],
        ),
        category=person,
        ids=people["ids"],
        image_ids=people["image_ids"],
        image_rows=image_rows,
        image_sizes=image_sizes,
        keypoints=keypoints,
        num_numbers=people["num_numbers"],
        is_blank=is_blank,
        unread=unread,
        boxes=boxes,
        clipped_boxes=clip_boxes(boxes, image_sizes),
        areas=np.where(np.isnan(areas), AREA_OF_BOX * boxes[:, 2] * boxes[:, 3], areas),
        source_ids=people["source_ids"],
        category_ids=people["category_ids"],
        num_keypoints=num_keypoints,
        is_crowd=is_crowd,
        is_labeled=is_labeled,
        is_person=is_person,
        is_used=is_person & is_labeled & ~is_crowd & ~has_no_area,
    )
    for value in (*vars(table).values(), *vars(table.images).values()):
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return table


def _reorder(keypoints: np.ndarray, order: Sequence[int]) -> None:
    """Put the joints of (N, K, 3) into this order in place, with little memory."""
    for start in range(0, len(keypoints), BLOCK):
        block = keypoints[start : start + BLOCK]
        block[:] = block[:, order]


def _fill_unlabeled(keypoints: np.ndarray, is_read: np.ndarray) -> np.ndarray:
    """Write 0, 0, 0 for unlabeled joints without coordinates; return whose joints, (N,).

    Such a joint has visibility 0, or no numbers at all.

    Args:
        keypoints: (N, K, 3), changed in place.
        is_read: whether the file has that many numbers, or null, for the person, (N,).
    """
    has_position = np.isfinite(keypoints[:, :, :2]).all(axis=2)
    is_empty = np.isnan(keypoints).all(axis=2) & is_read[:, None]
    is_blank = is_empty | ((keypoints[:, :, 2] == 0) & ~has_position)
    keypoints[is_blank] = 0
    return np.asarray(is_blank.any(axis=1))


def _read_columns(
    path: Path, num_joints: int
) -> tuple[Columns, Columns, Any, dict[tuple[str, int], str]]:
    """Return columns of the images and of the annotations, the categories, and ``unread``."""
    parts = {
        "images": [_image_columns(path, [], 0)],
        "annotations": [_annotation_columns(path, [], 0, num_joints)],
    }
    unread: dict[tuple[str, int], str] = {}
    counts = dict.fromkeys(LISTS, 0)
    categories: Any = ()
    for key, group in itertools.groupby(read_records(path), operator.itemgetter(0)):
        if key == "categories":
            categories = next(group)[1]
        while key in LISTS and (block := [r for _, r in itertools.islice(group, BLOCK)]):
            if key == "images":
                parts[key].append(_image_columns(path, block, counts[key]))
            else:
                columns = _annotation_columns(path, block, counts[key], num_joints)
                parts[key].append(columns)
                has_box = np.isfinite(columns["boxes"]).all(axis=1)
                for name, is_read in (("keypoints", columns["is_read"]), ("bbox", has_box)):
                    for place in np.flatnonzero(~is_read).tolist():
                        unread[name, counts[key] + place] = reprlib.repr(block[place].get(name))
            counts[key] += len(block)
    images, people = (_concatenate(parts[key]) for key in LISTS)
    return images, people, categories, unread


def _concatenate(parts: list[Columns]) -> Columns:
    """Join the parts column by column; frees each part's array once it is copied."""
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}


def _image_columns(path: Path, records: Sequence[Any], start: int) -> Columns:
    column = functools.partial(_column, f"images of {path}", records, start)
    ids = column("id", np.int64)
    names = [image.get("file_name") for image in records]
    wrong = next((i for i, name in enumerate(names) if not _is_file_name(name)), None)
    if wrong is not None:
        has_address = any("url" in str(key) for key in records[wrong])
        raise InputError(
            f"every image must have a 'file_name', got {records[wrong]!a} as number "
            f"{start + wrong} (from 0) of the images of {path}; "
            + ("download the images and write their names" if has_address else "fix the file")
        )
    return {
        "ids": ids,
        "names": np.array(names, object),
        "sizes": np.stack([column("height", np.float64), column("width", np.float64)], axis=1),
        "crowd_indices": column("crowdIndex", np.float64, math.nan),
    }


def _annotation_columns(
    path: Path, records: Sequence[Any], start: int, num_joints: int
) -> Columns:
    column = functools.partial(_column, f"annotations of {path}", records, start)
    image_ids = column("image_id", np.int64)
    keypoints, num_numbers, is_read = _number_lists(records, "keypoints", 3 * num_joints)
    boxes, _, _ = _number_lists(records, "bbox", 4)
    boxes[~np.isfinite(boxes).all(axis=1)] = math.nan
    return {
        "ids": column("id", np.int64),
        "image_ids": image_ids,
        "keypoints": keypoints.reshape(-1, num_joints, 3),
        "num_numbers": num_numbers,
        "is_read": is_read,
        "boxes": boxes,
        "areas": column("area", np.float64, math.nan),
        "iscrowd": column("iscrowd", np.int64, 0),
        "num_keypoints": column("num_keypoints", np.int64, -1),
        "source_ids": column("source_id", np.int64, -1),
        "category_ids": column("category_id", np.int64, -1),
    }


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Clip boxes to their images, one pixel narrower and lower, as HRNet's reader does.

    The width or height is 0 or less if no part of the box lies in the image.

    Args:
        boxes: xywh in image pixels, (N, 4).
        sizes: height and width of each box's image, (N, 2).
    """
    start = np.maximum(boxes[:, :2], 0)  # (N, 2)
    stop = np.minimum(sizes[:, ::-1] - 1, start + np.maximum(boxes[:, 2:] - 1, 0))
    return np.concatenate([start, stop - start], axis=1)


def _match_images(images: Columns, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each annotation's image, (N,), and its height and width, (N, 2)."""
    known, rows, counts = np.unique(images["ids"], return_index=True, return_counts=True)
    if not len(known):
        return np.full(len(image_ids), -1), np.full((len(image_ids), 2), math.nan)
    place = np.minimum(np.searchsorted(known, image_ids), len(known) - 1)
    is_match = (known[place] == image_ids) & (counts[place] == 1)
    image_rows = np.where(is_match, rows[place], -1)
    return image_rows, np.where(is_match[:, None], images["sizes"][image_rows], math.nan)


def _column(
    source: str,
    records: Sequence[Any],
    start: int,
    key: str,
    dtype: type[np.int64] | type[np.float64],
    default: float | None = None,
) -> np.ndarray:
    """Return one number of every record, or the default if a record has none; (N,).

    Args:
        source: list that the records are from, as error messages call it.
        start: number of the list's records before these.
    """
    values = [record.get(key) if isinstance(record, dict) else str(record) for record in records]
    values = [default if value is None else value for value in values]
    if key == "iscrowd":
        values = [int(value) if isinstance(value, bool) else value for value in values]
    wrong = next((i for i, value in enumerate(values) if not _is_number(value, dtype)), None)
    if wrong is not None:
        kind = "an integer" if dtype is np.int64 else "a number"
        record = records[wrong]
        found = reprlib.repr(record.get(key)) if isinstance(record, dict) else str(record)[:200]
        raise InputError(
            f"every record must have {kind} {key!r}, got {found} as number {start + wrong} "
            f"(from 0) of the {source}; fix the file"
        )
    return np.array(values, dtype)


def _is_number(value: object, dtype: type[np.int64] | type[np.float64]) -> bool:
    """Check that the value is a number that the dtype can hold."""
    if isinstance(value, float):
        return dtype is np.float64 or (value.is_integer() and abs(value) < LARGEST)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_file_name(name: object) -> bool:
    """Check that the value is text that a file system accepts."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_lists(
    records: Sequence[dict[str, Any]], key: str, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lists of that length as rows, NaN for others and for null, (N, length).

    The other two are the lengths, -1 for what is no list and 0 for null, and whether the list
    has that length and nothing but numbers and null, both (N,).
    """
    lists = [record.get(key) for record in records]
    lengths = np.array([_length(value) for value in lists], np.int64)
    rows = np.full((len(lists), length), math.nan)
    is_read = lengths == length
    fitting = np.flatnonzero(is_read)
    for chunk in np.array_split(fitting, max(1, len(fitting) // BLOCK)):
        kinds = set().union(*(map(type, lists[i]) for i in chunk))
        try:
            if not kinds <= NUMBERS:
                raise TypeError
            rows[chunk] = np.array([lists[i] for i in chunk], np.float64).reshape(-1, length)
        except (TypeError, OverflowError):  # a list of this chunk holds something else
            for i in chunk:
                values = [math.nan if value is None else value for value in lists[i]]
                is_read[i] = all(_is_number(value, np.float64) for value in values)
                if is_read[i]:
                    rows[i] = values
    return rows, lengths, is_read


def _length(value: object) -> int:
    if isinstance(value, list):
        return len(value)
    return 0 if value is None else -1
