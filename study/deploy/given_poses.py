"""Poses that another method has found in a user's images, for the refiner to improve.

A COCO annotation file with keypoints, or a list of COCO keypoint results: each entry is a person.
Its skeleton is told by its number of joints; joints are paired with the export's by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import SKELETONS, Skeleton, shared_joints
from study.data.annotations import clip_boxes
from study.data.coco_results import are_finite
from study.deploy.inputs import ids_of, load_document, short, warn
from study.errors import InputError


@dataclass(frozen=True)
class GivenPoses:
    """The entries of a file, those of whole images to be improved."""

    file: Path
    entries: list[dict[str, Any]]
    """All of the file, in its order."""
    places: dict[Path, list[int]]
    """Each image's entries; images without one are left out."""
    theirs: Skeleton
    """Of the entries' keypoints."""
    ours: Skeleton
    """Of the poses to come."""

    def starts(self, image: Path) -> NDArray[np.float64]:
        """x, y in image pixels and score of each entry's joints, (N, K, 3).

        A score is cut to 0..1, so that COCO's visibility 1 and 2 count as sure. Score 0 marks
        joints to start from the student's: those that the file lacks, or has at (0, 0) or with
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
        self, image: Path, starts: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """xywh in image pixels of each entry, (N, 4), clipped to the image as a study's are.

        ``bbox``, else the box of the entry's joints. Either grows by the crop frame's usual
        quarter later.

        Args:
            starts: what ``starts`` gives for the image.
            size: the image's height and width.

        Raises:
            InputError: an entry has neither, or a box with nothing of the image inside.
        """
        boxes = []
        for place, start in zip(self.places[image], starts, strict=True):
            box = self.entries[place].get("bbox")
            if box is None:
                joints = start[start[:, 2] > 0, :2]
                low, high = (joints.min(0), joints.max(0)) if len(joints) else (np.zeros(2),) * 2
                box = [*low, *(high - low)]
            clipped = clip_boxes(np.array([box], float), np.array([size]))[0]
            if (clipped[2:] <= 0).any():
                raise InputError(
                    f"{self.file}, entry {place}: must have a bbox, or joints, that span a part "
                    f"of {image.name} of {size[1]} x {size[0]} pixels, got x, y, width and "
                    f"height {[round(float(value), 1) for value in box]}; mend or drop it"
                )
            boxes.append(clipped)
        return np.stack(boxes)

    def scores(self, image: Path) -> NDArray[np.float64]:
        """How sure the file is of each entry, (N,) in 0..1; 1 where it does not say."""
        given = [self.entries[place].get("score", 1.0) for place in self.places[image]]
        return np.clip(np.array(given, float), 0, 1)

    def improve(
        self,
        image: Path,
        starts: NDArray[np.float64],
        keypoints_image: NDArray[np.float64],
        scores: NDArray[np.float64],
    ) -> None:
        """Puts the image's improved poses (N, K, 2) into its entries, other keys as they were.

        A joint that was given keeps its third number; another one gets its score of (N, K).
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


def read_poses(file: Path, images: Sequence[Path], ours: Skeleton) -> GivenPoses:
    """The file's poses. Warns of images without any, and of entries of other images.

    Args:
        ours: the export's skeleton.

    Raises:
        InputError: names the file, the entry (from 0) and what must hold.
    """
    document = load_document(file, "--poses")
    entries = document if isinstance(document, list) else document["annotations"]
    ids = ids_of(file, document, images)
    of_image = {number: image for image, number in ids.items() if number is not None}
    theirs = _skeleton_of(file, entries, ours)
    places: dict[Path, list[int]] = {}
    for place, entry in enumerate(entries):
        if fault := _fault_in(entry, theirs):
            raise InputError(f"{file}, entry {place}: {fault}; mend or drop it")
        if entry["image_id"] in of_image:
            places.setdefault(of_image[entry["image_id"]], []).append(place)
    if not places:
        raise InputError(
            f"{file} must have a pose in at least one of the {len(images)} images, got none, "
            f"the first being {images[0].name}; its 'images' must name them, or, in results, "
            "image_id be the number that an image's name ends in"
        )
    if empty := [image.name for image in images if image not in places]:
        more = f" and {len(empty) - 5} more" if empty[5:] else ""
        warn(f"{file} has no pose in {', '.join(empty[:5])}{more}; left out")
    if others := len(entries) - sum(map(len, places.values())):
        warn(f"{file}: {others} entries are of other images; kept as they are")
    return GivenPoses(file, list(entries), places, theirs, ours)


def _skeleton_of(file: Path, entries: Sequence[Any], ours: Skeleton) -> Skeleton:
    """The known skeleton with as many joints as the first entry, ours before others."""
    first = entries[0] if entries else None
    keypoints = first.get("keypoints") if isinstance(first, dict) else None
    values = len(keypoints) if isinstance(keypoints, list) else 0
    for skeleton in (ours, *SKELETONS.values()):
        if 3 * skeleton.num_joints == values and shared_joints(ours, skeleton):
            return skeleton
    known = " or ".join(
        f"{3 * skeleton.num_joints} ({skeleton.name})"
        for skeleton in {s.name: s for s in (ours, *SKELETONS.values())}.values()
    )
    raise InputError(
        f"{file}, entry 0: must be an object whose keypoints are x, y and a score for each joint, "
        f"{known} numbers, got {values or short(first)}; change --poses"
    )


def _fault_in(entry: Any, skeleton: Skeleton) -> str | None:
    """What must hold of an entry and does not."""
    if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int):
        return f"must be an object with a whole image_id, got {short(entry)}"
    keypoints, box = entry.get("keypoints"), entry.get("bbox")
    if not are_finite(keypoints, 3 * skeleton.num_joints):
        got = f"{len(keypoints)}" if isinstance(keypoints, list) else short(keypoints)
        return (
            f"keypoints must be {3 * skeleton.num_joints} finite numbers, as many as in the first "
            f"entry ({skeleton.name}), got {got}"
        )
    if box is not None and not are_finite(box, 4):
        return f"bbox must be four finite numbers, x, y, width and height, got {short(box)}"
    if not are_finite([entry.get("score", 1.0)], 1):
        return f"score must be a finite number, got {short(entry['score'])}"
    return None
