"""Boxes of the people in a user's images, from a COCO annotation file or a detector's results."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.data.annotations import PERSON_ID
from study.data.categories import PERSON
from study.data.coco_results import (
    EntryFormat,
    ResultFile,
    brief,
    check_entry,
    check_ids,
    entry_error,
    is_whole_number,
    read_results,
)
from study.deploy.image_records import MATCHING, ImageRecord, match_images
from study.deploy.inputs import GivenImage, first_names, header_of, number_of, warn
from study.errors import InputError

BOX = EntryFormat(integers=(), needs_box=True)
FAR = 0.1
"""How far outside, as a share of its image, a box is probably no box.

None of 11,282 boxes of COCO, CrowdPose and LSPET ends there; with two corners in place of corner
and size 11 % (one person in the middle) to 67 % do."""


@dataclass(frozen=True)
class PersonBoxes:
    """The N people of one image whose poses are wanted."""

    image_id: int
    boxes: NDArray[np.float64] | None
    """xywh in image pixels, (N, 4); None: the whole image is one person."""
    scores: NDArray[np.float64]
    """(N,); 1 if the file has none."""
    image_size: tuple[float, float] = (0, 0)
    """Height and width of the image by the file; 0 if it does not name them."""


def find_people(images: Sequence[GivenImage], boxes: Path | None) -> dict[GivenImage, PersonBoxes]:
    """Return the boxes of the people in each image; warn about images without any."""
    if boxes is None:
        return whole_images(images)
    people = read_boxes(boxes, images)
    if left_out := [image.name for image in images if image not in people]:
        warn(f"{boxes} has no person's box for {first_names(left_out)}; left out")
    return people


def whole_images(images: Sequence[GivenImage]) -> dict[GivenImage, PersonBoxes]:
    """Take each image as one person.

    The ids are the numbers that the names end in. If a name has no number, or two have the same,
    the ids are places in the list, from 1.
    """
    numbers = [number_of(image) for image in images]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(images) + 1))
    return {
        image: PersonBoxes(number or 0, None, np.ones(1))
        for image, number in zip(images, numbers, strict=True)
    }


def read_boxes(file: Path, images: Sequence[GivenImage]) -> dict[GivenImage, PersonBoxes]:
    """Read the people's boxes of each image; skip crowd regions and other categories.

    Args:
        file: a COCO annotation file or COCO detection results, matched by ``match_images``.

    Raises:
        InputError: the file is neither, has a broken entry, may mean two images, counts images or
            categories from 0, or has no box for these images.
    """
    wanted = "a COCO annotation file or a list of COCO detection results"
    results = read_results(file, "--boxes", wanted, accepts_annotations=True)
    listed = listed_categories(results)
    categories = _person_categories(file, listed)
    check_all_ids(results, listed)
    if not listed:
        _refuse_class_0(results)
    records = match_images(results, images)
    known = {record.id for record in records.values()}
    others: collections.Counter[int] = collections.Counter()
    rows: dict[int, list[tuple[list[float], float]]] = {}
    for place, entry in enumerate(results.entries):
        if entry["image_id"] not in known:
            continue
        category = entry.get("category_id", PERSON_ID)
        if "category_id" in entry and category not in categories:
            others[int(category)] += 1
        elif not _is_crowd(file, place, entry):
            check_entry(file, place, entry, BOX)
            box = [float(value) for value in entry["bbox"]]
            rows.setdefault(entry["image_id"], []).append((box, float(entry.get("score", 1.0))))
    left_out = _left_out(others, categories)
    found = _boxes_of(records, rows)
    if not found:
        raise InputError(
            f"{file} must have a person's box for at least one of the {len(images)} images, "
            f"got none, the first being {images[0].name}; {left_out or MATCHING}"
        )
    if left_out:
        warn(f"{file}: {left_out}; left out")
    boxes = np.concatenate([people.boxes for people in found.values() if people.boxes is not None])
    _warn_of_far_boxes(file, found, len(boxes))
    if (np.abs(boxes) <= 1).all():
        raise InputError(
            f"{file} must have boxes in pixels, x, y, width and height, got fractions of the "
            f"image, like {boxes[0].tolist()}; multiply them by the image's size"
        )
    return found


def _warn_of_far_boxes(file: Path, found: dict[GivenImage, PersonBoxes], number: int) -> None:
    """Warn of boxes that lie far outside their image, as two corners read as a size do."""
    far: list[str] = []
    for image, people in found.items():
        size = people.image_size
        if not all(size) and (header := header_of(image)):
            size = header.size_as_read()
        if all(size) and people.boxes is not None:
            stops = (people.boxes[:, :2] + people.boxes[:, 2:]) / size[::-1]
            far += [image.name] * np.count_nonzero((stops > 1 + FAR).any(axis=1))
    if far:
        warn(
            f"{len(far)} of {number} boxes of {file} end far outside their image (the first in "
            f"{far[0]}); bbox must be x, y, width and height in pixels of the image, not two "
            "corners"
        )


def _is_crowd(file: Path, place: int, entry: dict[str, Any]) -> bool:
    value = entry.get("iscrowd") or 0
    if type(value) not in (int, bool, float) or value not in (0, 1):
        fault = f"iscrowd must be 0 or 1, got {brief(entry['iscrowd'])}"
        raise entry_error(file, place, entry, fault)
    return bool(value)


def check_all_ids(results: ResultFile, categories: Sequence[dict[str, Any]]) -> None:
    """Check the ids of images and categories in all entries.

    Args:
        categories: those of the file; with several, each entry must have one.

    Raises:
        InputError: an entry is no object, or has an id that is no whole number.
    """
    required = EntryFormat(
        integers=("image_id", "category_id") if len(categories) > 1 else ("image_id",),
        optional_integers=("category_id",),
    )
    for place, entry in enumerate(results.entries):
        check_ids(results.path, place, entry, required)


def _boxes_of(
    records: dict[GivenImage, ImageRecord], rows: dict[int, list[tuple[list[float], float]]]
) -> dict[GivenImage, PersonBoxes]:
    return {
        image: PersonBoxes(
            record.id,
            np.array([box for box, _ in rows[record.id]]),
            np.array([score for _, score in rows[record.id]]),
            record.size,
        )
        for image, record in records.items()
        if record.id in rows
    }


def _left_out(others: collections.Counter[int], categories: set[int]) -> str:
    """Describe boxes of other categories; empty if there are none."""
    if not others:
        return ""
    ids = first_names([str(category) for category in sorted(others)])
    people = " or ".join(str(category) for category in sorted(categories))
    return (
        f"{others.total()} boxes of these images are not of people (a person's category_id is "
        f"{people}, got {ids})"
    )


def listed_categories(results: ResultFile) -> list[dict[str, Any]]:
    """Return the file's categories, each with an id and a name.

    Raises:
        InputError: a category is broken.
    """
    categories = (results.document or {}).get("categories") or []
    if not isinstance(categories, list):
        raise InputError(
            f"'categories' of {results.path} must be a list, got {brief(categories)}; fix it"
        )
    for place, category in enumerate(categories):
        if fault := _category_fault(category):
            raise InputError(f"{results.path}, category {place} (from 0): {fault}; fix it")
    return categories


def _person_categories(file: Path, categories: Sequence[dict[str, Any]]) -> set[int]:
    """Return the ids of categories named person; otherwise of the only one, or only with joints.

    Without categories it is COCO's.

    Raises:
        InputError: none of several categories is named person.
    """
    if not categories:
        return {PERSON_ID}
    people = {int(c["id"]) for c in categories if c["name"].strip().casefold() == PERSON}
    jointed = {int(c["id"]) for c in categories if c.get("keypoints")}
    if people or len(jointed) == 1:
        return people or jointed
    names = [category["name"] for category in categories]
    if len(categories) > 1:
        raise InputError(
            f"{file} must name the category of people {PERSON!r}, got {first_names(names)}; "
            "rename it"
        )
    warn(f"{file} has the category {names[0]!r} alone, which is taken for people")
    return {int(categories[0]["id"])}


def _refuse_class_0(results: ResultFile) -> None:
    """Raise if an entry has category 0: if classes count from 0, COCO's 1 is no person."""
    if number := sum(entry.get("category_id") == 0 for entry in results.entries):
        raise InputError(
            f"a person's category_id in {results.path} must be {PERSON_ID}, as COCO counts, got "
            f"{number} entries with 0, as of classes that count from 0; change the category_id "
            f"of people to {PERSON_ID} and of others to another number"
        )


def _category_fault(category: Any) -> str | None:
    if not isinstance(category, dict):
        return f"must be an object, got {brief(category)}"
    if not is_whole_number(category.get("id")):
        return f"id must be a whole number, got {brief(category.get('id'))}"
    if not isinstance(category.get("name"), str):
        return f"name must be text, got {brief(category.get('name'))}"
    joints = category.get("keypoints") or []
    if not (isinstance(joints, list) and all(isinstance(joint, str) for joint in joints)):
        return f"keypoints must be a list of joints' names, got {brief(joints)}"
    return None
