"""Compare a detector's boxes with the labeled people of the same images.

A file in another form is read without a fault: boxes by two corners, of smaller images, or with
other image ids. The labels show it, since a detector finds most people of an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from study.data.coco_results import DETECTIONS
from study.data.people import People, box_iou
from study.errors import InputError

Boxes = NDArray[np.float64]

GOOD_IOU = 0.5
"""IoU from which on a labeled person counts as found."""
GOOD_SHARE = 0.6
"""Boxes that find a larger share of the people are read as they should be."""
MIN_SHARE = 0.1
"""Least share of people to find. Files of detectors had at least 0.75, boxes of half the size at
most 0.01, those of other images at most 0.21."""
MANY_PEOPLE = 10
"""Labeled people in images with boxes from which on that share is required."""
CLEAR_PEOPLE = 8
CLEAR_RATIO = 1.4
"""Another reading is believed if it finds at least CLEAR_PEOPLE, and CLEAR_RATIO times those that
the usual one finds."""


def _corners(boxes: Boxes) -> Boxes:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)


def _center(boxes: Boxes) -> Boxes:
    return np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]), axis=1)


def _exchanged(boxes: Boxes) -> Boxes:
    return boxes[:, [1, 0, 3, 2]]


def _exchanged_corners(boxes: Boxes) -> Boxes:
    return _corners(_exchanged(boxes))


def _same(boxes: Boxes) -> Boxes:
    return boxes


OTHERWISE: tuple[tuple[str, Callable[[Boxes], Boxes], int], ...] = (
    ("two corners, x1, y1, x2, y2", _corners, 0),
    ("x and y of the center, width and height", _center, 0),
    ("y, x, height, width", _exchanged, 0),
    ("two corners, y1, x1, y2, x2", _exchanged_corners, 0),
    ("boxes of images whose id is larger by one", _same, 1),
    ("boxes of images whose id is smaller by one", _same, -1),
)
"""What a file may hold instead, as messages call it: xywh of its boxes, shift of its image ids."""


def require_labeled(found: People, labeled: People) -> None:
    """Check that a detector's boxes are where the labeled people are.

    Args:
        found: result of ``read_detections``.
        labeled: people of the same annotation file.

    Raises:
        InputError: the boxes fit the people when read in another way, or find few of them.
    """
    assert found.box_scores is not None
    overlaps = best_overlaps(found.boxes, found.image_ids, found.box_scores, labeled)
    good = int((overlaps >= GOOD_IOU).sum())
    if good > GOOD_SHARE * len(overlaps):
        return
    entries = json.loads(found.annotations.read_bytes())
    categories = {entries[place]["category_id"] for place in found.annotation_ids}
    entries = [entry for entry in entries if entry["category_id"] in categories]
    boxes = np.array([entry["bbox"] for entry in entries], float)
    image_ids = np.array([entry["image_id"] for entry in entries], np.int64)
    scores = np.array([entry["score"] for entry in entries], float)
    for form, read, shift in OTHERWISE:
        others = best_overlaps(read(boxes), image_ids + shift, scores, labeled)
        fitting = int((others >= GOOD_IOU).sum())
        if fitting >= max(CLEAR_PEOPLE, CLEAR_RATIO * good, len(others) / 2):
            raise InputError(
                f"{DETECTIONS} must hold boxes by x, y, width and height in pixels, with the "
                f"image ids of the annotations, got those of {found.annotations}, which fit "
                f"{good} labeled people, but {fitting} when read as {form}; convert them"
            )
    if len(overlaps) >= MANY_PEOPLE and good < MIN_SHARE * len(overlaps):
        raise InputError(
            f"{DETECTIONS} must find most labeled people of its images, got a median IoU of "
            f"{np.median(overlaps):.2f} of {len(overlaps)} people with their best boxes in "
            f"{found.annotations}; write x, y, width and height (not two corners) in pixels of "
            "the whole image, and image_id as in data.val.annotations"
        )


def best_overlaps(
    boxes: Boxes, image_ids: NDArray[np.int64], scores: NDArray[np.float64], labeled: People
) -> NDArray[np.float64]:
    """Return the best IoU of each labeled person in an image with boxes, (n,).

    Of each image only as many boxes count as it has labeled people, those of the highest scores:
    of many boxes some fit by chance.
    """
    order = np.lexsort((-scores, image_ids))
    boxes, image_ids = boxes[order], image_ids[order]
    by_image = np.argsort(labeled.image_ids, kind="stable")
    people = labeled.boxes[by_image]
    images, starts, counts = np.unique(
        labeled.image_ids[by_image], return_index=True, return_counts=True
    )
    first = np.searchsorted(image_ids, images)
    last = np.minimum(np.searchsorted(image_ids, images, side="right"), first + counts)
    overlaps = [
        box_iou(people[start : start + count, None], boxes[low:high]).max(axis=1)
        for start, count, low, high in zip(starts, counts, first, last, strict=True)
        if high > low
    ]
    return np.concatenate(overlaps) if overlaps else np.empty(0)
