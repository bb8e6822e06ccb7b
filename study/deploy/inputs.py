"""Images that a user gives to ``predict.py``, and boxes of the people in them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.data.annotations import PERSON, PERSON_ID
from study.data.coco_results import (
    EntryFormat,
    ResultFile,
    brief,
    check_entry,
    entry_error,
    read_results,
)
from study.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Endings of the files in a folder that count as images."""
RESULTS = "keypoints.json"
"""Result list, written beside the drawn images."""
BOX = EntryFormat(integers=(), needs_box=True)
MATCHING = (
    "an annotation file must list them in its 'images', a result list must have as image_id the "
    "number that an image's name ends in"
)
"""How images are matched with entries, for messages."""


@dataclass(frozen=True)
class PersonBoxes:
    """The N people of one image whose poses are wanted."""

    image_id: int
    boxes: NDArray[np.float64] | None
    """xywh in image pixels, (N, 4); None: the whole image is one person."""
    scores: NDArray[np.float64]
    """(N,); 1 if the file has none."""


def find_images(given: Iterable[Path]) -> list[Path]:
    """Return the files, and the image files of the folders, each once.

    Raises:
        InputError: a file is missing, or a folder holds no image.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
            if not inside:
                raise InputError(
                    f"a folder must hold images ({' '.join(SUFFIXES)}), got none in {path}"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"an image must exist, got {path}; correct its path")
    return list({path.resolve(): path for path in found}.values())


def check_targets(images: Sequence[Path], boxes: Path | None, out: Path) -> None:
    """Check that no output file would overwrite an input or another output.

    Raises:
        InputError: two images have the same name, or an output would overwrite an input.
    """
    by_stem: dict[str, Path] = {}
    for image in images:
        other = by_stem.setdefault(image.stem, image)
        if other is not image:
            raise InputError(
                f"images must have different names, got {other} and {image}, which would "
                f"both be drawn to {out / image.stem}.jpg; give one of them another --out"
            )
    inputs = {path.resolve() for path in images}
    if boxes is not None:
        inputs.add(boxes.resolve())
    for target in (out / RESULTS, *(out / f"{stem}.jpg" for stem in by_stem)):
        if target.resolve() in inputs:
            raise InputError(
                f"inputs must not be overwritten, got --out {out}, where {target.name} is one of "
                "the inputs; give another folder by --out"
            )


def find_people(
    images: Sequence[Path], boxes: Path | None
) -> tuple[list[Path], dict[Path, PersonBoxes]]:
    """Return the images with people and the people's boxes; warn about images without any."""
    if boxes is None:
        return list(images), whole_images(images)
    people = read_boxes(boxes, images)
    left_out = [image.name for image in images if image not in people]
    if left_out:
        warn(f"{boxes} has no person's box for {first_names(left_out)}; left out")
    return [image for image in images if image in people], people


def whole_images(images: Sequence[Path]) -> dict[Path, PersonBoxes]:
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


def read_boxes(file: Path, images: Sequence[Path]) -> dict[Path, PersonBoxes]:
    """Read the people's boxes of each image; skip crowd regions and other categories.

    Args:
        file: a COCO annotation file, whose ``images`` name the images; or COCO detection
            results, whose ``image_id`` is the number that an image's name ends in.

    Raises:
        InputError: the file is neither, has a broken box, or has no box for these images.
    """
    wanted = "a COCO annotation file or a list of COCO detection results"
    results = read_results(file, "--boxes", wanted, accepts_annotations=True)
    categories = _person_categories(results.document or {})
    ids = ids_of(results, images)
    known = {number for number in ids.values() if number is not None}
    rows: dict[int, list[tuple[list[float], float]]] = {}
    for place, entry in enumerate(results.entries):
        if not isinstance(entry, dict) or "image_id" not in entry:
            fault = f"must be an object with an image_id, got {brief(entry)}"
            raise entry_error(file, place, entry, fault)
        is_person = entry.get("category_id", PERSON_ID) in categories and not entry.get("iscrowd")
        if is_person and entry["image_id"] in known:
            check_entry(file, place, entry, BOX)
            box = [float(value) for value in entry["bbox"]]
            rows.setdefault(entry["image_id"], []).append((box, float(entry.get("score", 1.0))))
    found = {
        image: PersonBoxes(
            number,
            np.array([box for box, _ in rows[number]]),
            np.array([score for _, score in rows[number]]),
        )
        for image, number in ids.items()
        if number is not None and number in rows
    }
    if not found:
        raise InputError(
            f"{file} must have a person's box for at least one of the {len(images)} images, "
            f"got none, the first being {images[0].name}; {MATCHING}"
        )
    return found


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr)


def first_names(names: Sequence[str]) -> str:
    """Return the first five names as text, and the number of the others."""
    more = f" and {len(names) - 5} more" if names[5:] else ""
    return f"{', '.join(names[:5])}{more}"


def number_of(image: Path) -> int | None:
    """Return the number that the image's name ends in: 785 of 000000000785.jpg."""
    digits = re.search(r"\d+$", image.stem)
    return int(digits.group()) if digits else None


def ids_of(results: ResultFile, images: Sequence[Path]) -> dict[Path, int | None]:
    """Return the id of each image in a result file; None if the file does not name it.

    In a result list it is the number that the image's name ends in. In an annotation file it
    is the id of that file name, or the number if the file names no images.

    Raises:
        InputError: an annotation file names an image more than once.
    """
    named: dict[str, list[int]] = {}
    for image in _records((results.document or {}).get("images")):
        named.setdefault(Path(str(image.get("file_name"))).name, []).append(image.get("id", -1))
    if not named:
        return {path: number_of(path) for path in images}
    ids: dict[Path, int | None] = {}
    for path in images:
        numbers = named.get(path.name, [])
        if len(numbers) > 1:
            raise InputError(
                f"{results.path} must name each image once, got {path.name} for the ids "
                f"{numbers}; give the images different names"
            )
        ids[path] = numbers[0] if numbers else None
    return ids


def _person_categories(document: Mapping[str, Any]) -> set[Any]:
    """Return the ids of categories named person; of all if none is; COCO's if there are none."""
    categories = list(_records(document.get("categories")))
    people = {category.get("id") for category in categories if category.get("name") == PERSON}
    return people or {category.get("id") for category in categories} or {PERSON_ID}


def _records(value: object) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a value that should be a list of them."""
    if isinstance(value, list):
        yield from (record for record in value if isinstance(record, dict))
