"""Boxes of a detector: selection, clipping, and the messages for broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import Skeleton
from study.cache.crop_store import StoreSpec, make_crop_store, open_crop_store
from study.data.annotations import read_table
from study.data.coco_results import read_detections, write_poses
from study.data.people import People
from study.errors import InputError

Records = list[dict[str, Any]]


def box(image_id: int = 1, **changes: Any) -> dict[str, Any]:
    entry = {"image_id": image_id, "category_id": 1, "bbox": [10.0, 20.0, 40.0, 50.0]}
    return {**entry, "score": 0.5, **changes}


def detected(
    entries: Any,
    people: People,
    skeleton: Skeleton,
    folder: Path,
    threshold: float = 0.0,
    category_id: int = 1,
) -> People:
    file = folder / "boxes.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    images = people.image_paths[0].parent
    table = read_table(people.annotations, skeleton)
    return read_detections(file, table.images, images, skeleton, threshold, category_id)


def labeled_boxes(people: People) -> Records:
    """The boxes of the annotation file as they stand there."""
    annotations = json.loads(people.annotations.read_text())["annotations"]
    return [box(a["image_id"], bbox=a["bbox"], score=1.0) for a in annotations]


def test_labeled_boxes_as_detections_give_the_crops_of_the_labeled_people(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    found = detected(labeled_boxes(five_people), five_people, five, tmp_path)
    assert np.array_equal(found.boxes, five_people.boxes)
    assert np.array_equal(found.image_ids, five_people.image_ids)
    assert np.array_equal(found.neighbors, five_people.neighbors)
    assert found.image_paths == five_people.image_paths
    assert found.visibility.shape == five_people.visibility.shape and not found.visibility.any()
    store, labeled = (
        open_crop_store(make_crop_store(people, StoreSpec((96, 64), tmp_path)))
        for people in (found, five_people)
    )
    rows = np.arange(len(store))
    assert np.array_equal(store.crops(rows), labeled.crops(rows))
    assert store.box_scores is not None and store.box_scores.tolist() == [1.0] * 13
    assert labeled.box_scores is None and store.path != labeled.path


def test_detections_are_ordered_by_image(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = [
        box(2),
        box(1, score=0.9),
        box(1, category_id=3),
        box(999),
        box(1, score=0.3),
        box(1, bbox=[200, 20, 40, 50]),
        box(1, bbox=[10, 20, 0, 50]),
        box(2, score=0.29),
    ]
    found = detected(entries, five_people, five, tmp_path, threshold=0.3)
    assert found.image_ids.tolist() == [1, 1, 2]
    assert found.annotation_ids.tolist() == [1, 4, 0]
    assert found.box_scores is not None and found.box_scores.tolist() == [0.9, 0.3, 0.5]
    assert found.neighbors.tolist() == [1, 0, -1]


def test_boxes_are_of_the_category_that_the_annotations_have(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = [box(1), box(2, category_id=3), box(1, category_id=4)]
    found = detected(entries, five_people, five, tmp_path, category_id=3)
    assert found.annotation_ids.tolist() == [1]
    # A detector of one category numbers it 1.
    assert len(detected([box(1), box(2)], five_people, five, tmp_path, category_id=3)) == 2
    with pytest.raises(InputError, match=r"boxes of people \(category_id 5\)"):
        detected(entries, five_people, five, tmp_path, category_id=5)


def test_detected_box_is_clipped_like_a_labeled_one(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    found = detected([box(bbox=[-5, 60, 40, 70])], five_people, five, tmp_path)
    assert found.boxes.tolist() == [[0, 60, 39, 39]]  # the image is 120 wide and 100 high


def test_higher_threshold_makes_another_store(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    entries = [box(1, score=0.2), box(2, score=0.8)]
    paths = {
        make_crop_store(
            detected(entries, five_people, five, tmp_path, threshold),
            StoreSpec((96, 64), tmp_path),
        )
        for threshold in (0.0, 0.5)
    }
    assert len(paths) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", r"must be null or a JSON list of COCO detections.*boxes\.json"),
        (
            {"annotations": []},
            r"JSON list .* with at least one entry, got \{'annotations': \[\]\} in",
        ),
        ([], "with at least one entry, got an empty list in"),
        ([box(), 7], r"entry 1 \(from 0\): must be an object, got 7"),
        ([box(image_id="1")], "image_id must be a whole number, got '1'"),
        ([box(category_id=None)], "category_id must be a whole number, got None"),
        ([box(bbox=[1, 2, 3])], r"bbox must be four finite numbers.*got \[1, 2, 3\]"),
        ([box(bbox=[1, 2, 3, float("nan")])], "bbox must be four finite numbers"),
        ([box(bbox=[1, 2, 3, float("inf")])], "bbox must be four finite numbers"),
        ([box(bbox=[1, 2, 3, 10**400])], "bbox must be four finite numbers"),
        ([box(bbox=[1, 2, 3, 1e308])], "bbox must be four finite numbers"),
        ([box(bbox=[9, 9, -3, 4])], r"width and height must not be negative, got \[9, 9, -3, 4\]"),
        ("[" * 100_000, r"must be null or a JSON list of COCO detections.*recursion"),
        ([box(), box(score=None)], r"entry 1 \(from 0\): score must be a finite number, got None"),
        ([box(), {k: v for k, v in box().items() if k != "score"}], "score must be a finite"),
        ([box(999), box(category_id=2)], r"none among the 2 .*change data\.val\.detections"),
        ([box(score=0.1)], r"detection_threshold=0\.2, got none of 1 .*highest score 0\.1"),
        ([box(bbox=[500, 0, 9, 9])], "must leave a box within its image"),
    ],
)
def test_file_without_boxes_of_these_images_is_refused(
    entries: Any, message: str, five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        detected(entries, five_people, five, tmp_path, threshold=0.2)


def test_missing_file_and_missing_image_are_named(
    five_people: People, five: Skeleton, tmp_path: Path
) -> None:
    folder = five_people.image_paths[0].parent
    images = read_table(five_people.annotations, five).images
    with pytest.raises(InputError, match=r"data\.val\.detections.*relative to data\.root.*no\.js"):
        read_detections(tmp_path / "no.json", images, folder, five, 0)
    (tmp_path / "boxes.json").write_text(json.dumps([box()]))
    with pytest.raises(InputError, match=r"got none at .*gone/1\.png; put it there"):
        read_detections(tmp_path / "boxes.json", images, tmp_path / "gone", five, 0)


def test_written_poses_read_back_unchanged(tmp_path: Path) -> None:
    poses = [{"image_id": 3, "category_id": 1, "keypoints": [0.1, 1 / 3, 1.0], "score": 0.7}]
    write_poses(poses, tmp_path / "results/keypoints_winner.json")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["keypoints_winner.json"]
    assert json.loads((tmp_path / "results/keypoints_winner.json").read_text()) == poses
