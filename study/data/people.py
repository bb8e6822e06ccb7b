"""The people of an annotation file, and how they are split for a study.

The first step of every study: ``data/audit.py`` checks the files, then ``data/crops.py`` and
``cache/crop_store.py`` cut the people out. ``python study/dataset.py PATH`` shows the data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import Skeleton
from study.data.annotations import read_table
from study.data.audit import Fault, annotation_faults, check, require_people
from study.data.coco_json import LISTS, read_records, without_outline
from study.errors import InputError
from study.storage.files import write_atomic

IN_BOTH = "person of train who is in val"


@dataclasses.dataclass(frozen=True, eq=False)
class People:
    """N people of one annotation file, image by image in the order of its ``images``."""

    annotation_ids: np.ndarray
    """(N,), int64 as all ids."""
    image_ids: np.ndarray
    source_ids: np.ndarray
    """Who is shown, where images are composed of known people; else the image ids."""
    boxes: np.ndarray
    """xywh in image pixels, clipped to the image as the official readers do, (N, 4) float64."""
    areas: np.ndarray
    """Square image pixels, 0.53 of the file's box where the file has none, (N,) float64."""
    keypoints_image: np.ndarray
    """(N, K, 2) float64."""
    visibility: np.ndarray
    """(N, K) uint8."""
    neighbors: np.ndarray
    """Whose box overlaps this one most in the same image, -1 where none does, (N,) int64."""
    image_paths: tuple[Path, ...]
    """Per person."""
    annotations: Path
    has_source: bool
    """Whether ``source_ids`` tell more than ``image_ids``: every annotation names its source."""
    box_scores: np.ndarray | None = None
    """(N,) float64, of people whom a detector found; None where they are labeled."""

    def __len__(self) -> int:
        return len(self.annotation_ids)

    def take(self, indices: np.ndarray) -> People:
        """These people in this order; a neighbor who is left out becomes -1."""
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


def read_people(
    annotations: Path,
    images: Path,
    skeleton: Skeleton,
    *,
    leave_out: Collection[int] = frozenset(),
) -> People:
    """The people whom the official readers take, without those left out by annotation id.

    Raises:
        InputError: where a person who is not left out has a fault, or nobody remains. Images
            are not looked at.
    """
    table = read_table(annotations, skeleton)
    is_kept = table.is_used & ~np.isin(table.ids, list(leave_out))
    faults = [
        fault
        for fault in annotation_faults(table, skeleton)
        if fault.annotation_id not in leave_out
    ]
    check(faults, 0, int(np.count_nonzero(is_kept)))
    require_people(table, int(np.count_nonzero(table.is_used & ~is_kept)))
    rows = np.flatnonzero(is_kept)
    rows = rows[np.argsort(table.image_rows[rows], kind="stable")]
    pictures = [images / name for name in table.image_names]
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
        image_paths=tuple(pictures[row] for row in table.image_rows[rows]),
        annotations=annotations,
        has_source=has_source,
    )


def find_neighbors(boxes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Index of the box of the same group with the highest overlap (IoU), -1 where there is none.

    Args:
        boxes: xywh, (N, 4).
        groups: the image of each box, ascending, (N,).
    """
    _, starts, sizes = np.unique(groups, return_index=True, return_counts=True)
    starts, sizes = np.repeat(starts, sizes), np.repeat(sizes, sizes)  # of each box's group
    first = np.repeat(np.arange(len(boxes)), sizes)  # all P pairs of a group
    begins = np.cumsum(sizes) - sizes
    second = starts[first] + np.arange(len(first)) - begins[first]
    corner = np.maximum(boxes[first, :2], boxes[second, :2])
    opposite = np.minimum(
        boxes[first, :2] + boxes[first, 2:], boxes[second, :2] + boxes[second, 2:]
    )
    shared = np.maximum(opposite - corner, 0).prod(axis=1)  # (P,)
    areas = boxes[:, 2:].prod(axis=1)
    iou = np.where(first == second, 0.0, shared / (areas[first] + areas[second] - shared))
    best = np.lexsort((-iou, first))[begins]  # of each box's pairs
    return np.where(iou[best] > 0, second[best], -1)


def split_people(people: People, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the people to train on, and of those of a seeded draw of images to search on.

    Nobody to train on shares an image with the search slice, nor, where the data tell it, is
    shown there too: who is in an image for training but in the slice elsewhere, is in neither.
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
    """Faults: the people of train who are in val too, or whose image is.

    The same person is one with the same annotation id and box, in an image of the same id or
    name (many data sets number each split from 1, so ids alone say little), or with the same
    source where both files name it.
    """
    _, ours, theirs = np.intersect1d(train.annotation_ids, val.annotation_ids, return_indices=True)
    names = [
        train.image_paths[i].name == val.image_paths[j].name
        for i, j in zip(ours, theirs, strict=True)
    ]
    is_same = (train.image_ids[ours] == val.image_ids[theirs]) | np.array(names, bool)
    is_same &= (train.boxes[ours] == val.boxes[theirs]).all(axis=1)
    reasons = dict.fromkeys(ours[is_same].tolist(), "the same person")
    if train.has_source and val.has_source:
        for i in np.flatnonzero(np.isin(train.source_ids, val.source_ids)):
            reasons.setdefault(int(i), f"source person {train.source_ids[i]}")
    images = set(val.image_paths)
    for row, path in enumerate(train.image_paths):
        if path in images:
            reasons.setdefault(row, f"the image {path}")
    return [
        Fault(
            IN_BOTH,
            train.annotations,
            int(train.annotation_ids[i]),
            int(train.image_ids[i]),
            f"{reason} is in {val.annotations} too",
        )
        for i, reason in sorted(reasons.items())
    ]


def write_ground_truth(
    annotations: Path,
    image_ids: np.ndarray,
    target: Path,
    *,
    leave_out: Collection[int] = frozenset(),
) -> None:
    """The target is the annotation file with these images only, crowd regions and all.

    Outlines (``segmentation``) are left out. It is written aside and renamed, so that it is never
    seen unfinished.

    Args:
        leave_out: ids of faulty annotations, which the evaluation must not see.
    """
    kept = set(np.asarray(image_ids).tolist())
    document: dict[str, Any] = {key: [] for key in LISTS}
    for key, value in read_records(annotations):
        if key not in LISTS:
            document[key] = value
        elif key == "images" and value["id"] in kept:
            document[key].append(value)
        elif key == "annotations" and value["image_id"] in kept and value["id"] not in leave_out:
            document[key].append(without_outline(value))
    write_atomic(target, json.dumps(document))


def _iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, P) of boxes xywh (N, 4) and (P, 4); 0 where both are empty."""
    first, second = boxes[:, None], others[None]
    corner = np.maximum(first[..., :2], second[..., :2])
    opposite = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    shared = np.maximum(opposite - corner, 0).prod(axis=-1)
    together = first[..., 2:].prod(axis=-1) + second[..., 2:].prod(axis=-1) - shared
    return np.asarray(shared / np.maximum(together, 1e-9))
