"""People of an annotation file: who is read, in which frame, and how they are split."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.config.schema import Kind
from study.data.annotations import AnnotationTable, read_table
from study.data.audit import (
    NO_AREA,
    NOT_FINITE,
    WRONG_AREA,
    WRONG_LENGTH,
    annotation_faults,
    audit,
)
from study.data.audit_notes import BLANK, CROWD, NO_BOX, NO_LABELS, OUTSIDE, find_notes
from study.data.people import (
    IN_BOTH,
    People,
    build_people,
    find_neighbors,
    has_ground_truth,
    overlap,
    split_people,
    write_ground_truth,
)
from study.errors import InputError
from study.metrics import average_precision

FIVE = Skeleton(
    name="five",
    joints=("head", "left_shoulder", "right_shoulder", "left_hip", "right_hip"),
    edges=((0, 1), (0, 2), (1, 3), (2, 4)),
    flip_pairs=((1, 2), (3, 4)),
    oks_sigmas=(0.05, 0.08, 0.08, 0.1, 0.1),
    upper_body=(0, 1, 2),
)
REAL = {
    "coco_tiny train": (COCO, "coco_tiny", "person_keypoints_train2017", "train2017", 57),
    "coco_tiny val": (COCO, "coco_tiny", "person_keypoints_val2017", "val2017", 58),
    "lspet train": (CROWDPOSE, "lspet", "lspet_train", "images/train", 7000),
    "lspet val": (CROWDPOSE, "lspet", "lspet_val", "images/val", 1000),
    "lspet_crowd train": (CROWDPOSE, "lspet_crowd", "lspet_crowd_train", "images/train", 3812),
    "lspet_crowd val": (CROWDPOSE, "lspet_crowd", "lspet_crowd_val", "images/val", 1515),
    "crowdpose sample": (CROWDPOSE, "crowdpose_tiny", "crowdpose_sample", "images", 4),
}


def person(number: int, image_id: int, **changes: Any) -> dict[str, Any]:
    keypoints = [value for joint in range(5) for value in (10.0 + joint, 20.0 + joint, 2)]
    return {
        "id": number,
        "image_id": image_id,
        "bbox": [5, 10, 30, 40],
        "area": 600.0,
        "iscrowd": 0,
        "num_keypoints": 5,
        "keypoints": keypoints,
        **changes,
    }


def write(path: Path, people: list[dict[str, Any]], num_images: int = 3) -> Path:
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 60, "crowdIndex": 0.1 * i}
        for i in range(1, num_images + 1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": 1, "name": "person"}]
    path.write_text(
        json.dumps({"images": images, "annotations": people, "categories": categories})
    )
    return path


def count_notes(table: AnnotationTable) -> collections.Counter[str]:
    """The number of notes of each kind."""
    return collections.Counter(note.kind for note in find_notes(table))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., People]:
    def read_these(
        *people: dict[str, Any], name: str = "a", num_images: int = 3, **options: Any
    ) -> People:
        path = write(tmp_path / f"{name}.json", list(people), num_images)
        return build_people(read_table(path, FIVE), tmp_path / "images", **options)

    return read_these


@pytest.mark.parametrize("name", REAL)
def test_real_data_pass_the_audit_and_all_their_people_are_read(shared: Path, name: str) -> None:
    skeleton, folder, file, image_folder, count = REAL[name]
    annotations = shared / "data" / folder / "annotations" / f"{file}.json"
    images = shared / "data" / folder / image_folder
    table = read_table(annotations, skeleton)
    assert audit(table, images) == []
    people = build_people(table, images)
    assert len(people) == count == table.num_people
    assert people.keypoints_image.shape == (count, skeleton.num_joints, 2)
    assert people.image_paths[0].is_file()


def test_official_crowdpose_val_passes_with_its_oddities_as_notes(shared: Path) -> None:
    annotations = shared / "data/crowdpose_tiny/annotations/crowdpose_val.json"
    images = shared / "data/crowdpose_tiny/images"
    table = read_table(annotations, CROWDPOSE)
    assert audit(table, images, verify_images=False) == []
    assert len(build_people(table, images)) == 7074
    counts = count_notes(table)
    assert (table.num_people, counts[CROWD]) == (7074, 106)
    assert counts[NO_LABELS] == 8527 - 7074 - 106
    assert counts[OUTSIDE] == 8


def test_boxes_are_those_of_the_official_reader(shared: Path) -> None:
    crops = json.loads((shared / "reference/preprocess/official_crops.json").read_text())
    assert len(crops["persons"]) == 20
    for split in ("train2017", "val2017"):
        folder = shared / "data/coco_tiny"
        annotations = folder / f"annotations/person_keypoints_{split}.json"
        people = build_people(read_table(annotations, COCO), folder / split)
        boxes = dict(zip(people.annotation_ids.tolist(), people.boxes, strict=True))
        for reference in crops["persons"]:
            if reference["set"] == split:
                expected = reference["clean_bbox"]
                np.testing.assert_allclose(boxes[reference["ann_id"]], expected, atol=1e-6)


def test_box_that_reaches_outside_is_clipped_and_loses_a_pixel(
    read: Callable[..., People],
) -> None:
    people = read(person(1, 1, bbox=[-5, 10, 40, 100]))  # in an image of 80 x 60
    assert people.boxes.tolist() == [[0, 10, 39, 69]]


def test_columns_hold_the_values_of_the_file(read: Callable[..., People], tmp_path: Path) -> None:
    keypoints = [1.5, 2.5, 2, 3, 4, 1, 0, 0, 0, 7, 8, 2, 9, 10, 1]
    people = read(person(7, 2, keypoints=keypoints, num_keypoints=4), person(9, 1))
    assert people.annotation_ids.tolist() == [9, 7]  # image by image
    assert people.image_ids.tolist() == people.source_ids.tolist() == [1, 2]
    assert people.keypoints_image[1].tolist() == [[1.5, 2.5], [3, 4], [0, 0], [7, 8], [9, 10]]
    assert people.visibility[1].tolist() == [2, 1, 0, 2, 1]
    assert people.visibility.dtype == np.uint8
    assert people.image_paths[1] == tmp_path / "images/2.jpg"
    assert people.areas.tolist() == [600, 600]
    assert not people.has_source


def test_missing_area_is_computed_from_the_box(read: Callable[..., People]) -> None:
    without = person(1, 1)
    del without["area"]
    assert read(without).areas.tolist() == [pytest.approx(0.53 * 30 * 40)]


def test_annotations_skipped_by_official_readers_are_skipped(
    read: Callable[..., People], tmp_path: Path
) -> None:
    people = read(
        person(1, 1),
        person(2, 1, iscrowd=1),
        person(3, 1, keypoints=[0] * 15),
        person(4, 1, num_keypoints=0),  # CrowdPose: only head and neck are labeled
        person(5, 1, area=0),
        person(6, 2, iscrowd=1, bbox=[0, 0, 0, 0]),
    )
    assert people.annotation_ids.tolist() == [1]
    table = read_table(tmp_path / "a.json", FIVE)
    counts = count_notes(table)
    assert table.num_people == counts[NO_AREA] == 1
    assert counts[CROWD] == counts[NO_LABELS] == 2


def test_missing_num_keypoints_are_counted(read: Callable[..., People]) -> None:
    first, second = person(1, 1), person(2, 1, keypoints=[0] * 15)
    del first["num_keypoints"], second["num_keypoints"]
    assert read(first, second).annotation_ids.tolist() == [1]


def test_sources_count_only_if_every_annotation_names_one(read: Callable[..., People]) -> None:
    people = read(person(1, 1, source_id=5), person(2, 2, source_id=5))
    assert people.has_source and people.source_ids.tolist() == [5, 5]
    people = read(person(1, 1, source_id=5), person(2, 2), name="b")
    assert not people.has_source and people.source_ids.tolist() == [1, 2]


def test_neighbor_is_the_most_overlapping_box_of_the_same_image() -> None:
    boxes = np.array(
        [[0, 0, 10, 10], [5, 0, 10, 10], [8, 0, 10, 10], [40, 40, 5, 5], [0, 0, 10, 10]], float
    )
    groups = np.array([1, 1, 1, 1, 2])
    # Shared with the first: 5 x 10 and 2 x 10; the second and the third share 7 x 10.
    assert find_neighbors(boxes, groups).tolist() == [1, 2, 1, -1, -1]
    assert find_neighbors(np.zeros((0, 4)), np.zeros(0)).tolist() == []


def test_neighbors_equal_a_plain_loop() -> None:
    rng = np.random.RandomState(0)
    boxes = np.concatenate([rng.uniform(0, 60, (200, 2)), rng.uniform(5, 40, (200, 2))], axis=1)
    groups = np.sort(rng.randint(0, 50, 200))
    expected = []
    for i, (x, y, w, h) in enumerate(boxes):
        best, best_iou = -1, 0.0
        for j, (u, v, p, q) in enumerate(boxes):
            width = min(x + w, u + p) - max(x, u)
            height = min(y + h, v + q) - max(y, v)
            if i != j and groups[i] == groups[j] and width > 0 and height > 0:
                iou = width * height / (w * h + p * q - width * height)
                best, best_iou = (j, iou) if iou > best_iou else (best, best_iou)
        expected.append(best)
    assert find_neighbors(boxes, groups).tolist() == expected


def test_taken_people_keep_the_neighbors_that_are_taken_too(read: Callable[..., People]) -> None:
    people = read(
        person(1, 1),
        person(2, 1, bbox=[6, 10, 30, 40]),
        person(3, 2),
        person(4, 1, bbox=[9, 10, 30, 40]),
    )
    assert people.annotation_ids.tolist() == [1, 2, 4, 3]
    assert people.neighbors.tolist() == [1, 0, 1, -1]
    taken = people.take(np.array([3, 1, 0]))
    assert taken.annotation_ids.tolist() == [3, 2, 1]
    assert taken.neighbors.tolist() == [-1, 2, 1]
    assert taken.image_paths == tuple(people.image_paths[i] for i in (3, 1, 0))
    assert people.take(np.array([2])).neighbors.tolist() == [-1]
    assert len(people.take(np.array([], int))) == 0


def make_people(read: Callable[..., People], num_images: int = 40) -> People:
    """Two people an image; each source person is in two images."""
    people = [
        person(2 * i + side + 1, i + 1, source_id=(2 * i + side) % num_images)
        for i in range(num_images)
        for side in range(2)
    ]
    return read(*people, num_images=num_images)


def test_search_slice_is_whole_images_and_shares_no_person_with_train(
    read: Callable[..., People],
) -> None:
    people = make_people(read)
    train, search = split_people(people, 0.1, seed=3)
    images = set(people.image_ids[search].tolist())
    assert len(images) == 4 and len(search) == 8  # of 40 images of 2
    # Image i shows the same two as image i + 20.
    twins = {(image + 19) % 40 + 1 for image in images}
    assert set(people.image_ids[train].tolist()) == set(range(1, 41)) - images - twins


def test_people_without_source_are_split_by_image_alone(shared: Path) -> None:
    folder = shared / "data/coco_tiny"
    annotations = folder / "annotations/person_keypoints_train2017.json"
    people = build_people(read_table(annotations, COCO), folder / "train2017")
    train, search = split_people(people, 0.2, seed=0)
    assert sorted([*train, *search]) == list(range(57))
    assert len(set(people.image_ids[search])) == 5  # of 25
    assert not set(people.image_ids[train]) & set(people.image_ids[search])


def test_real_search_slice_shares_no_source_person_with_train(shared: Path) -> None:
    folder = shared / "data/lspet_crowd"
    annotations = folder / "annotations/lspet_crowd_train.json"
    people = build_people(read_table(annotations, CROWDPOSE), folder / "images/train")
    train, search = split_people(people, 0.1, seed=0)
    assert len(set(people.image_ids[search])) == 150
    assert not set(people.source_ids[train]) & set(people.source_ids[search])
    assert len(train) > 0.7 * len(people)


def test_split_depends_only_on_the_seed(read: Callable[..., People]) -> None:
    people = make_people(read)
    first, again, other = (split_people(people, 0.1, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_search_fraction_outside_its_bounds_is_refused(
    read: Callable[..., People], fraction: float
) -> None:
    with pytest.raises(InputError, match=r"data\.search_fraction must lie between 0 and 1, got"):
        split_people(read(person(1, 1), person(2, 2)), fraction, seed=0)


def test_split_that_leaves_a_side_empty_is_refused(read: Callable[..., People]) -> None:
    with pytest.raises(InputError, match=r"both sides, got .* 2 people and 1 images of .*a\.json"):
        split_people(read(person(1, 1), person(2, 1)), 0.5, seed=0)
    everyone_alike = read(person(1, 1, source_id=4), person(2, 2, source_id=4), name="b")
    with pytest.raises(InputError, match="got 0 people to train on and 1 to search on"):
        split_people(everyone_alike, 0.5, seed=0)


def test_real_splits_do_not_overlap(shared: Path) -> None:
    folder = shared / "data/coco_tiny"
    train, val = (
        build_people(
            read_table(folder / f"annotations/person_keypoints_{split}.json", COCO), folder / split
        )
        for split in ("train2017", "val2017")
    )
    assert overlap(train, val) == []
    assert len(overlap(train, train)) == len(train)


def test_people_of_train_who_are_in_val_are_faults(read: Callable[..., People]) -> None:
    train = read(person(2, 2), person(1, 1, bbox=[0, 0, 9, 9]), person(3, 3), name="train")
    val = read(person(1, 1), person(2, 2), name="val")
    elsewhere = tuple(Path("other") / path.name for path in val.image_paths)
    val = dataclasses.replace(val, image_paths=elsewhere)
    (fault,) = overlap(train, val)
    assert (fault.kind, fault.annotation_id, fault.image_id) == (IN_BOTH, 2, 2)
    assert not fault.is_warning
    assert fault.file.name == "train.json" and "val.json" in fault.detail


def test_people_of_train_whose_image_or_source_is_in_val_are_faults(
    read: Callable[..., People],
) -> None:
    train = read(person(5, 1), person(6, 2), name="train")
    val = read(person(1, 1), name="val")
    assert [fault.annotation_id for fault in overlap(train, val)] == [5]
    train = read(person(5, 2, source_id=7), person(6, 3, source_id=8), name="train")
    val = read(person(1, 1, source_id=8), name="val")
    assert [fault.annotation_id for fault in overlap(train, val)] == [6]


def test_ground_truth_keeps_all_annotations_of_its_images(tmp_path: Path) -> None:
    people = [person(1, 1), person(2, 2, iscrowd=1), person(3, 2, source_id=8), person(4, 3)]
    source = write(tmp_path / "a.json", people)
    target = tmp_path / "new/folder/b.json"
    write_ground_truth(read_table(source, FIVE), np.array([3, 2]), target, leave_out={4})
    before, after = json.loads(source.read_text()), json.loads(target.read_text())
    assert after["images"] == before["images"][1:]
    assert after["annotations"] == [{"category_id": 1, **one} for one in people[1:3]]
    joints = list(FIVE.joints)
    assert after["categories"] == [{"id": 1, "name": "person", "keypoints": joints}]
    assert list(target.parent.iterdir()) == [target]
    assert has_ground_truth(target) and not has_ground_truth(source)
    assert not has_ground_truth(tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"keypoints": [None] * 15},
        {"keypoints": None},
        {"keypoints": [[1, 2, 0]] * 5},
        {"keypoints": "none"},
        {"keypoints": [float("nan")] * 15},
        {"keypoints": [1, 2]},
        {"area": float("nan")},
        {"area": None},
        {"area": -4.0},
        {"area": float("inf")},
        {"iscrowd": None},
        {"iscrowd": False},
        {"iscrowd": True},
        {"category_id": None},
        {"image_id": 2.0, "id": 3.0},
        {"num_keypoints": 5},
        {"num_keypoints": None},
    ],
)
def test_ground_truth_of_a_skipped_person_is_numbers_alone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    skipped = person(3, 2, keypoints=[0] * 15, num_keypoints=0) | changes
    table = read_table(write(tmp_path / "a.json", [person(2, 2), skipped]), FIVE)
    assert table.ids[table.is_used].tolist() == [2]
    write_ground_truth(table, np.array([2]), tmp_path / "b.json")
    truth, other = json.loads((tmp_path / "b.json").read_text())["annotations"]
    assert truth == {"category_id": 1, **person(2, 2)}
    area = 0.53 * 1200 if "area" in changes else 600
    expected = person(3, 2, keypoints=[0] * 15, num_keypoints=0, area=area)
    if changes.get("keypoints") == [[1, 2, 0]] * 5:
        expected["keypoints"] = [0] * 15
    assert other == {"category_id": 1, **expected, "iscrowd": int(bool(changes.get("iscrowd")))}
    figures = average_precision(tmp_path / "b.json", [as_found(truth)], FIVE, "coco")
    assert figures["ap"] == 1


def as_found(truth: dict[str, Any]) -> dict[str, Any]:
    """The pose that a perfect estimator finds."""
    return {key: truth[key] for key in ("image_id", "keypoints")} | {"score": 0.5}


def test_count_of_the_file_decides_who_is_evaluated(tmp_path: Path) -> None:
    people = [person(2, 2), person(3, 2, num_keypoints=0), person(4, 2, num_keypoints=3)]
    table = read_table(write(tmp_path / "a.json", people), FIVE)
    write_ground_truth(table, np.array([2]), tmp_path / "b.json")
    written = json.loads((tmp_path / "b.json").read_text())["annotations"]
    assert [one["num_keypoints"] for one in written] == [5, 0, 3]


@pytest.mark.parametrize("box", [None, [None] * 4, [1, 2, 3], ["1"] * 4, [float("nan")] * 4])
def test_skipped_person_without_a_box_is_noted_and_not_evaluated(tmp_path: Path, box: Any) -> None:
    skipped = person(3, 2, keypoints=[0] * 15, num_keypoints=0, bbox=box)
    table = read_table(write(tmp_path / "a.json", [person(2, 2), skipped]), FIVE)
    notes = count_notes(table)
    assert notes[NO_LABELS] == notes[NO_BOX] == 1
    write_ground_truth(table, np.array([2]), tmp_path / "b.json")
    document = json.loads((tmp_path / "b.json").read_text())
    assert [one["id"] for one in document["annotations"]] == [2]


@pytest.mark.parametrize("name", ["coco_tiny val", "crowdpose sample", "lspet_crowd val"])
def test_ap_is_that_of_the_file_itself(shared: Path, tmp_path: Path, name: str) -> None:
    skeleton, folder, file, _, _ = REAL[name]
    source = shared / "data" / folder / "annotations" / f"{file}.json"
    document = json.loads(source.read_text())
    rng = np.random.RandomState(0)
    found = []
    for one in document["annotations"]:
        if one.get("num_keypoints") and not one.get("iscrowd"):
            numbers = np.array(one["keypoints"], float)
            numbers[0::3] += rng.normal(0, 15, skeleton.num_joints)
            score = float(rng.uniform())
            found.append({**as_found(one), "keypoints": numbers.tolist(), "score": score})
    table = read_table(source, skeleton)
    write_ground_truth(table, table.images.ids, tmp_path / "b.json")
    kind: Kind = "coco" if skeleton is COCO else "crowdpose"
    expected = average_precision(source, found, skeleton, kind)
    assert 0 < expected["ap"] < 0.95
    ours = average_precision(tmp_path / "b.json", found, skeleton, kind)
    np.testing.assert_array_equal(list(ours.values()), list(expected.values()))


@pytest.mark.parametrize("value", [float("nan"), None, float("inf")])
def test_unlabeled_joint_without_coordinates_is_unlabeled(tmp_path: Path, value: Any) -> None:
    keypoints = person(1, 1)["keypoints"]
    changed = [value, value, 0, *keypoints[3:]]
    people = [person(1, 1, keypoints=changed, num_keypoints=4), person(2, 2)]
    table = read_table(write(tmp_path / "a.json", people), FIVE)
    assert annotation_faults(table) == []
    assert table.keypoints[0].reshape(-1).tolist() == [0, 0, 0, *keypoints[3:]]
    assert count_notes(table)[BLANK] == 1
    all_null = [None, None, None, *keypoints[3:]]
    people = [person(1, 1, keypoints=all_null, num_keypoints=4), person(2, 2)]
    again = read_table(write(tmp_path / "a.json", people), FIVE)
    assert np.array_equal(again.keypoints, table.keypoints)


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"keypoints": [None, 1, 2] * 5}, NOT_FINITE, "NaN, infinity or text"),
        ({"keypoints": [1, 2, None] * 5}, NOT_FINITE, "NaN, infinity or text"),
        ({"keypoints": [1, 2, True] * 5}, NOT_FINITE, "text: [1, 2, True, 1, 2, True, ...]"),
        ({"keypoints": [1, 2] * 5}, WRONG_LENGTH, "write the visibility after x and y"),
        ({"keypoints": [[1, 2, 2]] * 5}, WRONG_LENGTH, "got 5 lists, [[1, 2, 2], [1, 2, 2], "),
        ({"keypoints": "1 2 2"}, WRONG_LENGTH, "got '1 2 2'; write a list"),
        ({"area": -4.0}, WRONG_AREA, "got -4"),
    ],
)
def test_value_that_means_no_one_thing_is_a_fault(
    tmp_path: Path, changes: dict[str, Any], kind: str, detail: str
) -> None:
    people = [person(1, 1, **changes), person(2, 2)]
    table = read_table(write(tmp_path / "a.json", people), FIVE)
    (fault,) = annotation_faults(table)
    assert (fault.kind, fault.annotation_id) == (kind, 1)
    assert detail in fault.detail


@pytest.mark.parametrize("key", ["id", "image_id", "category_id"])
@pytest.mark.parametrize("value", [[1], "1", 1.5, True, {}])
def test_id_that_is_no_integer_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    file = write(tmp_path / "a.json", [person(1, 1), person(2, 2) | {key: value}])
    with pytest.raises(InputError, match=f"must have an integer '{key}', got .* as number 1 "):
        read_table(file, FIVE)
