"""The people of an annotation file, and how they are split for a study.

``data/audit.py`` checks the annotation table first; then this module builds people from it, and
``data/crops.py`` and ``cache/crop_store.py`` cut them out of their images.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.data.annotations import AREA_OF_BOX, PERSON_ID, AnnotationTable
from study.data.audit import Fault, annotation_faults, require_few_faults, require_people
from study.errors import InputError
from study.storage.files import write_atomic

IN_BOTH = "person of train who is in val"
FIRST_KEY = "categories"
"""First part of the files that ``write_ground_truth`` writes."""


@dataclasses.dataclass(frozen=True, eq=False)
class People:
    """N people of one annotation file, image by image in the order of its ``images``."""

    annotation_ids: np.ndarray
    """(N,), int64 like all ids."""
    image_ids: np.ndarray
    source_ids: np.ndarray
    """Id of the person shown, if images are composed of known people; else the image id."""
    boxes: np.ndarray
    """xywh in image pixels, clipped to the image as the official readers do, (N, 4) float64."""
    areas: np.ndarray
    """Square image pixels, 0.53 of the file's box if the file has none, (N,) float64."""
    keypoints_image: np.ndarray
    """(N, K, 2) float64."""
    visibility: np.ndarray
    """(N, K) uint8."""
    neighbors: np.ndarray
    """Row of the person of the same image whose box overlaps most, -1 if none, (N,) int64."""
    image_paths: tuple[Path, ...]
    """Per person."""
    annotations: Path
    has_source: bool
    """Whether every annotation names its source, so that ``source_ids`` are not image ids."""
    joint_order: tuple[int, ...] | None = None
    """Place in the file of each joint; None if the file has the skeleton's order."""
    box_scores: np.ndarray | None = None
    """Scores of a detector's boxes, (N,) float64; None for labeled people."""

    def __len__(self) -> int:
        return len(self.annotation_ids)

    def take(self, indices: np.ndarray) -> People:
        """Return these people in this order; neighbors that are left out become -1."""
        indices = np.asarray(indices, np.int64)
        places = np.full(len(self) + 1, -1)  # the last place is that of neighbor -1
        places[indices] = np.arange(len(indices))
        arrays = {
            name: value[indices]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        arrays["neighbors"] = places[arrays["neighbors"]]
        paths = tuple(self.image_paths[i] for i in indices)
        return dataclasses.replace(self, **arrays, image_paths=paths)


def build_people(
    table: AnnotationTable, image_folder: Path, *, leave_out: Collection[int] = frozenset()
) -> People:
    """Build the people whom the official readers take; images are not opened.

    Args:
        leave_out: ids of annotations to leave out.

    Raises:
        InputError: a person who is not left out has a fault, or no person remains.
    """
    is_kept = table.is_used & ~np.isin(table.ids, list(leave_out))
    faults = [fault for fault in annotation_faults(table) if fault.annotation_id not in leave_out]
    require_few_faults(faults, 0, int(np.count_nonzero(is_kept)))
    require_people(table, int(np.count_nonzero(table.is_used & ~is_kept)))
    rows = np.flatnonzero(is_kept)
    rows = rows[np.argsort(table.image_rows[rows], kind="stable")]
    paths = [image_folder / name for name in table.images.names]
    has_source = bool((table.source_ids[rows] >= 0).all())
    boxes = table.clipped_boxes[rows]
    return People(
        annotation_ids=table.ids[rows],
        image_ids=table.image_ids[rows],
        source_ids=(table.source_ids if has_source else table.image_ids)[rows],
        boxes=boxes,
        areas=table.areas[rows],
        keypoints_image=table.keypoints[rows, :, :2],
        visibility=table.keypoints[rows, :, 2].astype(np.uint8),
        neighbors=find_neighbors(boxes, table.image_rows[rows]),
        image_paths=tuple(paths[row] for row in table.image_rows[rows]),
        annotations=table.path,
        has_source=has_source,
        joint_order=table.category.order,
    )


def find_neighbors(boxes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the index of the box of the same group with the highest IoU, -1 if none overlaps.

    Args:
        boxes: xywh, (N, 4).
        groups: image of each box, ascending, (N,).
    """
    _, starts, sizes = np.unique(groups, return_index=True, return_counts=True)
    starts, sizes = np.repeat(starts, sizes), np.repeat(sizes, sizes)  # of each box's group
    first = np.repeat(np.arange(len(boxes)), sizes)  # all P pairs of a group
    begins = np.cumsum(sizes) - sizes
    second = starts[first] + np.arange(len(first)) - begins[first]
    iou = np.where(first == second, 0.0, box_iou(boxes[first], boxes[second]))  # (P,)
    best = np.lexsort((-iou, first))[begins]  # of each box's pairs
    return np.where(iou[best] > 0, second[best], -1)


def box_iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of boxes xywh (..., 4), whose shapes broadcast; 0 if both are empty."""
    corner = np.maximum(boxes[..., :2], others[..., :2])
    opposite = np.minimum(boxes[..., :2] + boxes[..., 2:], others[..., :2] + others[..., 2:])
    shared = np.maximum(opposite - corner, 0).prod(axis=-1)
    union = boxes[..., 2:].prod(axis=-1) + others[..., 2:].prod(axis=-1) - shared
    return np.asarray(shared / np.maximum(union, 1e-9))


def split_people(people: People, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split people by a seeded draw of images into indices to train on and to search on.

    No person to train on shares an image with the search people. If the data name sources,
    people with the source of a search person are in neither part, unless they are search people.

    Raises:
        InputError: the fraction is not between 0 and 1, or one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(
            f"data.search_fraction must lie between 0 and 1, got {fraction}; 0.1 is usual"
        )
    images = np.unique(people.image_ids)
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    # RandomState: its stream is the same in every version of NumPy.
    drawn = np.random.RandomState(seed).permutation(images)[:count]
    is_search = np.isin(people.image_ids, drawn)
    is_train = ~is_search & ~np.isin(people.source_ids, people.source_ids[is_search])
    if not is_search.any() or not is_train.any():
        raise InputError(
            f"a slice of data.search_fraction={fraction} must leave people on both sides, got "
            f"{is_train.sum()} people to train on and {is_search.sum()} to search on of the "
            f"{len(people)} people and {len(images)} images of {people.annotations}; change "
            "data.search_fraction or use more images"
        )
    return np.flatnonzero(is_train), np.flatnonzero(is_search)


def overlap(train: People, val: People) -> list[Fault]:
    """List people of train who are in val too, or whose image is, as faults.

    See ``same_people`` for the rule.
    """
    return [
        Fault(
            IN_BOTH,
            train.annotations,
            int(train.annotation_ids[row]),
            int(train.image_ids[row]),
            f"{reason} is in {val.annotations} too",
        )
        for row, (reason, _) in sorted(same_people(train, val).items())
    ]


def same_people(train: People, val: People) -> dict[int, tuple[str, int | None]]:
    """Return why people of train are in val too, and their row there; None if their image is.

    Two people are the same if they have the same annotation id and box in an image of the same id
    or name (ids alone prove little: many data sets number each split from 1), or the same source,
    if both files name sources.
    """
    _, ours, theirs = np.intersect1d(train.annotation_ids, val.annotation_ids, return_indices=True)
    names = [
        train.image_paths[i].name == val.image_paths[j].name
        for i, j in zip(ours, theirs, strict=True)
    ]
    is_same = (train.image_ids[ours] == val.image_ids[theirs]) | np.array(names, bool)
    is_same &= (train.boxes[ours] == val.boxes[theirs]).all(axis=1)
    pairs = zip(ours[is_same].tolist(), theirs[is_same].tolist(), strict=True)
    found: dict[int, tuple[str, int | None]] = {i: ("the same person", j) for i, j in pairs}
    if train.has_source and val.has_source:
        rows = {source: j for j, source in enumerate(val.source_ids.tolist())}
        for i in np.flatnonzero(np.isin(train.source_ids, val.source_ids)).tolist():
            source = int(train.source_ids[i])
            found.setdefault(i, (f"source person {source}", rows[source]))
    images = set(val.image_paths)
    for i, path in enumerate(train.image_paths):
        if path in images:
            found.setdefault(i, (f"the image {path}", None))
    return found


def write_ground_truth(
    table: AnnotationTable,
    image_ids: np.ndarray,
    target: Path,
    *,
    leave_out: Collection[int] = frozenset(),
) -> None:
    """Write the annotations of these images as a COCO-format file, atomically.

    Crowd regions and people without labeled joints are kept, since an evaluation ignores poses
    there. They are left out if they have no box.

    Args:
        leave_out: ids of faulty annotations, which the evaluation must not see.
    """
    category = table.category
    is_other = np.isin(table.category_ids, list(category.others))
    is_kept = np.isin(table.image_ids, image_ids) & ~np.isin(table.ids, list(leave_out))
    is_kept &= np.isfinite(table.boxes).all(axis=1) & ~is_other
    number = PERSON_ID if category.id is None else category.id
    document = {
        FIRST_KEY: [{"id": number, "name": category.name, "keypoints": table.skeleton.joints}],
        "images": _image_records(table, set(np.asarray(image_ids).tolist())),
        "annotations": _annotation_records(table, np.flatnonzero(is_kept)),
    }
    write_atomic(target, json.dumps(document))


def has_ground_truth(target: Path) -> bool:
    """Check whether ``write_ground_truth`` wrote the file.

    Earlier versions copied records as they were, which an evaluation may fail on.
    """
    start = f'{{"{FIRST_KEY}"'.encode()
    if not target.is_file():
        return False
    with target.open("rb") as file:
        return file.read(len(start)) == start


def _image_records(table: AnnotationTable, kept: Collection[int]) -> list[dict[str, Any]]:
    images = table.images
    columns = zip(
        images.ids.tolist(),
        images.names,
        images.sizes.tolist(),
        images.crowd_indices.tolist(),
        strict=True,
    )
    return [
        {"id": number, "file_name": name, "height": height, "width": width}
        | ({} if math.isnan(index) else {"crowdIndex": index})
        for number, name, (height, width), index in columns
        if number in kept
    ]


def _annotation_records(table: AnnotationTable, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return records of numbers alone, whatever the file has where it is not read."""
    keypoints, boxes = table.keypoints[rows], table.boxes[rows]
    is_read = np.isfinite(keypoints).all(axis=(1, 2))
    keypoints = np.where(is_read[:, None, None], keypoints, 0)
    counts = (keypoints[:, :, 2] > 0).sum(axis=1)
    given = table.num_keypoints[rows]
    areas = table.areas[rows]
    has_area = np.isfinite(areas) & (areas >= 0)
    columns = {
        "id": table.ids[rows],
        "image_id": table.image_ids[rows],
        "category_id": np.where(table.category_ids[rows] < 0, PERSON_ID, table.category_ids[rows]),
        "iscrowd": table.is_crowd[rows].astype(int),
        "num_keypoints": np.where((given >= 0) & (counts > 0), given, counts),
        "area": np.where(has_area, areas, AREA_OF_BOX * boxes[:, 2] * boxes[:, 3]),
        "bbox": boxes,
        "keypoints": keypoints.reshape(len(rows), -1),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    records = [dict(zip(columns, row, strict=True)) for row in values]
    for record, source in zip(records, table.source_ids[rows].tolist(), strict=True):
        if source >= 0:
            record["source_id"] = source
    return records
