"""Which category's annotations are people, and by which names their joints are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.data import audit, categories
from study.data.annotations import AnnotationTable, read_table
from study.data.audit import Fault, annotation_faults, require_few_faults
from study.data.audit_notes import NO_LABELS, find_notes
from study.data.people import build_people
from study.data.survey import find_skeleton
from study.dataset import main
from study.errors import InputError

FIVE = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
POSETRACK18 = (
    "nose head_bottom head_top left_ear right_ear left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle"
).split()
Category = dict[str, Any]
Write = Callable[..., Path]


def category(number: int, name: str, joints: Any = FIVE) -> Category:
    found = {"id": number, "name": name}
    return found if joints is None else {**found, "keypoints": joints}


def labeled(number: int, category_id: int | None = 1, joints: int = 5) -> dict[str, Any]:
    """A person whose joint j is at 10 + j, 20 + j."""
    record: dict[str, Any] = {
        "id": number,
        "image_id": 1,
        "bbox": [5, 10, 30, 40],
        "keypoints": [value for j in range(joints) for value in (10.0 + j, 20.0 + j, 2)],
    }
    return record if category_id is None else {**record, "category_id": category_id}


def box(number: int, category_id: int) -> dict[str, Any]:
    """An annotation without joints."""
    return {"id": number, "image_id": 1, "bbox": [5, 10, 9, 9], "category_id": category_id}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an annotation file; the categories are last in it, as in COCO's."""

    def run(found: Any, *annotations: dict[str, Any]) -> Path:
        document: dict[str, Any] = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 80, "width": 60}],
            "annotations": annotations or [labeled(7)],
        }
        if found is not None:
            document["categories"] = found
        file = tmp_path / "a.json"
        file.write_text(json.dumps(document))
        return file

    return run


def people_of(table: AnnotationTable) -> list[int]:
    return table.ids[table.is_used].tolist()


def faults_of(table: AnnotationTable) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.annotation_id) for fault in annotation_faults(table)]


def only_fault(table: AnnotationTable) -> Fault:
    (fault,) = annotation_faults(table)
    assert fault.kind == audit.OTHER_JOINTS and fault.annotation_id is None
    with pytest.raises(InputError, match=audit.OTHER_JOINTS):
        build_people(table, table.path.parent)
    return fault


def notes_of(table: AnnotationTable) -> dict[str, str]:
    """Details of the notes about category and joints, by kind."""
    return {n.kind: n.detail for n in find_notes(table) if n.kind in categories.READING}


@pytest.mark.parametrize(
    ("listed", "people"),
    [
        ([category(1, "human")], [1, 3]),
        ([category(0, "person", None), category(1, "human")], [1, 3]),
        ([category(0, "person", []), category(1, "pose"), category(2, "car", None)], [1, 3]),
        ([category(2, "dog"), category(1, "Person")], [1, 3]),
        ([category(9, "hand"), category(1, "pose")], [1, 3]),  # no hand is annotated
        ([category(1, "person"), category(2, "pose")], [1, 3]),
        ([category(2, "person"), category(1, "pose")], [2]),
    ],
)
def test_category_with_joints_is_the_peoples(
    write: Write, five: Skeleton, listed: list[Category], people: list[int]
) -> None:
    others = [labeled(2, 2)] if any(c["id"] == 2 and "keypoints" in c for c in listed) else []
    extra = [] if 2 not in {c["id"] for c in listed} else [box(4, 2)]
    table = read_table(write(listed, labeled(1), *others, labeled(3), *extra), five)
    assert people_of(table) == people
    assert faults_of(table) == []
    number = len(others) + len(extra) if people != [2] else 2
    assert notes_of(table).get(categories.LEFT_OUT, "").startswith(f"{number} of" if extra else "")


def test_annotations_of_other_categories_are_one_note(write: Write, five: Skeleton) -> None:
    listed = [category(1, "pose"), category(2, "car", None), category(3, "person", None)]
    listed += [category(number, f"kind {number}", None) for number in range(4, 99)]
    others = [box(20 + place, number) for place, number in enumerate((4, 5, 6, 7))]
    file = write(listed, labeled(1), box(1, 3), box(2, 2), box(2, 2), *others, box(5, 1))
    table = read_table(file, five)
    assert people_of(table) == [1] and faults_of(table) == []  # ids of cars may be used again
    notes = find_notes(table)
    (left_out,) = [note.detail for note in notes if note.kind == categories.LEFT_OUT]
    assert left_out == (
        "2 of car, 1 of person, 1 of kind 4 and 3 more are left out, people are of pose"
    )
    unlabeled = [n.annotation_id for n in notes if n.kind == NO_LABELS]
    assert unlabeled == [5]


def test_category_is_chosen_by_its_name(write: Write, five: Skeleton) -> None:
    listed = [category(1, "man"), category(2, "Woman"), category(3, "car", None)]
    file = write(listed, labeled(1, 1), labeled(2, 2))
    match = (
        r"must be of one category, .* got several, man \(id 1\), Woman \(id 2\), in .*a\.json; "
        r"set data\.category to the name"
    )
    with pytest.raises(InputError, match=match):
        read_table(file, five)
    assert people_of(read_table(file, five, "man")) == [1]
    assert people_of(read_table(file, five, "woman")) == [2]
    match = r"data\.category=dog, and man \(id 1\), Woman \(id 2\), car \(id 3\) in .*a\.json"
    with pytest.raises(InputError, match=match):
        read_table(file, five, "dog")
    with pytest.raises(InputError, match=r"data\.category=dog, and no categories in"):
        read_table(write(None), five, "dog")


def test_joints_of_a_category_without_joints_are_a_fault_unless_it_is_chosen(
    write: Write, five: Skeleton
) -> None:
    file = write([category(0, "people", None), category(1, "human")], labeled(1, 0), labeled(2))
    table = read_table(file, five)
    (fault,) = annotation_faults(table)
    assert (fault.kind, fault.annotation_id) == (audit.OTHER_CATEGORY, 1)
    assert "must be the person's, 1, got 0 (people, which lists no joints)" in fault.detail
    assert build_people(table, file.parent, leave_out={1}).annotation_ids.tolist() == [2]
    table = read_table(file, five, "people")
    assert people_of(table) == [1] and faults_of(table) == []
    assert notes_of(table).keys() == {categories.NO_NAMES, categories.LEFT_OUT}


def test_labeled_person_of_a_category_that_is_not_listed_is_a_fault(
    write: Write, five: Skeleton
) -> None:
    table = read_table(write([category(1, "person")], labeled(1), labeled(2, 8), box(3, 8)), five)
    assert faults_of(table) == [(audit.OTHER_CATEGORY, 2)]
    table = read_table(write([category(1, "person")], labeled(1), labeled(2, None)), five)
    assert faults_of(table) == [] and people_of(table) == [1, 2]


def test_file_whose_people_are_all_of_another_category_is_refused(
    write: Write, five: Skeleton
) -> None:
    file = write([category(1, "person"), category(2, "car", None)], box(1, 2), box(2, 2))
    with pytest.raises(InputError, match=r"got 2 annotations \(2 of other categories than pers"):
        audit.require_people(read_table(file, five))


@pytest.mark.parametrize(
    "listed",
    [
        [category(1, "person"), category(1, "car", None)],
        [category(1, "person"), category("1", "person", FIVE[::-1])],  # type: ignore[arg-type]
    ],
)
def test_two_categories_of_one_id_are_refused(
    write: Write, five: Skeleton, listed: list[Category]
) -> None:
    with pytest.raises(InputError, match=r"one category|different ids"):
        read_table(write(listed), five)


@pytest.mark.parametrize("listed", ["person", ["person"], [None], {"1": category(1, "person")}])
def test_categories_that_are_no_list_of_objects_are_refused(
    write: Write, five: Skeleton, listed: Any
) -> None:
    file = write(listed)
    with pytest.raises(InputError, match=r"must be a list of objects .* got .* in .*a\.json"):
        read_table(file, five)
    with pytest.raises(InputError, match="must be a list of objects"):
        find_skeleton(file)


def test_category_listed_twice_is_one(write: Write, five: Skeleton) -> None:
    assert people_of(read_table(write([category(1, "person")] * 2), five)) == [7]


@pytest.mark.parametrize("listed", [None, [], {}, [category(1, "person", None)], [{"name": "x"}]])
def test_file_without_names_is_read_as_it_is_with_a_note(
    write: Write, five: Skeleton, listed: Any
) -> None:
    table = read_table(write(listed), five)
    assert people_of(table) == [7] and faults_of(table) == []
    assert notes_of(table) == {categories.NO_NAMES: "read in the order of data.skeleton=five"}
    assert table.keypoints[0, :, 0].tolist() == [10, 11, 12, 13, 14]


def test_joints_are_put_in_order_by_their_names(write: Write, five: Skeleton) -> None:
    names = ["RHand", "left-foot", "Head top", "footRight", "HAND LEFT"]
    crowd = {**labeled(8), "keypoints": [], "iscrowd": 1}
    table = read_table(write([category(1, "x", names)], labeled(7), crowd), five)
    assert faults_of(table) == []
    assert table.keypoints[0, :, 0].tolist() == [12, 14, 10, 11, 13]
    assert table.keypoints[0, :, 1].tolist() == [22, 24, 20, 21, 23]
    assert np.isnan(table.keypoints[1]).all()
    notes = notes_of(table)
    assert notes[categories.OTHER_ORDER] == (
        "read in the order of data.skeleton=five, from RHand, left-foot, Head top, footRight, "
        "HAND LEFT"
    )
    assert (
        "data.skeleton=five: Head top as head, HAND LEFT as left_hand, RHand"
        in (notes[categories.OTHER_NAMES])
    )
    require_few_faults(find_notes(table), 0, 1)


def test_names_in_another_spelling_are_noted(write: Write, five: Skeleton) -> None:
    names = ["Head", "left hand", "RIGHT_HAND", "Left-Foot", "rightFoot"]
    table = read_table(write([category(1, "x", names)]), five)
    expected = "read as those of data.skeleton=five, in another spelling"
    assert notes_of(table) == {categories.OTHER_NAMES: expected}
    assert table.category.changes == []  # so the fingerprint is that of the same names
    assert notes_of(read_table(write([category(1, "x")]), five)) == {}


@pytest.mark.parametrize(
    ("names", "detail"),
    [
        (("skull", *FIVE[1:]), "missing are head; not among them are skull; change data.skeleton"),
        (FIVE[:3], "missing are left_foot, right_foot; not among them are none"),
        ((*FIVE, "tail"), "missing are none; not among them are tail"),
        (("head", "head_top", *FIVE[2:]), "missing are left_hand; not among them are head_top"),
        (("head", "LHand", "left hand", *FIVE[3:]), "different names, got LHand, left hand"),
        (("head", "head", *FIVE[2:]), "different names, got head, head"),
        ((1, 2, 3, 4, 5), r"must be the names of its joints, got '1' among 5"),
        (("1", "2", "3", "4", "5"), r"must be the names of its joints, got '1' among 5"),
        ((None, *FIVE[1:]), r"must be the names of its joints, got 'None' among 5"),
        (("", *FIVE[1:]), r"must be the names of its joints, got '' among 5"),
        ("head,hand", "not among them are head,hand; change"),
        ({"0": "head"}, r"must be the names of its joints, got"),
    ],
)
def test_names_of_other_joints_are_refused_at_any_fraction(
    write: Write, five: Skeleton, names: Any, detail: str
) -> None:
    table = read_table(write([category(1, "pose", names)]), five)
    fault = only_fault(table)
    assert fault.detail.startswith("the category of people is pose; ") and detail in fault.detail
    assert table.keypoints[0, :, 0].tolist() == [10, 11, 12, 13, 14]


def test_posetracks_joints_are_no_cocos(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write([category(1, "person", POSETRACK18)], labeled(7, joints=17))
    fault = only_fault(read_table(file, COCO))
    assert "missing are left_eye, right_eye; not among them are head_bottom, head_top" in (
        fault.detail
    )
    with pytest.raises(SystemExit) as end:
        main([str(file), "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert f"{audit.OTHER_JOINTS}: 1" in printed and "head_bottom" in printed


def test_known_skeleton_is_found_by_the_names(write: Write) -> None:
    names = ["Neck", "Head top", *(name.title() for name in CROWDPOSE.joints[:12])]
    listed = [category(0, "cat", None), category(1, "x", names)]
    assert find_skeleton(write(listed, box(1, 0), labeled(2, joints=14))) is CROWDPOSE
    assert find_skeleton(write(None, labeled(2, joints=17))) is COCO
    dogs = [category(1, "person", COCO.joints), category(2, "dog", ["nose", "tail"])]
    file = write(dogs, labeled(1, 2, joints=2), labeled(2, joints=17))
    assert find_skeleton(file) is COCO
    with pytest.raises(InputError, match=r"got 2 joints in .*a\.json: nose, tail; "):
        find_skeleton(file, "dog")


def test_category_of_dataset_py_is_chosen_by_an_option(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joints = [*COCO.joints[::-1]]
    listed = [category(1, "man", COCO.joints), category(2, "woman", joints)]
    file = write(listed, labeled(1, joints=17), labeled(2, 2, joints=17), labeled(3, 2, joints=17))
    command = [str(file), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*command, "--category", "woman"])
    printed = capsys.readouterr().out
    assert "joints in another order: read in the order of data.skeleton=coco" in printed
    assert "annotations of another category: 1 of man are left out" in printed
    assert "image missing: 2" in printed
    with pytest.raises(SystemExit):
        main(command)
    assert "got several, man (id 1), woman (id 2)" in capsys.readouterr().out
