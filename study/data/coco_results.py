"""COCO result lists: read boxes of a detector and poses of another method, write own poses.

Detections are a JSON list of ``{image_id, category_id, bbox, score}`` with xywh in image pixels,
like the usual ``COCO_val2017_detections_AP_H_56_person.json``. Keypoint results have
``keypoints``, x and y in image pixels and a score for each joint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import SKELETONS, Skeleton, shared_joints
from study.data.annotations import AREA_OF_BOX, LARGEST, PERSON_ID, ImageTable, clip_boxes
from study.data.people import People, find_neighbors
from study.errors import InputError
from study.storage.files import write_atomic

DETECTIONS = "data.val.detections"
LARGEST_NUMBER = 1e9
"""Coordinates and scores must be below it."""
LARGEST_FRACTION = 1.5
"""Largest fraction of an image's size that a method may give to a joint beyond its edge."""
MOST = 0.95
"""Share of joints of a fraction's size from which on all are taken for fractions."""


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """The entries of a result list, or the annotations of a COCO annotation file."""

    path: Path
    entries: list[Any]
    document: dict[str, Any] | None
    """The whole annotation file; None for a result list."""


@dataclasses.dataclass(frozen=True)
class EntryFormat:
    """Keys that every entry must have; ``bbox`` and ``score`` must be valid if present."""

    integers: tuple[str, ...] = ("image_id",)
    optional_integers: tuple[str, ...] = ()
    skeleton: Skeleton | None = None
    """Joints that ``keypoints`` must have; None if they are not read."""
    skeleton_source: str = "as in the first entry"
    """Where the skeleton comes from, as messages call it."""
    needs_box: bool = False
    needs_score: bool = False


def read_results(
    path: Path, setting: str, wanted: str, *, accepts_annotations: bool = False
) -> ResultFile:
    """Read a JSON file of COCO results; ``check_entry`` checks its entries.

    Args:
        setting: setting or option that names the file.
        wanted: what the setting must be, as messages call it.
        accepts_annotations: whether it may also be a COCO annotation file.

    Raises:
        InputError: the file cannot be read, is another kind of JSON, or is an empty list.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{setting} must be {wanted}, got {setting}={path} ({error})") from None
    if isinstance(document, list) and document:
        return ResultFile(path, document, None)
    if accepts_annotations and isinstance(document, dict):
        annotations = document.get("annotations")
        if isinstance(annotations, list):
            return ResultFile(path, annotations, document)
    found = "an empty list" if document == [] else brief(document)
    raise InputError(
        f"{setting} must be {wanted}, with at least one entry, got {found} in {path}; change "
        f"{setting}"
    )


def check_entry(path: Path, place: int, entry: Any, required: EntryFormat) -> None:
    """Check one entry of a result file.

    Raises:
        InputError: a key is missing or has a value of another kind.
    """
    if fault := _fault_in(entry, required):
        raise entry_error(path, place, entry, fault)


def check_ids(path: Path, place: int, entry: Any, required: EntryFormat) -> None:
    """Check that an entry is an object with its integers; other keys may have any value.

    Raises:
        InputError: it is no object, or one of the integers is missing or is no whole number.
    """
    if fault := _id_fault(entry, required):
        raise entry_error(path, place, entry, fault)


def entry_error(path: Path, place: int, entry: Any, fault: str) -> InputError:
    """Return the error for an entry: the file, the entry's number, and what must hold."""
    has_id = isinstance(entry, dict) and "id" in entry
    name = f"entry {place} (from 0)" + (f", annotation {entry['id']}" if has_id else "")
    return InputError(f"{path}, {name}: {fault}; fix or remove it")


def _id_fault(entry: Any, required: EntryFormat) -> str | None:
    if not isinstance(entry, dict):
        return f"must be an object, got {brief(entry)}"
    present = [key for key in required.optional_integers if key in entry]
    for key in (*required.integers, *present):
        value = entry.get(key)
        if not is_whole_number(value):
            bound = " below 2**63" if type(value) is int else ""
            return f"{key} must be a whole number{bound}, got {brief(value)}"
    return None


def _fault_in(entry: Any, required: EntryFormat) -> str | None:
    if fault := _id_fault(entry, required):
        return fault
    if required.skeleton is not None:
        fault = _keypoint_fault(entry.get("keypoints"), required)
        if fault is not None:
            return fault
    box = entry.get("bbox")
    if (box is not None or required.needs_box) and not are_finite(box, 4):
        return f"bbox must be four finite numbers, x, y, width and height, got {brief(box)}"
    if required.needs_score or "score" in entry:
        score = entry.get("score")
        if not are_finite([score], 1):
            return f"score must be a finite number, got {brief(score)}"
    return None


def _keypoint_fault(keypoints: Any, required: EntryFormat) -> str | None:
    assert required.skeleton is not None
    num_joints = required.skeleton.num_joints
    if are_finite(keypoints, 3 * num_joints):
        return None
    found = f"{len(keypoints)}" if isinstance(keypoints, list) else brief(keypoints)
    if isinstance(keypoints, list) and len(keypoints) == 3 * num_joints:
        wrong = next(value for value in keypoints if not are_finite([value], 1))
        found = f"{brief(wrong)} among them"
    return (
        f"keypoints must be {3 * num_joints} finite numbers, x, y and a score for each of "
        f"{num_joints} joints ({required.skeleton_source}: {required.skeleton.name}), got {found}"
    )


def require_pixels(path: Path, keypoints: NDArray[np.float64]) -> None:
    """Check that poses are not all in fractions of the image.

    Args:
        keypoints: x, y and score of the joints of all poses, in any shape.

    Raises:
        InputError: nearly every joint with a score has x and y of a fraction's size.
    """
    joints = keypoints.reshape(-1, 3)
    given = joints[joints[:, :2].any(axis=1) & (joints[:, 2] > 0), :2]
    is_fraction = (np.abs(given) <= LARGEST_FRACTION).all(axis=1)
    if len(given) and is_fraction.mean() >= MOST:
        raise InputError(
            f"{path} must have joints in pixels, got fractions of the image, like "
            f"{given[is_fraction][0].tolist()}; multiply them by the image's width and height"
        )


def skeleton_of(entry: Any, ours: Skeleton) -> Skeleton | None:
    """Return the known skeleton with as many joints as the entry; None if there is none.

    Of several, ours comes first, then those that share joints with ours.
    """
    keypoints = entry.get("keypoints") if isinstance(entry, dict) else None
    count = len(keypoints) if isinstance(keypoints, list) else 0
    known = (ours, *SKELETONS.values())
    fitting = [skeleton for skeleton in known if 3 * skeleton.num_joints == count]
    sharing = [skeleton for skeleton in fitting if shared_joints(ours, skeleton)]
    return next(iter(sharing or fitting), None)


def is_whole_number(value: object) -> bool:
    """Check that this is a whole number that fits into an int64; 3.0 counts, true does not."""
    if isinstance(value, float):
        return value.is_integer() and abs(value) < LARGEST
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def are_finite(values: Any, count: int) -> bool:
    """Check that this is a list of ``count`` numbers that can be pixels or scores."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) for value in values)  # a bool is an int too
        and all(abs(value) < LARGEST_NUMBER for value in values)  # false of NaN
    )


def brief(value: object) -> str:
    """Return the value's ``repr``, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_detections(
    file: Path,
    images: ImageTable,
    image_folder: Path,
    skeleton: Skeleton,
    threshold: float,
    category_id: int = PERSON_ID,
) -> People:
    """Read the people that a detector found, with box scores and without keypoints.

    Boxes of other categories and other images, and those that score below the threshold, are
    left out. Boxes are clipped like labeled ones, and left out if nothing remains (HRNet's reader
    of detections does not clip them). ``annotation_ids`` are places in the file, from 0.

    Args:
        images: images of the annotation file, with their sizes.
        skeleton: joints that will be estimated.
        category_id: category of the people in the annotation file. A file of boxes that all have
            PERSON_ID, as a detector of one category writes them, fits any category.

    Raises:
        InputError: the file is broken, no box remains, or an image is missing.
    """
    found = _read_detection_entries(file)
    rows = {image: row for row, image in enumerate(images.ids.tolist())}
    is_plain = all(entry["category_id"] == PERSON_ID for entry in found)
    chosen = PERSON_ID if is_plain else category_id
    places = np.array(
        [
            place
            for place, entry in enumerate(found)
            if entry["category_id"] == chosen and entry["image_id"] in rows
        ],
        np.int64,
    )
    if not len(places):
        raise InputError(
            f"{DETECTIONS} must hold boxes of people (category_id {chosen}) in the images of "
            f"{images.path}, got none among the {len(found)} of {file}; change {DETECTIONS} or "
            "data.val.annotations"
        )
    image_rows = np.array([rows[found[place]["image_id"]] for place in places])
    scores = np.array([found[place]["score"] for place in places], float)
    boxes = clip_boxes(
        np.array([found[place]["bbox"] for place in places], float), images.sizes[image_rows]
    )
    kept = np.flatnonzero((scores >= threshold) & (boxes[:, 2:] > 0).all(axis=1))
    if not len(kept):
        raise InputError(
            f"{DETECTIONS} must leave a box within its image that scores at least "
            f"data.val.detection_threshold={threshold:g}, got none of {len(places)} in {file} "
            f"with the highest score {scores.max():g}; lower the threshold or change {DETECTIONS}"
        )
    kept = kept[np.argsort(image_rows[kept], kind="stable")]
    boxes, image_rows = boxes[kept], image_rows[kept]
    paths = tuple(image_folder / images.names[row] for row in image_rows)
    _require_images(file, paths)
    image_ids = images.ids[image_rows]
    return People(
        annotation_ids=places[kept],
        image_ids=image_ids,
        source_ids=image_ids,
        boxes=boxes,
        areas=AREA_OF_BOX * boxes[:, 2:].prod(axis=1),
        keypoints_image=np.zeros((len(kept), skeleton.num_joints, 2)),
        visibility=np.zeros((len(kept), skeleton.num_joints), np.uint8),
        neighbors=find_neighbors(boxes, image_rows),
        image_paths=paths,
        annotations=file,
        has_source=False,
        box_scores=scores[kept],
    )


def _read_detection_entries(file: Path) -> list[dict[str, Any]]:
    wanted = "null or a JSON list of COCO detections, relative to data.root"
    entries = read_results(file, DETECTIONS, wanted).entries
    required = EntryFormat(integers=("image_id", "category_id"), needs_box=True, needs_score=True)
    for place, entry in enumerate(entries):
        check_entry(file, place, entry, required)
        if min(entry["bbox"][2:]) < 0:
            fault = f"a bbox's width and height must not be negative, got {entry['bbox']}"
            raise entry_error(file, place, entry, fault)
    return entries


def _require_images(file: Path, paths: Sequence[Path]) -> None:
    missing = next((path for path in dict.fromkeys(paths) if not path.is_file()), None)
    if missing is not None:
        raise InputError(
            f"an image with boxes in {file} must exist, got none at {missing}; put it there, or "
            f"change data.val.images or {DETECTIONS}"
        )


def write_poses(poses: Sequence[dict[str, Any]], file: Path) -> None:
    """Write COCO keypoint results, atomically."""
    write_atomic(file, json.dumps(list(poses)))
