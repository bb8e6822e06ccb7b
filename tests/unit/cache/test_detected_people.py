"""Boxes of a detector that are not where the labeled people are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from study.cache.detected_people import GOOD_IOU, best_overlaps, require_labeled
from study.data.people import People
from study.errors import InputError

NUM_IMAGES = 15
Boxes = NDArray[np.float64]


@pytest.fixture
def labeled(five_people: People) -> People:
    """Two people, far from each other, in each of 15 images of 640 x 480 pixels."""
    rng = np.random.RandomState(2)
    sides = np.tile([0, 320], NUM_IMAGES)
    size = rng.uniform((40, 80), (100, 160), (2 * NUM_IMAGES, 2))
    low = np.c_[sides + rng.uniform(20, 180, 2 * NUM_IMAGES), rng.uniform(20, 300, 2 * NUM_IMAGES)]
    return dataclasses.replace(
        five_people,
        boxes=np.c_[low, size],
        image_ids=np.repeat(np.arange(1, NUM_IMAGES + 1), 2),
    )


def detected(boxes: Boxes, image_ids: NDArray[np.int64], labeled: People, folder: Path) -> People:
    """Write the boxes to a file, and return them as if all of it were read."""
    scores = np.linspace(0.9, 0.5, len(boxes))
    entries = [
        {"image_id": number, "category_id": 1, "bbox": box, "score": score}
        for number, box, score in zip(
            image_ids.tolist(), boxes.tolist(), scores.tolist(), strict=True
        )
    ]
    (folder / "boxes.json").write_text(json.dumps(entries))
    return dataclasses.replace(
        labeled,
        boxes=boxes,
        image_ids=image_ids,
        box_scores=scores,
        annotation_ids=np.arange(len(boxes)),
        annotations=folder / "boxes.json",
    )


def test_best_overlap_is_of_the_highest_scores_alone(labeled: People) -> None:
    one = dataclasses.replace(
        labeled, boxes=np.array([[10.0, 10, 20, 20]]), image_ids=np.array([4])
    )
    boxes = np.array([[10.0, 10, 20, 20], [20, 10, 20, 20], [10, 10, 20, 20]])
    image_ids = np.array([4, 4, 5])
    # one person: one box counts, here the one of half the overlap
    found = best_overlaps(boxes, image_ids, np.array([0.3, 0.4, 0.9]), one)
    np.testing.assert_allclose(found, [1 / 3])
    found = best_overlaps(boxes, image_ids, np.array([0.5, 0.4, 0.9]), one)
    np.testing.assert_allclose(found, [1])
    assert not len(best_overlaps(boxes, image_ids + 9, np.ones(3), one))


def test_boxes_of_a_detector_pass_though_it_misses_many(labeled: People, tmp_path: Path) -> None:
    shaken = labeled.boxes + np.random.RandomState(1).uniform(-6, 6, labeled.boxes.shape)
    require_labeled(detected(shaken, labeled.image_ids, labeled, tmp_path), labeled)
    few = np.where(np.arange(len(shaken))[:, None] % 4 == 0, shaken, shaken / 2)  # finds 8 of 30
    overlaps = best_overlaps(few, labeled.image_ids, np.ones(len(few)), labeled)
    assert np.count_nonzero(overlaps >= GOOD_IOU) == 8
    require_labeled(detected(few, labeled.image_ids, labeled, tmp_path), labeled)
    part = slice(0, 6)  # boxes of three images alone
    require_labeled(detected(shaken[part], labeled.image_ids[part], labeled, tmp_path), labeled)


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda b: np.c_[b[:, :2], b[:, :2] + b[:, 2:]], "two corners, x1, y1, x2, y2"),
        (lambda b: np.c_[b[:, :2] + b[:, 2:] / 2, b[:, 2:]], "x and y of the center"),
        (lambda b: b[:, [1, 0, 3, 2]], "y, x, height, width"),
        (lambda b: np.c_[b[:, :2], b[:, :2] + b[:, 2:]][:, [1, 0, 3, 2]], "y1, x1, y2, x2"),
    ],
)
def test_boxes_of_another_form_are_named(
    change: Callable[[Boxes], Boxes], form: str, labeled: People, tmp_path: Path
) -> None:
    found = detected(change(labeled.boxes), labeled.image_ids, labeled, tmp_path)
    with pytest.raises(InputError, match=rf"but 30 when read as .*{form}.*; convert them"):
        require_labeled(found, labeled)


@pytest.mark.parametrize(("shift", "word"), [(1, "smaller"), (-1, "larger")])
def test_image_ids_shifted_by_one_are_named(
    shift: int, word: str, labeled: People, tmp_path: Path
) -> None:
    found = detected(labeled.boxes, labeled.image_ids + shift, labeled, tmp_path)
    with pytest.raises(InputError, match=rf"30 when read as .* image.* id is {word} by one"):
        require_labeled(found, labeled)


def test_boxes_of_halved_images_or_of_other_images_find_too_few(
    labeled: People, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"median IoU of 0\.\d+ of 30 people"):
        require_labeled(detected(labeled.boxes / 2, labeled.image_ids, labeled, tmp_path), labeled)
    ids = (labeled.image_ids + 6) % NUM_IMAGES + 1
    with pytest.raises(InputError, match=r"of 30 people .*image_id as in data\.val\.annotations"):
        require_labeled(detected(labeled.boxes, ids, labeled, tmp_path), labeled)
