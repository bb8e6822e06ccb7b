"""What is in a data set: how many people, how well labelled, how large, how crowded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from study.annotation_table import AnnotationTable
from study.metrics import CROWD_BOUNDS

AREA_BOUNDS = (32.0**2, 96.0**2)
"""Where COCO divides small, medium and large people, square pixels."""
HEIGHT_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
BLOCK = 8192
"""People whose neighbours' joints are looked at at once."""


@dataclass(frozen=True)
class Figures:
    """Counts and shares of the people whom a study would use."""

    num_pictures: int
    num_with_people: int
    num_annotations: int
    rows: NDArray[np.int64]
    """The people's places in the annotation file, (N,)."""
    labelled: NDArray[np.float64]
    """Share of the people who have each joint labelled, (K,)."""
    visible: NDArray[np.float64]
    """Share of those whose labelled joint is visible, (K,); NaN where nobody has it."""
    joints_per_person: NDArray[np.int64]
    """People with so many labelled joints, from 0 to K, (K + 1,)."""
    box_heights: NDArray[np.float64]
    """Pixels that 5, 25, 50, 75 and 95 % of the boxes are lower than."""
    sizes: NDArray[np.int64]
    """Small, medium and large people by COCO's bounds of the area."""
    crowd_indices: NDArray[np.float64]
    """Of each picture with people, in the order of their rows."""
    is_crowd_computed: bool
    """Whether the file has no crowdIndex, so that it comes from the joints."""
    picture_rows: NDArray[np.int64]
    """Of the same pictures."""

    def crowd_groups(self) -> NDArray[np.int64]:
        """Pictures that are easy, medium and hard."""
        return np.bincount(np.digitize(self.crowd_indices, CROWD_BOUNDS), minlength=3)


def measure(table: AnnotationTable, left_out: Collection[int] = frozenset()) -> Figures:
    """The figures of the people without those left out by annotation id; at least one remains."""
    rows = np.flatnonzero(
        table.is_used & (table.image_rows >= 0) & ~np.isin(table.ids, list(left_out))
    )
    visibility = table.keypoints[rows, :, 2]  # (N, K)
    has_label = visibility > 0
    numbers = has_label.sum(axis=0)
    pictures = np.unique(table.image_rows[rows])
    given = table.crowd_indices[pictures]
    is_computed = not np.isfinite(given).any()
    with np.errstate(invalid="ignore"):
        visible = (visibility == 2).sum(axis=0) / numbers
    return Figures(
        num_pictures=len(table.image_names),
        num_with_people=len(pictures),
        num_annotations=len(table.ids),
        rows=rows,
        labelled=numbers / len(rows),
        visible=visible,
        joints_per_person=np.bincount(has_label.sum(axis=1), minlength=has_label.shape[1] + 1),
        box_heights=np.quantile(table.boxes[rows, 3], HEIGHT_SHARES),
        sizes=np.bincount(np.digitize(table.areas[rows], AREA_BOUNDS), minlength=3),
        crowd_indices=crowd_indices(table, rows) if is_computed else given,
        is_crowd_computed=is_computed,
        picture_rows=pictures,
    )


def crowd_indices(table: AnnotationTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """How crowded each picture of these people is, 0 to 1, by ascending row of the pictures.

    Mean over the people of: joints of others in a person's box over the person's own in it, at
    most 1 (Li et al., CrowdPose, CVPR 2019). From people with joints only, so it is not exactly
    what CrowdPose's file says.
    """
    order = rows[np.argsort(table.image_rows[rows], kind="stable")]
    _, starts, sizes = np.unique(table.image_rows[order], return_index=True, return_counts=True)
    first_of, size_of = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    ratios = np.zeros(len(order))
    for start in range(0, len(order), BLOCK):
        people = np.arange(start, min(start + BLOCK, len(order)))
        owners = np.repeat(people, size_of[people])  # P pairs of a box and whose joints
        begins = np.cumsum(size_of[people]) - size_of[people]
        others = first_of[owners] + np.arange(len(owners)) - np.repeat(begins, size_of[people])
        boxes = table.boxes[order[owners], None]  # (P, 1, 4)
        joints = table.keypoints[order[others]]  # (P, K, 3)
        offset = joints[..., :2] - boxes[..., :2]
        inside = ((offset >= 0) & (offset <= boxes[..., 2:])).all(axis=2) & (joints[..., 2] > 0)
        counts = inside.sum(axis=1)
        own = counts[owners == others]
        ratios[people] = (np.add.reduceat(counts, begins) - own) / np.maximum(own, 1)
    return np.minimum(np.add.reduceat(ratios, starts) / sizes, 1)
