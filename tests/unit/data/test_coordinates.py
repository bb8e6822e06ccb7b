"""Boxes and joints in another unit or order than the format's are found and named."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.skeleton import COCO, CROWDPOSE, Skeleton
from study.data.annotations import AnnotationTable, clip_boxes, read_table
from study.data.audit import (
    AT_ORIGIN,
    LABELED_CROWD,
    NO_AREA,
    NO_COUNT,
    UNSEEN,
    ZERO_BOX,
    annotation_faults,
    require_few_faults,
    require_people,
)
from study.data.audit_notes import UPSIDE_DOWN, find_notes
from study.data.coordinates import (
    CENTERED,
    EXCHANGED,
    FAR_LARGER_BOX,
    FRACTION_BOX,
    FRACTION_JOINTS,
    FROM_BELOW,
    KEPT,
    NOT_IN_BOX,
    OTHER_AREA,
    OTHER_SCALE,
    RELATIVE_JOINTS,
    SAME_BOX,
    SAME_PLACE,
    coordinate_checks,
)
from study.errors import InputError

Numbers = NDArray[np.float64]
CORNERS = "box that looks like two corners"


@pytest.fixture(scope="module")
def table(shared: Path) -> AnnotationTable:
    """58 people of COCO."""
    folder = shared / "data/coco_tiny/annotations"
    return read_table(folder / "person_keypoints_val2017.json", COCO)


def changed(
    table: AnnotationTable,
    box: Callable[[Numbers, Numbers], Numbers] = lambda box, size: box,
    joints: Callable[[Numbers, Numbers, Numbers], Numbers] = lambda points, box, size: points,
) -> AnnotationTable:
    """The table with other numbers.

    Args:
        box: from boxes (N, 4) and the images' width and height (N, 2).
        joints: from x and y (N, K, 2), boxes (N, 1, 4) and the images' size (N, 1, 2).
    """
    sizes = table.image_sizes[:, ::-1]
    boxes = box(table.boxes, sizes)
    keypoints = table.keypoints.copy()
    keypoints[..., :2] = joints(keypoints[..., :2], table.boxes[:, None], sizes[:, None])
    return dataclasses.replace(
        table,
        boxes=boxes,
        clipped_boxes=clip_boxes(boxes, table.image_sizes),
        keypoints=keypoints,
    )


def corners(box: Numbers, size: Numbers) -> Numbers:
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def centered(box: Numbers, size: Numbers) -> Numbers:
    return np.concatenate([box[:, :2] + box[:, 2:] / 2, box[:, 2:]], axis=1)


def fractions(box: Numbers, size: Numbers) -> Numbers:
    return box / np.tile(size, 2)


def found(table: AnnotationTable) -> dict[str, int]:
    """The number of faults of each kind."""
    kinds = [fault.kind for fault in annotation_faults(table)]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize(
    ("box", "kind", "text"),
    [
        (corners, CORNERS, "fits its joints as x1, y1, x2, y2; write x, y, width, height"),
        (centered, CENTERED, "fits its joints as center x, center y, width, height"),
        (fractions, FRACTION_BOX, "are fractions of the image; write pixels"),
        (lambda b, s: fractions(centered(b, s), s), FRACTION_BOX, "fractions of the image"),
        (lambda b, s: b[:, [1, 0, 3, 2]], EXCHANGED, "if x and y of one of them are exchanged"),
        (
            lambda b, s: corners(b, s)[:, [0, 2, 1, 3]],
            "box that looks like x1, x2, y1, y2",
            "as x1, x2, y1, y2",
        ),
        (
            lambda b, s: corners(b, s)[:, [1, 0, 3, 2]],
            "box that looks like y1, x1, y2, x2",
            "as y1, x1, y2, x2",
        ),
    ],
)
def test_boxes_in_another_format_are_named(
    table: AnnotationTable, box: Callable[[Numbers, Numbers], Numbers], kind: str, text: str
) -> None:
    wrong = changed(table, box=box)
    faults = [fault for fault in annotation_faults(wrong) if fault.kind == kind]
    assert len(faults) == 58
    shown = [fault for fault in faults if fault.detail != "as those of most people in the file"]
    assert len(shown) > 35 and all(text in fault.detail for fault in shown)
    with pytest.raises(InputError, match=f"{kind}: 58\n"):
        require_few_faults(annotation_faults(wrong), 0.99, wrong.num_people)


@pytest.mark.parametrize(
    ("joints", "kind", "text"),
    [
        (lambda p, b, s: p / s, FRACTION_JOINTS, "fractions of the image; write image pixels"),
        (
            lambda p, b, s: (p - b[..., :2]) / b[..., 2:],
            FRACTION_JOINTS,
            "fractions of the box; write image pixels",
        ),
        (lambda p, b, s: p - b[..., :2], RELATIVE_JOINTS, "if the box's corner is added"),
        (lambda p, b, s: p[..., ::-1], EXCHANGED, "if x and y of one of them are exchanged"),
        (lambda p, b, s: s - p, NOT_IN_BOX, "its joints are in x "),
    ],
)
def test_joints_in_another_unit_are_named(
    table: AnnotationTable,
    joints: Callable[[Numbers, Numbers, Numbers], Numbers],
    kind: str,
    text: str,
) -> None:
    faults = [f for f in annotation_faults(changed(table, joints=joints)) if f.kind == kind]
    shown = [fault for fault in faults if fault.detail != "as those of most people in the file"]
    assert len(shown) > 30 and all(text in fault.detail for fault in shown)


def test_fraction_boxes_are_not_called_empty_too(table: AnnotationTable) -> None:
    kinds = found(changed(table, box=fractions))
    assert kinds == {FRACTION_BOX: 58}
    both = changed(table, box=fractions, joints=lambda p, b, s: p / s)
    assert found(both) == {FRACTION_BOX: 58, FRACTION_JOINTS: 58}
    assert found(changed(table, box=lambda b, s: b * 0)) == {ZERO_BOX: 58}


def test_pixels_of_smaller_images_are_found(table: AnnotationTable) -> None:
    half = changed(table, box=lambda b, s: b / 2, joints=lambda p, b, s: p / 2)
    assert found(half)[OTHER_SCALE] == 1
    most = changed(table, box=lambda b, s: b * 0.8, joints=lambda p, b, s: p * 0.8)
    assert OTHER_SCALE not in found(most)


@pytest.mark.parametrize("scale", [100, 500])
def test_percent_of_the_image_is_found(table: AnnotationTable, scale: float) -> None:
    percent = changed(
        table,
        box=lambda box, size: scale * fractions(box, size),
        joints=lambda points, box, size: scale * points / size,
    )
    fault = annotation_faults(percent)[0]
    is_small = scale < 0.5 * table.image_sizes[table.is_used].min()
    assert (fault.kind == OTHER_SCALE) == is_small
    if is_small:
        assert fault.annotation_id is None and "none of 58 that reaches beyond" in fault.detail


def test_box_far_larger_than_the_joints_is_found(table: AnnotationTable) -> None:
    def gather(points: Numbers, box: Numbers, size: Numbers) -> Numbers:
        return box[..., :2] + box[..., 2:] / 2 + (points - box[..., :2]) / 100

    assert found(changed(table, joints=gather))[FAR_LARGER_BOX] > 30


@pytest.mark.parametrize("factor", [1e-6, 0.005, 10])
def test_area_that_cannot_be_the_person_s_is_found(table: AnnotationTable, factor: float) -> None:
    wrong = dataclasses.replace(table, areas=table.areas * factor)
    assert found(wrong) == {OTHER_AREA: 58}
    (fault, *_) = annotation_faults(wrong)
    assert "area must be square pixels, or left out, got " in fault.detail


def test_area_of_the_box_itself_is_no_fault(table: AnnotationTable) -> None:
    boxes = table.boxes[:, 2] * table.boxes[:, 3]
    assert found(dataclasses.replace(table, areas=boxes)) == {}
    assert found(table) == {}


def without_area(table: AnnotationTable, is_zero: NDArray[np.bool_]) -> AnnotationTable:
    areas = np.where(is_zero, 0, table.areas)
    return dataclasses.replace(table, areas=areas, is_used=table.is_used & (areas > 0))


def test_area_of_zero_is_a_fault_of_many_and_a_note_of_one(table: AnnotationTable) -> None:
    used = np.flatnonzero(table.is_used)
    half = without_area(table, np.isin(np.arange(len(table.ids)), used[:29]))
    assert found(half) == {NO_AREA: 29}
    assert NO_AREA not in {note.kind for note in find_notes(half)}
    one = without_area(table, np.isin(np.arange(len(table.ids)), used[:1]))
    assert found(one) == {}
    assert [n.annotation_id for n in find_notes(one) if n.kind == NO_AREA] == [table.ids[used[0]]]


def test_boxes_of_another_source_are_faults_of_those_people(table: AnnotationTable) -> None:
    third = np.flatnonzero(table.is_used)[::3]

    def some(box: Numbers, size: Numbers) -> Numbers:
        is_changed = np.isin(np.arange(len(box)), third)[:, None]
        return np.where(is_changed, corners(box, size), box)

    faults = annotation_faults(changed(table, box=some))
    assert {fault.kind for fault in faults} == {CORNERS}
    assert {fault.annotation_id for fault in faults} <= set(table.ids[third].tolist())
    assert len(faults) > 10


def test_one_person_of_many_is_an_oddity(table: AnnotationTable) -> None:
    first = np.flatnonzero(table.is_used)[0]
    boxes = table.boxes.copy()
    boxes[first, :2] = (0, 0) if boxes[first, 0] > 200 else (400, 300)
    odd = dataclasses.replace(table, boxes=boxes)
    assert found(odd) == {}
    notes = [note.annotation_id for note in find_notes(odd) if note.kind == NOT_IN_BOX]
    assert notes == [table.ids[first]]


@pytest.mark.parametrize("place", [0, -1])
def test_missing_joints_labeled_at_the_origin_are_named_as_such(
    table: AnnotationTable, place: int
) -> None:
    keypoints = table.keypoints.copy()
    keypoints[table.is_used, 15:] = (place, place, 1)  # the ankles of everyone
    assert found(dataclasses.replace(table, keypoints=keypoints)) == {AT_ORIGIN: 58}
    one = table.keypoints.copy()
    one[np.flatnonzero(table.is_used)[0], 15:] = (place, place, 1)
    odd = dataclasses.replace(table, keypoints=one)
    assert found(odd) == {}
    assert [note.kind for note in find_notes(odd)].count(AT_ORIGIN) == 1


def test_one_box_for_several_people_is_a_fault_of_many(table: AnnotationTable) -> None:
    whole = changed(table, box=lambda box, size: np.concatenate([0 * size, size], axis=1))
    images = table.image_ids[table.is_used].tolist()
    num_alike = sum(images.count(image) > 1 for image in images)
    assert num_alike > 20 and found(whole)[SAME_BOX] == num_alike
    details = [f.detail for f in annotation_faults(whole) if f.kind == SAME_BOX]
    assert details[0].endswith("; write each person's own")
    assert int(details[0].split()[0]) == images.count(int(details[0].split()[4]))
    same = dataclasses.replace(
        whole, keypoints=np.broadcast_to(whole.keypoints[0], (len(whole.ids), 17, 3))
    )
    assert SAME_BOX not in found(same)  # annotated twice, which is a note


@pytest.mark.parametrize(("count", "is_fault"), [(3, True), (2, False)])
def test_joints_at_one_place_are_a_fault(
    table: AnnotationTable, count: int, is_fault: bool
) -> None:
    keypoints = table.keypoints.copy()
    used, some = table.is_used, slice(14, 14 + count)
    keypoints[used, some, :2] = table.boxes[used, None, :2] + 0.5
    keypoints[used, some, 2] = 1
    wrong = dataclasses.replace(table, keypoints=keypoints)
    assert found(wrong) == ({SAME_PLACE: 58} if is_fault else {})
    if is_fault:
        (fault, *_) = annotation_faults(wrong)
        x, y = table.boxes[table.is_used][0, :2] + 0.5
        assert fault.detail.startswith(f"3 labeled joints are at {x:g}, {y:g}; write 0, 0, 0")
    one = np.where(
        np.arange(len(table.ids))[:, None, None] == np.flatnonzero(table.is_used)[0],
        keypoints,
        table.keypoints,
    )
    odd = dataclasses.replace(table, keypoints=one)
    assert found(odd) == {}
    assert [note.kind for note in find_notes(odd)].count(SAME_PLACE) == is_fault


def turned_over(table: AnnotationTable, is_turned: NDArray[np.bool_]) -> AnnotationTable:
    """The table with y of these people (N,) counted from the bottom of the image."""
    height = table.image_sizes[:, :1]

    def box(box: Numbers, size: Numbers) -> Numbers:
        below = np.stack([box[:, 0], height[:, 0] - box[:, 1] - box[:, 3], *box.T[2:]], axis=1)
        return np.where(is_turned[:, None], below, box)

    turned = changed(table, box=box)
    y = np.where(is_turned[:, None], height - table.keypoints[..., 1], table.keypoints[..., 1])
    turned.keypoints[..., 1] = np.where(table.keypoints[..., 2] > 0, y, 0)
    return turned


def test_y_counted_from_the_bottom_is_a_fault(table: AnnotationTable) -> None:
    turned = turned_over(table, np.ones(len(table.ids), bool))
    assert found(turned) == {FROM_BELOW: 47}  # the others show head or legs alone
    (fault, *_) = annotation_faults(turned)
    assert "; 47 of 47 people are upside down; y must be counted from the top" in fault.detail
    few = np.flatnonzero(table.is_used)[:15]
    is_used = np.isin(np.arange(len(table.ids)), few)
    assert found(dataclasses.replace(turned, is_used=is_used)) == {}
    other = dataclasses.replace(table.skeleton, joints=tuple("abcdefghijklmnopq"))
    assert FROM_BELOW not in found(dataclasses.replace(turned, skeleton=other))


def test_people_half_of_whom_are_upside_down_are_a_note(table: AnnotationTable) -> None:
    shows = np.flatnonzero(table.is_used & (table.keypoints[:, 11:, 2] > 0).any(axis=1))
    turned = turned_over(table, np.isin(np.arange(len(table.ids)), shows[:30]))
    assert found(turned) == {}
    (note,) = [note for note in find_notes(turned) if note.kind == UPSIDE_DOWN]
    assert note.detail.startswith("30 of 47 people are upside down; ")
    assert UPSIDE_DOWN not in {note.kind for note in find_notes(table)}


def with_visibility(table: AnnotationTable, new: list[int]) -> AnnotationTable:
    """The table with visibility 0, 1, 2 exchanged for these; unlabeled joints are at 0, 0."""
    keypoints = table.keypoints.copy()
    keypoints[..., 2] = np.array(new)[keypoints[..., 2].astype(int)]
    is_seen = (keypoints[..., 2] > 0).any(axis=1)
    return dataclasses.replace(table, keypoints=keypoints, is_used=table.is_used & is_seen)


@pytest.mark.parametrize("new", [[0, 0, 2], [0, 0, 1], [0, 1, 0]])
def test_labels_lost_to_visibility_0_are_a_fault(table: AnnotationTable, new: list[int]) -> None:
    wrong = with_visibility(table, new)
    is_lost = (table.keypoints[..., 2] > 0) & (wrong.keypoints[..., 2] == 0)
    lost = is_lost[wrong.is_used].any(axis=1).sum()
    assert lost > 10 and found(wrong)[KEPT] == lost
    (fault, *_) = [one for one in annotation_faults(wrong) if one.kind == KEPT]
    assert "such joints have coordinates; write 2 for visible joints, 1 for hid" in fault.detail


def test_coordinates_of_all_joints_are_a_note_if_all_visibilities_occur(
    table: AnnotationTable,
) -> None:
    keypoints = table.keypoints.copy()
    places = (
        table.boxes[:, None, :2] + table.boxes[:, None, 2:] * np.linspace(0.4, 0.6, 17)[:, None]
    )
    is_kept = (keypoints[..., 2:] == 0) & table.is_used[:, None, None]
    keypoints[..., :2] = np.where(is_kept, places, keypoints[..., :2])
    kept = dataclasses.replace(table, keypoints=keypoints)
    assert found(kept) == {}
    (note,) = [n for n in find_notes(kept) if n.kind == KEPT and n.annotation_id is None]
    num_people = (table.keypoints[table.is_used, :, 2] == 0).any(axis=1).sum()
    assert note.is_warning and note.detail.startswith(f"{num_people} of 58 people have them; ")
    kept.keypoints[..., 2] = np.minimum(kept.keypoints[..., 2], 1)  # only 0 and 1
    assert found(kept) == {KEPT: num_people}


@pytest.mark.parametrize(
    ("changes", "kind", "advice"),
    [
        ({"area": 0}, NO_AREA, "leave area out, or write the person's square pixels"),
        ({"num_keypoints": 0}, NO_COUNT, "leave num_keypoints out, or correct it"),
        ({"iscrowd": 1}, LABELED_CROWD, "write iscrowd 0 for one person"),
        ({"keypoints": [9, 9, 0] * 17}, UNSEEN, "write visibility 1 or 2 for labeled joints"),
    ],
)
def test_reason_why_people_with_joints_are_skipped_is_named(
    shared: Path, tmp_path: Path, changes: dict[str, Any], kind: str, advice: str
) -> None:
    source = shared / "data/coco_tiny/annotations/person_keypoints_val2017.json"
    document = json.loads(source.read_text())
    people = [one for one in document["annotations"] if one["num_keypoints"]]
    assert len(people) == 58
    file = tmp_path / "a.json"

    def read() -> AnnotationTable:
        file.write_text(json.dumps(document))
        return read_table(file, COCO)

    people[0].update(changes)
    assert found(read()) == {}  # of one person it is none
    for person in people[:18]:
        person.update(changes)
    table = read()
    assert (table.num_people, found(table)) == (40, {kind: 18})
    for person in people[18:]:
        person.update(changes)
    with pytest.raises(InputError, match=f"{kind}: 58; {advice}"):
        require_people(read())


def test_numbers_near_the_largest_are_checked_without_a_warning(table: AnnotationTable) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = changed(table, box=lambda box, size: box * 1e305)
        assert NOT_IN_BOX in found(huge) or FAR_LARGER_BOX in found(huge)


@pytest.mark.parametrize("name", ["lspet_crowd/annotations/lspet_crowd_val", "crowdpose_val"])
def test_official_files_have_no_such_fault(shared: Path, name: str) -> None:
    folder = "crowdpose_tiny/annotations/" if name == "crowdpose_val" else ""
    real = read_table(shared / f"data/{folder}{name}.json", CROWDPOSE)
    assert found(real) == {}
    wrong = found(changed(real, box=corners))
    assert wrong == {CORNERS: real.num_people}


def test_upper_bodies_show_the_order_too(table: AnnotationTable) -> None:
    keypoints = table.keypoints.copy()
    keypoints[:, 11:] = 0  # hips and legs are not labeled
    keypoints[:, :5] = 0  # nor is the head
    upper = dataclasses.replace(table, keypoints=keypoints)
    assert found(upper) == {}
    assert found(changed(upper, box=corners))[CORNERS] > 10


def test_two_joints_do_not_show_where_a_person_is(table: AnnotationTable) -> None:
    eye = table.keypoints[:, 1:2]
    keypoints = np.concatenate([eye, eye + np.where(eye[..., 2:] > 0, (1, 1, 0), 0)], axis=1)
    two = Skeleton("eyes", ("left_eye", "right_eye"), (), ((0, 1),), (0.1,) * 2, ())
    eyes = dataclasses.replace(table, keypoints=keypoints, skeleton=two)
    assert (eyes.boxes[eyes.is_used, 2:] > 20 * 2**0.5).any()
    assert [kind for kind, _, _ in coordinate_checks(eyes)] == []
