"""Every fault that data can have ends in one clear message with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from models.skeleton import CROWDPOSE, Skeleton
from study.data import audit as module
from study.data.annotations import read_table
from study.data.audit import Fault, audit, faulty_ids, require_few_faults
from study.data.image_files import BROKEN_IMAGE, MISSING_IMAGE, image_problem
from study.data.people import People, build_people
from study.errors import InputError

FIVE = Skeleton("five", tuple("abcde"), ((0, 1),), ((1, 2),), (0.1,) * 5, (0,))
IMAGE = np.random.RandomState(0).randint(0, 256, (80, 60, 3), np.uint8)
Change = Callable[[dict[str, Any]], None]


def jpeg() -> bytes:
    return cv2.imencode(".jpg", IMAGE)[1].tobytes()


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Annotation file and image folder of three images and four people without faults."""
    images = tmp_path / "images"
    images.mkdir()
    for number in (1, 2, 3):
        (images / f"{number}.jpg").write_bytes(jpeg())
    keypoints = [value for j in range(5) for value in (10.0 + j, 20.0 + j, 2)]
    people = [
        {
            "id": 10 + i,
            "image_id": image_id,
            "bbox": [5, 10, 30, 40],
            "area": 600,
            "iscrowd": 0,
            "num_keypoints": 5,
            "keypoints": list(keypoints),
        }
        for i, image_id in enumerate((1, 1, 2, 3))
    ]
    images_of_file = [
        {"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 60} for i in (1, 2, 3)
    ]
    annotations = tmp_path / "people.json"
    annotations.write_text(json.dumps({"images": images_of_file, "annotations": people}))
    return annotations, images


def change_person(data: tuple[Path, Path], **changes: Any) -> list[Fault]:
    """The faults after a change of annotation 11."""
    document = json.loads(data[0].read_text())
    document["annotations"][1].update(changes)
    data[0].write_text(json.dumps(document))
    return audited(data)


def audited(data: tuple[Path, Path], skeleton: Skeleton = FIVE, **options: Any) -> list[Fault]:
    return audit(read_table(data[0], skeleton), data[1], **options)


def people_of(data: tuple[Path, Path], skeleton: Skeleton = FIVE, **options: Any) -> People:
    return build_people(read_table(data[0], skeleton), data[1], **options)


def refused(data: tuple[Path, Path], match: str) -> None:
    """Both the audit and the reader end in that message."""
    with pytest.raises(InputError, match=match):
        audited(data)
    with pytest.raises(InputError, match=match):
        people_of(data)


def test_sound_data_have_no_faults(data: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    assert audited(data, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (3, 3)
    assert len(people_of(data)) == 4


def test_missing_data_folder_is_named(data: tuple[Path, Path], tmp_path: Path) -> None:
    refused(
        (tmp_path / "nowhere/a.json", data[1]),
        r"data folder must exist, got .*nowhere; .*data\.root",
    )


def test_missing_annotation_file_is_named(data: tuple[Path, Path], tmp_path: Path) -> None:
    refused(
        (tmp_path / "none.json", data[1]),
        r"annotation file must exist, got .*none\.json; .*data\.",
    )


def test_missing_image_folder_is_named(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder of the images must exist, got .*none; .*images"):
        audited((data[0], tmp_path / "none"))


def test_broken_json_is_refused_with_line_and_column(data: tuple[Path, Path]) -> None:
    data[0].write_text('{"images": [],\n "annotations": [')
    refused(data, r"valid JSON, got .* at line 2, column 18 of .*people\.json")


def test_file_that_is_no_text_is_refused(data: tuple[Path, Path]) -> None:
    data[0].write_bytes(jpeg())
    refused(data, r"must be JSON text, got other bytes in .*people\.json")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_file_is_refused(
    data: tuple[Path, Path], compress: Callable[[bytes], bytes]
) -> None:
    data[0].write_bytes(compress(data[0].read_bytes()))
    refused(data, r"must be JSON text, got a compressed file, .*people\.json; unpack it first")


@pytest.mark.parametrize(
    "document", [[], {}, {"images": []}, {"annotations": []}, {"images": {}, "annotations": []}]
)
def test_json_without_the_two_lists_is_refused(data: tuple[Path, Path], document: Any) -> None:
    data[0].write_text(json.dumps(document))
    refused(data, r"COCO's format, .* got no list '(images|annotations)' in .*people\.json")


@pytest.mark.parametrize(
    ("records", "key", "value"),
    [
        ("annotations", "id", "x"),
        ("annotations", "image_id", None),
        ("annotations", "image_id", 10**30),
        ("annotations", "area", 10**400),
        ("annotations", "area", [3]),
        ("annotations", "iscrowd", 0.5),
        ("images", "id", None),
        ("images", "width", "60"),
    ],
)
def test_record_without_its_number_is_refused_with_its_place(
    data: tuple[Path, Path], records: str, key: str, value: object
) -> None:
    document = json.loads(data[0].read_text())
    document[records][1][key] = value
    data[0].write_text(json.dumps(document))
    refused(
        data, rf"must have an? (integer|number) '{key}', got .* 1 \(from 0\) of the {records} of"
    )


def test_record_that_is_no_object_and_image_without_name_are_refused(
    data: tuple[Path, Path],
) -> None:
    document = json.loads(data[0].read_text())
    data[0].write_text(json.dumps({**document, "annotations": ["text"]}))
    refused(data, r"got text as number 0 \(from 0\) of the annotations of .*people\.json")
    data[0].write_text(json.dumps({**document, "annotations": [5]}))
    refused(data, r"got 5 as number 0 \(from 0\) of the annotations of .*people\.json")
    for name in (None, "2\0.jpg", "2\udcff.jpg"):
        document["images"][2]["file_name"] = name
        data[0].write_text(json.dumps(document))
        refused(data, r"must have a 'file_name', got .* number 2 .*people\.json")


@pytest.mark.parametrize(
    ("text", "reason"), [("[" * 100_000, "recursion"), ("[" + "1" * 5000 + "]", "4300 digits")]
)
def test_json_that_python_cannot_hold_is_refused(
    data: tuple[Path, Path], text: str, reason: str
) -> None:
    data[0].write_text('{"images": ' + text)
    refused(data, rf"one that can be read, got .*{reason}.* in .*people\.json")


def test_keypoints_of_the_wrong_length_name_the_setting(data: tuple[Path, Path]) -> None:
    faults = audited(data, CROWDPOSE)
    assert [fault.annotation_id for fault in faults] == [10, 11, 12, 13]
    match = (
        r"(?s)got 4 of 4:\n.*wrong length: 4\n.*people\.json, annotation 10: .* skeleton's 14 "
        r"joints, got 15 numbers \(5 joints\); change data\.skeleton.*and 1 more\n"
        r"fix the files or change data\.root$"
    )
    with pytest.raises(InputError, match=match):
        require_few_faults(faults, 0.5, 4)
    with pytest.raises(InputError, match=match):
        people_of(data, CROWDPOSE)


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"keypoints": [1, 2, 2]}, module.WRONG_LENGTH, "got 3 numbers"),
        ({"keypoints": [float("nan"), 1, 2] * 5}, module.NOT_FINITE, "NaN"),
        ({"keypoints": [float("inf"), 1, 2] * 5}, module.NOT_FINITE, "infinity"),
        ({"keypoints": ["a", 1, 2] * 5}, module.NOT_FINITE, "text"),
        ({"keypoints": [5, 5, 3] * 5}, module.WRONG_VISIBILITY, r"\[3.0\]"),
        ({"keypoints": [5, 5, 0.5] * 5}, module.WRONG_VISIBILITY, r"\[0.5\]"),
        ({"keypoints": [68.5, 5, 2] * 5}, module.JOINT_OUTSIDE, "8.5 px beyond .* 80 px high"),
        ({"keypoints": [5, -9, 1] * 5}, module.JOINT_OUTSIDE, "9 px beyond"),
        ({"keypoints": ["5", "5", "2"] * 5}, module.NOT_FINITE, "text"),
        ({"keypoints": [10**400, 1, 2] * 5}, module.NOT_FINITE, "NaN"),
        ({"keypoints": None}, module.WRONG_LENGTH, "got 0 numbers"),
        ({"bbox": [5, 5, 0, 20]}, module.ZERO_BOX, r"\[5.0, 5.0, 0.0, 20.0\] covers nothing"),
        ({"bbox": [5, 5, 20, 0], "area": 0}, module.ZERO_BOX, "covers nothing"),
        ({"bbox": [70, 5, 20, 20]}, module.ZERO_BOX, "covers nothing of its image"),
        ({"bbox": [1, 2, 3]}, module.WRONG_BOX, "x, y, width, height"),
        ({"bbox": None}, module.WRONG_BOX, "bbox"),
        ({"bbox": ["5", "5", "20", "20"]}, module.WRONG_BOX, "bbox"),
        ({"bbox": [1, 2, 3, float("inf")]}, module.WRONG_BOX, "bbox"),
        ({"image_id": 77}, module.UNKNOWN_IMAGE, "must have id 77 once"),
    ],
)
def test_fault_of_one_person_is_listed_with_its_annotation(
    data: tuple[Path, Path], changes: dict[str, Any], kind: str, detail: str
) -> None:
    faults = change_person(data, **changes)
    assert [(fault.kind, fault.annotation_id) for fault in faults] == [(kind, 11)]
    with pytest.raises(InputError, match=rf"{kind}: 1\n.*people\.json, annotation 11: .*{detail}"):
        require_few_faults(faults, 0, 4)
    with pytest.raises(InputError, match="annotation 11"):
        people_of(data)
    people = people_of(data, leave_out=faulty_ids(faults))
    assert people.annotation_ids.tolist() == [10, 12, 13]


def test_each_annotation_of_a_duplicate_id_is_a_fault(data: tuple[Path, Path]) -> None:
    faults = change_person(data, id=13)
    assert [(f.kind, f.annotation_id) for f in faults] == [(module.DUPLICATE_ID, 13)] * 2
    assert "2 annotations have this id" in faults[0].detail
    with pytest.raises(InputError, match=r"got 2 of 4:(?s:.*)annotation 13"):
        require_few_faults(faults, 0.49, 4)


def test_image_that_stands_twice_in_the_file_is_a_fault_of_its_people(
    data: tuple[Path, Path],
) -> None:
    document = json.loads(data[0].read_text())
    document["images"].append({**document["images"][0], "file_name": "other.jpg"})
    data[0].write_text(json.dumps(document))
    faults = audited(data)
    assert [(f.kind, f.annotation_id) for f in faults] == [
        (module.UNKNOWN_IMAGE, 10),
        (module.UNKNOWN_IMAGE, 11),
    ]


def test_joint_a_few_pixels_outside_is_no_fault(data: tuple[Path, Path]) -> None:
    assert change_person(data, keypoints=[-7, 20, 1] * 5) == []


def test_faults_of_people_that_official_readers_skip_do_not_count(data: tuple[Path, Path]) -> None:
    assert change_person(data, iscrowd=1, bbox=[0, 0, 0, 0]) == []
    assert change_person(data, iscrowd=0, num_keypoints=0, keypoints=[1, 2]) == []


@pytest.mark.parametrize(
    "images", [[], [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 6}]]
)
def test_file_without_a_labeled_person_is_refused(
    data: tuple[Path, Path], images: list[dict[str, Any]]
) -> None:
    keypoints: list[int] = [0] * 15
    people = [
        {"id": 1, "image_id": 1, "bbox": [0, 0, 5, 5], "keypoints": keypoints},
        {"id": 2, "image_id": 1, "bbox": [0, 0, 5, 5]},
        {"id": 3, "image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    ]
    data[0].write_text(json.dumps({"images": images, "annotations": people}))
    refused(
        data,
        r"at least one person with a labeled joint, got 3 annotations \(1 crowd regions, 0 with "
        r"labeled joints, 0 left out for their faults\) in .*people\.json",
    )
    data[0].write_text(json.dumps({"images": images, "annotations": []}))
    refused(data, "got 0 annotations")


def test_leaving_everyone_out_is_refused(data: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="4 with labeled joints, 4 left out for their faults"):
        people_of(data, leave_out={10, 11, 12, 13})


def test_missing_image_is_named_with_each_of_its_people(data: tuple[Path, Path]) -> None:
    (data[1] / "1.jpg").unlink()
    faults = audited(data)
    assert [(f.kind, f.annotation_id, f.image_id) for f in faults] == [
        (MISSING_IMAGE, 10, 1),
        (MISSING_IMAGE, 11, 1),
    ]
    with pytest.raises(InputError, match=r"image missing: 2\n.*images/1\.jpg, annotation 10"):
        require_few_faults(faults, 0, 4)
    assert audited(data, verify_images=False) == []


def test_image_that_nobody_is_in_may_be_missing(data: tuple[Path, Path]) -> None:
    (data[1] / "2.jpg").unlink()
    document = json.loads(data[0].read_text())
    document["annotations"][2]["iscrowd"] = 1
    data[0].write_text(json.dumps(document))
    assert audited(data) == []


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", [".jpg", ".png", "progressive", "with thumbnail"])
def test_truncated_image_is_a_fault(data: tuple[Path, Path], kind: str, share: float) -> None:
    whole = encode(kind)
    assert len(whole) > 1000
    image = data[1] / "3.jpg"
    image.write_bytes(whole)
    assert audited(data) == []
    image.write_bytes(whole[: int(share * len(whole))])
    (fault,) = audited(data)
    assert (fault.kind, fault.file, fault.annotation_id) == (BROKEN_IMAGE, image, 13)


def encode(kind: str) -> bytes:
    if kind == "progressive":
        return cv2.imencode(".jpg", IMAGE, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    if kind == "with thumbnail":  # a whole JPEG inside the header of another
        small = cv2.imencode(".jpg", IMAGE[:16, :16])[1].tobytes()
        size = (len(small) + 2).to_bytes(2, "big")
        return b"\xff\xd8\xff\xe1" + size + small + jpeg()[2:]
    return cv2.imencode(kind, IMAGE)[1].tobytes()


def test_image_padded_with_zeros_after_an_interrupted_copy_is_a_fault(tmp_path: Path) -> None:
    whole = jpeg()
    (tmp_path / "a.jpg").write_bytes(whole[:2000].ljust(len(whole), b"\0"))
    problem = image_problem(tmp_path / "a.jpg")
    assert problem is not None and "no end-of-image marker" in problem[1]


@pytest.mark.parametrize("kind", [".jpg", ".png", ".bmp", ".webp"])
@pytest.mark.parametrize("tail", [b"", b"\0" * 40, b"written by a camera"])
def test_whole_image_of_any_kind_passes_with_bytes_after_its_end(
    tmp_path: Path, kind: str, tail: bytes
) -> None:
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(kind, IMAGE)[1].tobytes() + tail)
    assert image_problem(tmp_path / "a.jpg") is None


def test_file_that_is_no_image_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "b.jpg").mkdir()
    for name, detail in (("a.jpg", "can be decoded"), ("b.jpg", "cannot be read")):
        problem = image_problem(tmp_path / name)
        assert problem is not None and detail in problem[1]


def fault(number: int, *, is_warning: bool = False) -> Fault:
    return Fault("some kind", Path("a.json"), number, 1, "detail", is_warning)


def test_faults_up_to_the_fraction_are_let_through_and_no_further() -> None:
    faults = [fault(1), fault(1), fault(2)]  # two people
    require_few_faults(faults, 0.02, 100)
    with pytest.raises(
        InputError, match=r"(?s)got 2 of 100:.*data\.max_bad_fraction=0\.02 to leave"
    ):
        require_few_faults(faults, 0.0199, 100)
    require_few_faults([], 0, 0)


def test_warnings_stop_nothing_and_leave_nobody_out() -> None:
    require_few_faults([fault(1, is_warning=True)], 0, 1)
    assert faulty_ids([fault(1, is_warning=True), fault(2)]) == {2}
