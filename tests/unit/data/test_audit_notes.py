"""Faults and notes of an annotation file, and their table on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.data import audit_notes as module
from study.data.annotations import read_table
from study.data.audit import (
    AT_ORIGIN,
    NO_SIZE,
    OTHER_CATEGORY,
    SCHEMA,
    WRONG_AREA,
    Fault,
    audit,
    require_few_faults,
    write_audit,
)
from study.data.audit_notes import find_notes
from study.data.image_files import MISSING_IMAGE, OTHER_SIZE, has_similar_file

Document = dict[str, Any]


@pytest.fixture
def audited(tmp_path: Path, five: Skeleton) -> Callable[..., list[Fault]]:
    """Faults and notes of a sound document of two people after a change."""
    (tmp_path / "images").mkdir()
    image = np.zeros((80, 60, 3), np.uint8)
    for number in (1, 2):
        cv2.imwrite(str(tmp_path / f"images/{number}.jpg"), image)

    def joints() -> dict[str, Any]:
        keypoints = [value for j in range(5) for value in (10.0 + j, 20.0 + j, 2)]
        return {"num_keypoints": 5, "keypoints": keypoints}

    def run(change: Callable[[Document], Any] = lambda document: None) -> list[Fault]:
        person = {
            "bbox": [5, 10, 30, 40],
            "area": 600,
            "category_id": 1,
            "iscrowd": 0,
            "num_keypoints": 5,
        }
        document: Document = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 60} for i in (1, 2)
            ],
            "annotations": [{**person, "id": 10 + i, "image_id": i, **joints()} for i in (1, 2)],
            "categories": [{"id": 1, "name": "person", "keypoints": list(five.joints)}],
        }
        change(document)
        file = tmp_path / "a.json"
        file.write_text(json.dumps(document))
        table = read_table(file, five)
        return audit(table, tmp_path / "images") + find_notes(table)

    return run


def first(document: Document) -> dict[str, Any]:
    person: dict[str, Any] = document["annotations"][0]
    return person


def test_sound_data_have_neither_faults_nor_notes(audited: Callable[..., list[Fault]]) -> None:
    assert audited() == []


@pytest.mark.parametrize(
    ("change", "kind", "detail"),
    [
        (lambda d: first(d).update(area=float("inf")), WRONG_AREA, "square pixels, got inf"),
        (lambda d: first(d).update(category_id=3), OTHER_CATEGORY, "person's, 1, got 3"),
        (lambda d: d["images"][0].update(width=61), OTHER_SIZE, "says, 80 x 61, got 80 x 60"),
    ],
)
def test_fault_names_the_one_person(
    audited: Callable[..., list[Fault]],
    change: Callable[[Document], Any],
    kind: str,
    detail: str,
) -> None:
    (fault,) = audited(change)
    assert (fault.kind, fault.annotation_id, fault.is_warning) == (kind, 11, False)
    assert detail in fault.detail


@pytest.mark.parametrize(
    ("listed", "on_disk", "reason"),
    [
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "in another Unicode form"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", "in another Unicode form"),
        ("a\\b.jpg", "a/b.jpg", "with / for \\"),
        ("D:\\data\\b.jpg", "b.jpg", "without its folder"),
        ("/home/me/data/b.jpg", "b.jpg", "without its folder"),
        ("http://host/b.jpg", "b.jpg", "without its folder"),
        ("b.jpg ", "b.jpg", "without blanks around it"),
        ("/data/upload/1/a%20b.jpg", "a b.jpg", "without % signs"),
        ("b.jpg", "b.JPG", "with another ending"),
        ("images\\b.jpg", "b.png", "with another ending"),
    ],
)
def test_missing_image_is_told_from_one_of_another_spelling(
    audited: Callable[..., list[Fault]], tmp_path: Path, listed: str, on_disk: str, reason: str
) -> None:
    file = tmp_path / "images" / on_disk

    def move(document: Document) -> None:
        document["images"][0]["file_name"] = listed
        file.parent.mkdir(exist_ok=True)
        (tmp_path / "images/1.jpg").rename(file)

    (fault,) = audited(move)
    assert (fault.kind, fault.annotation_id) == (MISSING_IMAGE, 11)
    assert fault.detail == f"there is no such file, but {file} ({reason}); correct file_name"
    assert has_similar_file(tmp_path / "images", listed)


def test_missing_image_that_no_file_resembles_is_missing(
    audited: Callable[..., list[Fault]], tmp_path: Path
) -> None:
    (fault,) = audited(lambda d: d["images"][0].update(file_name="other.jpg"))
    assert (fault.kind, fault.detail) == (MISSING_IMAGE, "there is no such file")
    assert not has_similar_file(tmp_path / "images", "other.jpg")
    assert not has_similar_file(tmp_path / "images", "too long for a disk" * 20)


def repeat_first(document: Document) -> None:
    document["annotations"].append({**first(document), "id": 99})


@pytest.mark.parametrize(
    ("change", "kind", "annotation_id", "detail"),
    [
        (lambda d: first(d).update(iscrowd=1), module.CROWD, 11, "skip"),
        (lambda d: first(d).update(area=0), module.NO_AREA, 11, "skip"),
        (lambda d: first(d).update(num_keypoints=4), module.OTHER_COUNT, 11, "is 4, 5 are"),
        (lambda d: first(d).update(bbox=[-3, 1, 20, 30]), module.CLIPPED, 11, r"[-3.0, 1.0"),
        (lambda d: first(d)["keypoints"].__setitem__(0, -2), module.OUTSIDE, 11, "by 2 px"),
        (
            lambda d: first(d)["keypoints"].__setitem__(slice(0, 3), [0, 0, 1]),
            AT_ORIGIN,
            11,
            "1 joints",
        ),
        (repeat_first, module.TWICE, 99, "same image, box and joints"),
        (lambda d: d["images"][1].update(file_name="1.jpg"), module.SAME_IMAGE, None, "1.jpg"),
        (lambda d: d["images"][1].update(crowdIndex=0.5), module.NO_CROWD_INDEX, None, "1 of 2"),
    ],
)
def test_oddity_is_a_note_and_leaves_no_person_out(
    audited: Callable[..., list[Fault]],
    change: Callable[[Document], Any],
    kind: str,
    annotation_id: int | None,
    detail: str,
) -> None:
    (note,) = audited(change)
    assert (note.kind, note.annotation_id, note.is_warning) == (kind, annotation_id, True)
    assert detail in note.detail
    require_few_faults([note], 0, 2)


def test_person_without_joints_is_noted(audited: Callable[..., list[Fault]]) -> None:
    (note,) = audited(lambda d: first(d).update(keypoints=[0] * 15, num_keypoints=0))
    assert (note.kind, note.annotation_id) == (module.NO_LABELS, 11)


@pytest.mark.parametrize("value", [0, -80, float("nan")])
def test_image_without_a_size_is_a_fault(
    audited: Callable[..., list[Fault]], value: float
) -> None:
    found = audited(lambda d: d["images"][0].update(height=value))
    faults = [fault for fault in found if not fault.is_warning]
    assert {fault.annotation_id for fault in faults} == {11}
    assert [fault.kind for fault in faults][:1] == [NO_SIZE]
    assert f"must have its height and width in pixels, got {value:g} and 60" in faults[0].detail
    assert {fault.kind for fault in faults} <= {NO_SIZE, OTHER_SIZE}


def test_official_crowdpose_has_notes_alone(shared: Path) -> None:
    file = shared / "data/crowdpose_tiny/annotations/crowdpose_val.json"
    table = read_table(file, CROWDPOSE)
    assert audit(table, file.parent, verify_images=False) == []
    found = find_notes(table)
    assert all(note.is_warning for note in found)
    document = json.loads(file.read_text())
    differing = [
        person["id"]
        for person in document["annotations"]
        if person["num_keypoints"] != sum(v > 0 for v in person["keypoints"][2::3])
    ]
    noted = [note.annotation_id for note in found if note.kind == module.OTHER_COUNT]
    assert noted == differing


def test_official_coco_names_its_joints_as_the_skeleton_does(shared: Path) -> None:
    file = shared / "data/coco_tiny/annotations/person_keypoints_val2017.json"
    kinds = {note.kind for note in find_notes(read_table(file, COCO))}
    assert kinds <= {module.CROWD, module.NO_LABELS, module.CLIPPED, module.OUTSIDE}


def test_table_has_a_row_per_fault_and_reads_back(tmp_path: Path) -> None:
    found = [
        Fault("b", Path("p/1.jpg"), 7, 3, "torn"),
        Fault("a", Path("x.json"), None, None, "odd", is_warning=True),
        Fault("b", Path("p/1.jpg"), 8, 3, "torn"),
    ]
    file = write_audit(tmp_path / "new/audit/train.parquet", found)
    rows = pq.read_table(file, schema=SCHEMA).to_pylist()
    assert rows[0] == {
        "kind": "b",
        "is_fault": True,
        "file": "p/1.jpg",
        "image_id": 3,
        "annotation_id": 7,
        "detail": "torn",
    }
    assert rows[1]["annotation_id"] is None and rows[1]["is_fault"] is False
    assert list(file.parent.iterdir()) == [file]
    write_audit(file.parent / "val.parquet", [])
    write_audit(file.parent / "overlap.parquet", found[:1])
    assert pq.read_table(file.parent).num_rows == 4  # as pandas reads a folder
