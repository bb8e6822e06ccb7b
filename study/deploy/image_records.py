"""Match a user's images with the images of a file of boxes or poses.

No two images are taken for one entry of the file: what is not plain is refused.
"""

from __future__ import annotations

import collections
import math
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from study.data.coco_results import ResultFile, brief, entry_error, is_whole_number
from study.data.image_files import UPRIGHT
from study.deploy.inputs import GivenImage, first_names, header_of, number_of, warn
from study.errors import InputError

MATCHING = (
    "an annotation file must list them in its 'images'; the entries of a result list must have a "
    "file_name, or as image_id the number that an image's name ends in"
)
"""How images are matched with entries, for messages."""


class ImageRecord(NamedTuple):
    """The id, name and size of an image in a file."""

    id: int
    file_name: str
    size: tuple[float, float] = (0, 0)
    """Height and width, 0 if the file does not name them."""


def match_images(
    results: ResultFile, images: Sequence[GivenImage]
) -> dict[GivenImage, ImageRecord]:
    """Return the record of each image that the file names.

    Images are found by the file names that the file has; without any, by the number that the name
    of an image ends in, which must be the image_id.

    Args:
        results: the file, whose entries have valid image_ids.

    Raises:
        InputError: a record is broken, or an entry may be of two images.
    """
    if results.document is not None:
        records = _document_records(results)
    else:
        records = _entry_records(results)
    if records:
        matched = _match_names(results, records, images)
        _require_own_ids(results, records, matched)
    else:
        matched = _match_numbers(results, images)
    if matched:
        _warn_of_other_ids(results, {record.id for record in records or matched.values()})
    if turned := [
        image.name for image, record in matched.items() if _may_be_turned(image, record)
    ]:
        warn(
            f"{len(turned)} images are turned by their EXIF tag ({first_names(turned)}): "
            f"coordinates in {results.path} must fit the upright image"
        )
    return matched


def _warn_of_other_ids(results: ResultFile, known: set[int]) -> None:
    """Warn of entries whose image_id is none of the known ones."""
    ids = [int(entry["image_id"]) for entry in results.entries]
    if others := [number for number in ids if number not in known]:
        shown = first_names([str(number) for number in sorted(set(others))])
        warn(
            f"{len(others)} of {len(ids)} entries of {results.path} are of none of the images by "
            f"their image_id ({shown})"
        )


def _may_be_turned(image: GivenImage, record: ImageRecord) -> bool:
    """Check for an EXIF tag that turns an image whose size by the file is unknown or square."""
    height, width = record.size
    if all(record.size) and height != width:
        return False
    header = header_of(image)
    return header is not None and header.orientation > UPRIGHT


def _document_records(results: ResultFile) -> list[ImageRecord]:
    """Return the ``images`` of an annotation file, of equal ones the first."""
    assert results.document is not None
    images = results.document.get("images") or []
    if not isinstance(images, list):
        raise InputError(f"'images' of {results.path} must be a list, got {brief(images)}")
    records: dict[tuple[int, str], ImageRecord] = {}
    for place, image in enumerate(images):
        if fault := _record_fault(image):
            raise InputError(f"{results.path}, image {place} (from 0): {fault}; fix or remove it")
        size = (float(image.get("height") or 0), float(image.get("width") or 0))
        record = ImageRecord(int(image["id"]), image["file_name"], size)
        records.setdefault(record[:2], record)
    return list(records.values())


def _record_fault(image: Any) -> str | None:
    if not isinstance(image, dict):
        return f"must be an object, got {brief(image)}"
    if not is_whole_number(image.get("id")):
        return f"id must be a whole number, got {brief(image.get('id'))}"
    name = image.get("file_name")
    if not isinstance(name, str) or not _parts(name):
        return f"file_name must be text, got {brief(name)}"
    for key in ("height", "width"):
        value = image.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            return f"{key} must be a number of pixels, got {brief(value)}"
    return None


def _entry_records(results: ResultFile) -> list[ImageRecord]:
    """Return the image that each entry of a result list names; none if none does."""
    if not any("file_name" in entry for entry in results.entries):
        return []
    records = set()
    for place, entry in enumerate(results.entries):
        name = entry.get("file_name")
        if not isinstance(name, str) or not _parts(name):
            fault = f"must have the file_name of an image, as other entries do, got {brief(name)}"
            raise entry_error(results.path, place, entry, fault)
        records.add(ImageRecord(int(entry["image_id"]), name))
    return sorted(records)


def _match_names(
    results: ResultFile, records: Sequence[ImageRecord], images: Sequence[GivenImage]
) -> dict[GivenImage, ImageRecord]:
    """Match by the end of the path; without any folder that fits, by the name alone."""
    by_name: dict[str, list[ImageRecord]] = {}
    for record in records:
        by_name.setdefault(_parts(record.file_name)[-1], []).append(record)
    candidates = {image: by_name.get(_parts(image.name)[-1], []) for image in images}
    by_path = {
        image: _only(results, image, _longest(image, found)) for image, found in candidates.items()
    }
    matched = _one_image_each(results, by_path)
    if any(len(_parts(record.file_name)) > 1 for record in matched.values()):
        return matched  # the file's folders are those of the images
    taken = set(matched.values())
    by_name_alone = _one_image_each(
        results,
        {
            image: _only(results, image, [record for record in found if record not in taken])
            for image, found in candidates.items()
            if image not in matched
        },
    )
    if by_name_alone:
        image, record = next(iter(by_name_alone.items()))
        warn(
            f"{results.path} names {record.file_name}, which is taken for {image.path} because of "
            f"the same name; so for {len(by_name_alone)} images"
        )
    return matched | by_name_alone


def _longest(image: GivenImage, records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the records that the image's whole path ends in; of several, the longest."""
    folders = {image.path.parent.absolute(), image.path.parent.resolve()}  # differ by a link
    paths = [_parts((folder / image.path.name).as_posix()) for folder in folders]
    ending = [
        record
        for record in records
        if (parts := _parts(record.file_name)) in [path[-len(parts) :] for path in paths]
    ]
    longest = max((len(_parts(record.file_name)) for record in ending), default=0)
    return [record for record in ending if len(_parts(record.file_name)) == longest]


def _only(
    results: ResultFile, image: GivenImage, records: Sequence[ImageRecord]
) -> ImageRecord | None:
    if len(records) > 1:
        names = sorted({record.file_name for record in records})
        found = [record.id for record in records] if len(names) == 1 else names
        raise InputError(
            f"{results.path} must name each image once, got {image.path.name} for the "
            f"{'ids' if len(names) == 1 else 'images'} {found}; give the images different names, "
            "or the folder that these are in"
        )
    return records[0] if records else None


def _one_image_each(
    results: ResultFile, matched: dict[GivenImage, ImageRecord | None]
) -> dict[GivenImage, ImageRecord]:
    """Leave each record one image: of several, the one with just its path in the given folder."""
    images_of: dict[ImageRecord, list[GivenImage]] = {}
    for image, record in matched.items():
        if record is not None:
            images_of.setdefault(record, []).append(image)
    chosen: dict[GivenImage, ImageRecord] = {}
    for record, images in images_of.items():
        exact = [image for image in images if _parts(image.name) == _parts(record.file_name)]
        if len(images) > 1 and len(exact) != 1:
            raise InputError(
                f"{results.path} must tell images of one name apart by their folders, got "
                f"{record.file_name} for {images[0].path} and {images[1].path}; give one of them"
            )
        chosen[(exact if len(images) > 1 else images)[0]] = record
    return chosen


def _require_own_ids(
    results: ResultFile,
    records: Sequence[ImageRecord],
    matched: dict[GivenImage, ImageRecord],
) -> None:
    """Raise if the id of a matched record is also that of another record."""
    names: dict[int, list[str]] = {}
    for record in records:
        names.setdefault(record.id, []).append(record.file_name)
    for record in matched.values():
        if len(names[record.id]) > 1:
            raise InputError(
                f"{results.path} must give each image an id of its own, got id {record.id} for "
                f"{first_names(names[record.id])}; change the ids"
            )


def _match_numbers(
    results: ResultFile, images: Sequence[GivenImage]
) -> dict[GivenImage, ImageRecord]:
    """Match by the number that the name of an image ends in.

    Raises:
        InputError: two images have the number of an entry, or the numbers count from 0.
    """
    named = {int(entry["image_id"]) for entry in results.entries}
    _refuse_places(results, named, images)
    ending: dict[int, list[GivenImage]] = collections.defaultdict(list)
    for image in images:
        if (number := number_of(image)) in named and number is not None:
            ending[number].append(image)
    for number, several in ending.items():
        if len(several) > 1:
            paths = " and ".join(str(image.path) for image in several[:2])
            raise InputError(
                f"an image_id of {results.path} must be the number of one image, got {number}, "
                f"which the names of {paths} both end in; give one of them, or a file that names "
                "its images"
            )
    return {image: ImageRecord(number, image.name) for number, (image,) in ending.items()}


def _refuse_places(results: ResultFile, named: set[int], images: Sequence[GivenImage]) -> None:
    """Raise if the ids seem to be the places of the images, from 0, but their names have no 0."""
    numbers = {number for image in images if (number := number_of(image)) is not None}
    if 0 not in named or 0 in numbers or not numbers:
        return
    if named <= {number - 1 for number in numbers} or named <= set(range(len(images))):
        raise InputError(
            f"an image_id of {results.path} must be the number that an image's name ends in, got "
            f"{first_names([str(number) for number in sorted(named)])} for images from number "
            f"{min(numbers)} on, which seem to count from 0; correct them, or add to each entry "
            "the file_name of its image"
        )


def _parts(name: str) -> tuple[str, ...]:
    """Return folders and name, whatever system wrote them."""
    plain = unicodedata.normalize("NFC", name).replace("\\", "/")
    return tuple(part for part in plain.split("/") if part not in ("", "."))
