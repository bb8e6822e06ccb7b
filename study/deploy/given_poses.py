"""Poses that another method found in a user's images, for the refiner to improve.

They come as a COCO annotation file with keypoints, or as COCO keypoint results: each entry is a
person. Joints are paired with the export's by name: by the names of the file's category, otherwise
by those of the skeleton with as many joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.joint_names import match_joints
from models.skeleton import SKELETONS, Skeleton, shared_joints
from study.data.annotations import clip_boxes
from study.data.coco_results import (
    EntryFormat,
    ResultFile,
    brief,
    check_entry,
    entry_error,
    read_results,
    require_pixels,
    skeleton_of,
)
from study.deploy.image_records import MATCHING, match_images
from study.deploy.inputs import GivenImage, first_names, warn
from study.deploy.person_boxes import check_all_ids, listed_categories
from study.errors import InputError


@dataclass(frozen=True)
class GivenPoses:
    """The entries of a file; those of the user's images are improved."""

    file: Path
    entries: list[dict[str, Any]]
    """All entries of the file, in its order."""
    places: dict[GivenImage, list[int]]
    """Places of each image's entries; images without entries are left out."""
    theirs: Skeleton
    """Joints of the file."""
    ours: Skeleton
    """Joints of the export."""
    sizes: dict[GivenImage, tuple[float, float]] = field(default_factory=dict)
    """Height and width of each image by the file; 0 if it does not name them."""

    def starts(self, image: GivenImage) -> NDArray[np.float64]:
        """Return x, y in image pixels and score of the joints of each entry, (N, K, 3).

        Scores are clipped to 0..1, so that COCO's visibility 1 and 2 count as sure. Score 0 marks
        joints that start from the student's: the file lacks them, or has them at (0, 0) or with
        score 0.
        """
        return np.stack([self._start(self.entries[place]) for place in self.places[image]])

    def _start(self, entry: dict[str, Any]) -> NDArray[np.float64]:
        given = np.reshape(np.asarray(entry["keypoints"], float), (-1, 3))
        start = np.zeros((self.ours.num_joints, 3))
        for own, other in shared_joints(self.ours, self.theirs):
            x, y, score = given[other]
            if x or y:
                start[own] = x, y, min(max(score, 0.0), 1.0)
        return start

    def boxes(
        self, image: GivenImage, starts: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """Return xywh in image pixels of each entry, clipped to the image, (N, 4).

        An entry without ``bbox`` has the box of its joints. The crop later shows a quarter more,
        as it does for every box.

        Args:
            starts: result of ``starts`` for the image.
            size: height and width of the image.

        Raises:
            InputError: an entry has no box and no joints, or its box lies outside the image.
        """
        boxes = []
        for place, start in zip(self.places[image], starts, strict=True):
            entry = self.entries[place]
            box = _box_of(start) if entry.get("bbox") is None else entry["bbox"]
            clipped = clip_boxes(np.array([box], float), np.array([size]))[0]
            if (clipped[2:] <= 0).any():
                fault = (
                    f"must have a bbox, or joints, that cover a part of {image.name} of {size[1]} "
                    f"x {size[0]} pixels, got x, y, width and height "
                    f"{[round(float(value), 1) for value in box]}"
                )
                raise entry_error(self.file, place, entry, fault)
            boxes.append(clipped)
        return np.stack(boxes)

    def scores(self, image: GivenImage) -> NDArray[np.float64]:
        """Return the score of each entry, (N,) in 0..1; 1 if the file has none."""
        given = [self.entries[place].get("score", 1.0) for place in self.places[image]]
        return np.clip(np.array(given, float), 0, 1)

    def put(
        self,
        image: GivenImage,
        starts: NDArray[np.float64],
        keypoints_image: NDArray[np.float64],
        scores: NDArray[np.float64],
    ) -> None:
        """Put the image's improved poses (N, K, 2) into its entries; keep all other keys.

        A given joint keeps its third number; another joint gets its score of (N, K).
        """
        pairs = shared_joints(self.ours, self.theirs)
        for row, place in enumerate(self.places[image]):
            entry = self.entries[place]
            third = scores[row].copy()
            for own, other in pairs:
                if starts[row, own, 2] > 0:
                    third[own] = entry["keypoints"][3 * other + 2]
            keypoints = np.column_stack((keypoints_image[row], third)).ravel().tolist()
            self.entries[place] = {**entry, "keypoints": keypoints}


def _box_of(start: NDArray[np.float64]) -> list[float]:
    """Return xywh of the joints with a score, of zero size if there are none."""
    joints = start[start[:, 2] > 0, :2]
    if not len(joints):
        return [0.0, 0.0, 0.0, 0.0]
    low, high = joints.min(0), joints.max(0)
    return [*low, *(high - low)]


def read_poses(file: Path, images: Sequence[GivenImage], ours: Skeleton) -> GivenPoses:
    """Read the poses; warn about images without poses and about entries that stay as they are.

    Args:
        ours: skeleton of the export.

    Raises:
        InputError: an entry is broken, or no entry is of these images.
    """
    wanted = "a COCO annotation file or a list of COCO keypoint results"
    results = read_results(file, "--poses", wanted, accepts_annotations=True)
    entries = results.entries
    categories = listed_categories(results)
    if not entries or not isinstance(entries[0], dict):
        raise _unknown_skeleton(file, entries, ours)
    check_all_ids(results, categories)
    posed = _places_of_poses(entries, categories)
    theirs = _check_poses(results, posed, _named_skeleton(results, categories, ours), ours)
    records = match_images(results, images)
    image_of = {record.id: image for image, record in records.items()}
    places: dict[GivenImage, list[int]] = {}
    for place in posed:
        if (number := entries[place]["image_id"]) in image_of:
            places.setdefault(image_of[number], []).append(place)
    if not places:
        raise InputError(
            f"{file} must have a pose in at least one of the {len(images)} images, got none, "
            f"the first being {images[0].name}; {MATCHING}"
        )
    found = [entries[place]["keypoints"] for listed in places.values() for place in listed]
    require_pixels(file, np.array(found, float))
    if empty := [image.name for image in images if image not in places]:
        warn(f"{file} has no pose in {first_names(empty)}; left out")
    if others := len(posed) - sum(map(len, places.values())):
        warn(f"{file}: {others} entries are of other images; kept as they are")
    if others := len(entries) - len(posed):
        warn(f"{file}: {others} entries are of categories without joints; kept as they are")
    sizes = {image: records[image].size for image in places}
    return GivenPoses(file, list(entries), places, theirs, ours, sizes)


def _check_poses(
    results: ResultFile, posed: Sequence[int], named: Skeleton | None, ours: Skeleton
) -> Skeleton:
    """Return the skeleton of the file's poses, which all have its joints.

    Args:
        posed: places of the poses in the file.
        named: the joints that the file names, if it does.
    """
    source = "those that the file's category names" if named else EntryFormat.skeleton_source
    theirs = named or skeleton_of(results.entries[posed[0]] if posed else None, ours)
    if theirs is None or not shared_joints(ours, theirs):
        raise _unknown_skeleton(results.path, results.entries, ours)
    required = EntryFormat(skeleton=theirs, skeleton_source=source)
    for place in posed:
        check_entry(results.path, place, results.entries[place], required)
    return theirs


def _places_of_poses(
    entries: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]]
) -> list[int]:
    """Return the places of all entries, or of those in categories with joints if there are any."""
    with_joints = {category["id"] for category in categories if category.get("keypoints")}
    return [
        place
        for place, entry in enumerate(entries)
        if not with_joints or len(categories) == 1 or entry["category_id"] in with_joints
    ]


def _named_skeleton(
    results: ResultFile, categories: Sequence[dict[str, Any]], ours: Skeleton
) -> Skeleton | None:
    """Return the joints that the file names, in its order; None if it names none.

    Names that mean one of our joints in another spelling are replaced by ours.

    Raises:
        InputError: the categories of the entries have different joints.
    """
    used = {entry.get("category_id") for entry in results.entries}
    named = {
        tuple(category["keypoints"])
        for category in categories
        if category.get("keypoints") and (len(categories) == 1 or category["id"] in used)
    }
    if len(named) > 1:
        raise InputError(
            f"{results.path} must have poses of one category with joints, got several lists of "
            "joints; write one file for each"
        )
    if not named:
        return None
    joints = list(named.pop())
    for joint, place in zip(ours.joints, match_joints(joints, ours.joints).places, strict=True):
        if place is not None:
            joints[place] = joint
    if not set(joints) & set(ours.joints):
        raise InputError(
            f"{results.path} must have joints of the export, {first_names(ours.joints)}, got "
            f"{first_names(joints)} in its category; rename them"
        )
    return Skeleton(
        name="the file's",
        joints=tuple(joints),
        edges=(),
        flip_pairs=(),
        oks_sigmas=(1.0,) * len(joints),
        upper_body=(),
    )


def _unknown_skeleton(file: Path, entries: Sequence[Any], ours: Skeleton) -> InputError:
    first = entries[0] if entries else None
    keypoints = first.get("keypoints") if isinstance(first, dict) else None
    found = len(keypoints) if isinstance(keypoints, list) and keypoints else brief(first)
    sizes = {skeleton.name: 3 * skeleton.num_joints for skeleton in (ours, *SKELETONS.values())}
    known = " or ".join(f"{size} ({name})" for name, size in sizes.items())
    return InputError(
        f"{file}, entry 0 (from 0): must be an object whose keypoints are x, y and a score for "
        f"each joint, {known} numbers, got {found}; change --poses"
    )
