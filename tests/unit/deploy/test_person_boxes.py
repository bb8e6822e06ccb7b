"""Boxes that a file has: those of people, of the right kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from study.deploy.inputs import GivenImage
from study.deploy.person_boxes import find_people, read_boxes
from study.errors import InputError

IMAGES = [GivenImage(Path(name), name) for name in ("7.jpg", "8.jpg")]
PERSON, DOG = {"id": 4, "name": "person"}, {"id": 1, "name": "dog"}


def entry(**changes: Any) -> dict[str, Any]:
    found = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5} | changes
    return {key: value for key, value in found.items() if value != "absent"}


def read(folder: Path, *entries: dict[str, Any], categories: Any = None) -> list[float]:
    """The left edges of the boxes of image 7 in a list, or with categories in an annotation file.

    Args:
        categories: those of the file; None for a list.
    """
    file = folder / "boxes.json"
    names = [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    document = {"images": names, "categories": categories, "annotations": entries}
    file.write_text(json.dumps(entries if categories is None else document))
    boxes = read_boxes(file, IMAGES)[IMAGES[0]].boxes
    assert boxes is not None
    return boxes[:, 0].tolist()


def test_boxes_of_other_categories_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(), entry(category_id=3), entry(category_id=3), entry(category_id=2)]
    assert read(tmp_path, *entries, entry(image_id=9, category_id=5)) == [1]
    warning = capsys.readouterr().err
    assert "3 boxes of these images are not of people" in warning
    assert "category_id is 1, got 2, 3); left out" in warning


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([DOG, PERSON], [4]),
        ([{"id": 4, "name": " Person "}, DOG], [4]),
        ([PERSON, {"id": 2, "name": "person"}, DOG], [4, 2]),
        ([{"id": 3, "name": "rider"}], [3]),
        ([{"id": 3, "name": "rider", "keypoints": ["head"]}, DOG], [3]),
        ([], [1]),
    ],
)
def test_category_named_person_is_the_persons(
    categories: Any, expected: list[int], tmp_path: Path
) -> None:
    entries = [entry(category_id=n, bbox=[n, 2, 30, 40]) for n in (4, 3, 2, 1)]
    assert read(tmp_path, *entries, categories=categories) == expected


def test_only_category_of_another_name_is_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read(tmp_path, entry(category_id=3), categories=[{"id": 3, "name": "rider"}])
    assert "has the category 'rider' alone, which is taken for people" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([DOG, {"id": 2, "name": "cat"}], "the category of people 'person', got dog, cat; rename"),
        ([{"id": [4], "name": "person"}], r"category 0 \(from 0\): id must be .* got \[4\]"),
        ([PERSON, {"id": 4, "name": None}], r"category 1 \(from 0\): name must be text, got None"),
        ([PERSON, 3], r"category 1 \(from 0\): must be an object, got 3"),
        ({"person": 1}, r"'categories' of .* must be a list, got \{'person': 1\}"),
    ],
)
def test_broken_categories_are_named(categories: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, entry(), categories=categories)


WRONG = ([1], {"a": 1}, True, "1", None, 1.5, 1e300, float("nan"), 2**63, -(2**70))


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_entry_with_an_id_that_is_no_whole_number_is_named(
    key: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"entry 1 \(from 0\): {key} must be a whole number"):
        read(tmp_path, entry(), entry(**{key: value}))


def test_whole_floats_count_as_whole_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, entry(image_id=7.0, category_id=1.0)) == [1]


def test_category_may_be_absent_if_the_file_has_only_people(tmp_path: Path) -> None:
    assert read(tmp_path, entry(category_id="absent")) == [1]
    assert read(tmp_path, entry(category_id="absent"), categories=[PERSON]) == [1]
    with pytest.raises(InputError, match="category_id must be a whole number, got None"):
        read(tmp_path, entry(category_id="absent"), categories=[PERSON, DOG])


def test_file_with_other_categories_alone_is_refused_with_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got none.* category_id is 1, got 3\)"):
        read(tmp_path, entry(category_id=3))


def test_results_with_a_category_0_are_refused_unless_the_file_names_its_categories(
    tmp_path: Path,
) -> None:
    for others in ([], [entry()]):
        with pytest.raises(InputError, match="must be 1, as COCO counts, got 1 entries with 0"):
            read(tmp_path, entry(category_id=0), *others)
    named = [{"id": 0, "name": "person"}, DOG]
    boxes = [entry(category_id=0, bbox=[5, 2, 30, 40]), entry()]
    assert read(tmp_path, *boxes, categories=named) == [5]


def test_crowd_regions_are_skipped_if_they_are_marked_plainly(tmp_path: Path) -> None:
    for mark in (1, True, 1.0):
        assert read(tmp_path, entry(iscrowd=mark, bbox=[9, 9, 9, 9]), entry(iscrowd=0)) == [1]
    for mark in ("0", [1], 2, float("nan")):
        with pytest.raises(InputError, match=r"entry 0 \(from 0\): iscrowd must be 0 or 1, got"):
            read(tmp_path, entry(iscrowd=mark))
    assert read(tmp_path, entry(iscrowd=None), entry(iscrowd=False)) == [1, 1]


def test_boxes_as_fractions_of_the_image_are_refused(tmp_path: Path) -> None:
    fractions = [entry(bbox=[0.1, 0.2, 0.5, 1.0]), entry(bbox=[0, 0.3, 0.2, 0.4])]
    with pytest.raises(InputError, match=r"boxes in pixels, .* like \[0\.1, 0\.2, 0\.5, 1\.0\]"):
        read(tmp_path, *fractions)
    assert read(tmp_path, *fractions, entry()) == [0.1, 0, 1]


@pytest.mark.parametrize("key", ["bbox", "score"])
def test_booleans_are_no_numbers(key: str, tmp_path: Path) -> None:
    value = [True, True, True, True] if key == "bbox" else True
    with pytest.raises(InputError, match=rf"entry 0 \(from 0\): {key} must be"):
        read(tmp_path, entry(**{key: value}))


def test_images_without_boxes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([entry()]))
    assert list(find_people(IMAGES, file)) == IMAGES[:1]
    assert "no person's box for 8.jpg; left out" in capsys.readouterr().err
