"""The images that a user gives, and the people to look at in them: boxes of a COCO file."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from study.errors import InputError

PERSON = 1
"""COCO's number of the category, where a file names none."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""What counts as an image in a folder."""
RESULTS = "keypoints.json"
"""What is written beside the drawn images."""


@dataclass(frozen=True)
class PersonBoxes:
    """The N people to look at in one image."""

    image_id: int
    boxes: NDArray[np.float64] | None
    """xywh in image pixels, (N, 4); None: the whole image is one person."""
    scores: NDArray[np.float64]
    """(N,); 1 where the file has none."""


def find_images(given: Iterable[Path]) -> list[Path]:
    """The files, and those of the folders that are images by name, each once.

    Raises:
        InputError: one is not there, or nothing is.
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
            raise InputError(f"an image must exist to be looked at, got {path}; correct its path")
    return list({path.resolve(): path for path in found}.values())


def check_targets(images: Sequence[Path], boxes: Path | None, out: Path) -> None:
    """Returns if what is to be written lies beside what is read, each image by its own name.

    Raises:
        InputError: two images have one name, or an input would be written over.
    """
    by_stem: dict[str, Path] = {}
    for image in images:
        other = by_stem.setdefault(image.stem, image)
        if other is not image:
            raise InputError(
                f"images must have names of their own, got {other} and {image}, which would "
                f"both be drawn to {out / image.stem}.jpg; give one of them another --out"
            )
    inputs = {path.resolve() for path in (*images, *((boxes,) if boxes else ()))}
    for target in (out / RESULTS, *(out / f"{stem}.jpg" for stem in by_stem)):
        if target.resolve() in inputs:
            raise InputError(
                f"what is read must not be written over, got --out {out}, in which {target.name} "
                "is one of the inputs; give another folder by --out"
            )


def find_people(
    images: Sequence[Path], boxes: Path | None
) -> tuple[list[Path], dict[Path, PersonBoxes]]:
    """The images with anybody in them, and whom; warns of the others."""
    if boxes is None:
        return list(images), whole_images(images)
    people = read_boxes(boxes, images)
    left_out = [image.name for image in images if image not in people]
    if left_out:
        more = f" and {len(left_out) - 5} more" if left_out[5:] else ""
        warn(f"{boxes} has no person's box for {', '.join(left_out[:5])}{more}; left out")
    return [image for image in images if image in people], people


def whole_images(images: Sequence[Path]) -> dict[Path, PersonBoxes]:
    """Each image as one person.

    The ids are the numbers that the names end in, or, if not all have one of their own, places in
    the list from 1.
    """
    numbers = [number_of(image) for image in images]
    if None in numbers or len(set(numbers)) < len(numbers):
        numbers = list(range(1, len(images) + 1))
    return {
        image: PersonBoxes(number or 0, None, np.ones(1))
        for image, number in zip(images, numbers, strict=True)
    }


def read_boxes(file: Path, images: Sequence[Path]) -> dict[Path, PersonBoxes]:
    """The people of each image that has any, crowd regions and other categories left out.

    Args:
        file: a COCO annotation file, whose ``images`` name the images; or COCO detection
            results, whose ``image_id`` is the number that an image's name ends in.

    Raises:
        InputError: it is neither, or has a broken box or none at all for these images.
    """
    document = load_document(file, "--boxes")
    if isinstance(document, list):
        entries, is_person = document, {PERSON}
    else:
        entries, is_person = document["annotations"], _person_categories(document)
    ids = ids_of(file, document, images)
    wanted = {number for number in ids.values() if number is not None}
    rows: dict[int, list[tuple[list[float], float]]] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise InputError(f"{file}: entry {place} must have an image_id, got {short(entry)}")
        is_taken = entry.get("category_id", PERSON) in is_person and not entry.get("iscrowd")
        if is_taken and entry["image_id"] in wanted:
            rows.setdefault(entry["image_id"], []).append(_box(file, place, entry))
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
            f"got none, the first being {images[0].name}; its 'images' must name them, or, in "
            "detection results, image_id be the number that an image's name ends in"
        )
    return found


def warn(text: str) -> None:
    """A line for the user, apart from what is printed as the result."""
    print(f"warning: {text}", file=sys.stderr)


def number_of(image: Path) -> int | None:
    """The number that the image's name ends in: 785 of 000000000785.jpg."""
    digits = re.search(r"\d+$", image.stem)
    return int(digits.group()) if digits else None


def load_document(file: Path, option: str) -> Any:
    """A COCO annotation file, or a list of results.

    Args:
        option: what the user gave it by.

    Raises:
        InputError: it is neither.
    """
    try:
        document = json.loads(file.read_bytes())
    except OSError:
        what = option.removeprefix("--")
        raise InputError(f"the file of {what} must exist, got {file}; change {option}") from None
    except ValueError as error:
        raise InputError(f"{file} must be JSON, got what can't be parsed: {error}") from None
    is_annotations = isinstance(document, dict) and isinstance(document.get("annotations"), list)
    if not is_annotations and not isinstance(document, list):
        raise InputError(
            f"{file} must be a COCO annotation file or a list of COCO detection results, "
            f"got {short(document)}; change {option}"
        )
    return document


def ids_of(file: Path, document: Any, images: Sequence[Path]) -> dict[Path, int | None]:
    """Each image's id: in results the number that its name ends in, else by its file name."""
    if isinstance(document, list):
        return {image: number_of(image) for image in images}
    return _ids_by_name(file, document, images)


def _person_categories(document: Mapping[str, Any]) -> set[Any]:
    categories = list(_records(document.get("categories"))) or [{"name": "person", "id": PERSON}]
    people = {category.get("id") for category in categories if category.get("name") == "person"}
    return people or {category.get("id") for category in categories}


def _records(value: object) -> Iterator[dict[str, Any]]:
    """The JSON objects of what ought to be a list of them."""
    if isinstance(value, list):
        yield from (record for record in value if isinstance(record, dict))


def _ids_by_name(
    file: Path, document: Mapping[str, Any], pictures: Sequence[Path]
) -> dict[Path, int | None]:
    """Each image's id by its file name; None where the file does not name it."""
    named: dict[str, list[int]] = {}
    for image in _records(document.get("images")):
        named.setdefault(Path(str(image.get("file_name"))).name, []).append(image.get("id", -1))
    if not named:
        return {picture: number_of(picture) for picture in pictures}
    ids: dict[Path, int | None] = {}
    for picture in pictures:
        numbers = named.get(picture.name, [])
        if len(numbers) > 1:
            raise InputError(
                f"{file} must name each image once, got {picture.name} for the ids {numbers}; "
                "give the images names of their own"
            )
        ids[picture] = numbers[0] if numbers else None
    return ids


def _box(file: Path, place: int, entry: Mapping[str, Any]) -> tuple[list[float], float]:
    box, score = entry.get("bbox"), entry.get("score", 1.0)
    if not _is_box(box) or not _is_number(score):
        which = f"annotation {entry['id']}" if "id" in entry else f"entry {place}"
        raise InputError(
            f"{file}: {which} must have a bbox of four numbers, x y width height, and no score "
            f"but a number, got bbox={short(box)}, score={short(score)}; correct or drop it"
        )
    return [float(value) for value in box], float(score)


def _is_box(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: object) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
