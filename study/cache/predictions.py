"""Poses that another method found in the training images: a teacher's, or ``refine.start``.

They come as COCO keypoint results, a JSON list of ``{image_id, category_id, keypoints, score}``
with x, y in image pixels and a confidence for each joint. An entry may name its person by
``annotation_id``, or the person's box by ``bbox``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import Skeleton, shared_joints
from study.cache.arrow_file import read_columns, write_columns
from study.cache.crop_store import CropStore
from study.data.annotations import SCORED_JOINT
from study.data.coco_results import (
    EntryFormat,
    check_entry,
    entry_error,
    read_results,
    require_pixels,
    skeleton_of,
)
from study.data.crops import apply_affine
from study.data.own_skeletons import identity_of
from study.data.people import box_iou
from study.errors import InputError
from study.storage.files import fingerprint, hash_file

MIN_IOU = 0.3
"""Least IoU of a prediction's box with the box of its person.

The box of a pose's joints is smaller than the person's box, so a correct one may have much less
than the usual 0.5."""
MIN_MATCHED = 0.3
"""Least share of the people and predictions of an image that must pair by their boxes.

Correct files had 0.89 to 0.96, and those of other images up to 0.42 where people fill them."""
MANY_PAIRS = 20
"""Possible pairs from which on that share is required."""
BEYOND_BOX = 0.25
"""Share of a box's size by which correct joints may lie outside, on each side."""
MAX_OUTSIDE = 0.25
"""Largest share of people with most of their sure joints farther outside; correct files had
0.001, and poses relative to their boxes 0.44 to 0.92."""
AT_ORIGIN = 0.01
"""Joints so near to 0, 0, in px, are placeholders of unlabeled ones and don't count."""
MANY_PEOPLE = 5
"""People from which on that share is bounded."""
NOBODY = -1
START = "refine.start"
STARTS_VERSION = 1
"""Raise it when predictions are matched or transformed differently."""


class Predictions:
    """P poses of a file, in its order."""

    def __init__(self, path: Path, skeleton: Skeleton, setting: str = "teacher.init") -> None:
        """Read and check the file.

        Args:
            skeleton: joints of the file. For START the number of joints of the first entry may
                select another known skeleton.
            setting: setting that names the file, as messages call it.

        Raises:
            InputError: an entry is broken; names the file, the entry and what must hold.
        """
        entries = read_results(path, setting, "a JSON list of COCO keypoint results").entries
        if setting == START:
            ours, skeleton = skeleton, skeleton_of(entries[0], skeleton) or skeleton
            if not shared_joints(ours, skeleton):
                raise InputError(
                    f"{START} must hold poses of joints that the data have, got entries of "
                    f"{skeleton.num_joints} joints ({skeleton.name}) in {path}, while those of "
                    f"{ours.name} are {ours.num_joints} others; change {START}"
                )
            required = EntryFormat(skeleton=skeleton, needs_score=True)
        else:
            required = EntryFormat(
                skeleton=skeleton, skeleton_source="teacher.skeleton", needs_score=True
            )
        for place, entry in enumerate(entries):
            check_entry(path, place, entry, required)
        self.path = path
        self.setting = setting
        self.skeleton = skeleton
        rows = np.array([entry["keypoints"] for entry in entries], float)
        rows = rows.reshape(len(entries), skeleton.num_joints, 3)
        require_pixels(path, rows)
        self.keypoints_image: NDArray[np.float64] = rows[..., :2]
        """In image pixels, (P, K, 2)."""
        self.confidence: NDArray[np.float64] = rows[..., 2].clip(0, 1)
        """(P, K) in 0..1."""
        self.scores = np.array([entry["score"] for entry in entries], float)
        self.image_ids = np.array([entry["image_id"] for entry in entries], np.int64)
        self.annotation_ids = _annotation_ids(path, entries)
        """(P,); None if the file has none."""
        self.boxes = np.array(
            [
                entry.get("bbox") or _box_of(pose, confidence)
                for entry, pose, confidence in zip(
                    entries, self.keypoints_image, self.confidence, strict=True
                )
            ],
            float,
        )
        """xywh in image pixels, (P, 4)."""

    def match(self, store: CropStore) -> NDArray[np.int64]:
        """Return the index of each person's prediction, NOBODY if there is none, (N,).

        If the file has annotation ids, they decide. Otherwise people and predictions of an image
        are paired by the IoU of their boxes: the best pair first, of equal pairs the higher score
        first, each person and each prediction once. A prediction without ``bbox`` has the box of
        the joints that score above 0.2, or of all joints if none does.

        Raises:
            InputError: few of the possible pairs overlap, or many people have most sure joints
                outside their boxes.
        """
        if self.annotation_ids is not None:
            places = {int(number): place for place, number in enumerate(self.annotation_ids)}
            found = [places.get(int(number), NOBODY) for number in store.annotation_ids]
            matched = np.array(found, np.int64)
        else:
            matched = self._match_boxes(store)
        self._require_in_boxes(store, matched)
        return matched

    def _match_boxes(self, store: CropStore) -> NDArray[np.int64]:
        matched = np.full(len(store), NOBODY)
        possible = 0
        predicted = _by_image(self.image_ids)
        for image, ours in _by_image(store.image_ids).items():
            theirs = predicted.get(image, np.empty(0, np.int64))
            possible += min(len(ours), len(theirs))
            overlaps = box_iou(store.boxes_image[ours][:, None], self.boxes[theirs])
            scores = np.broadcast_to(self.scores[theirs], overlaps.shape)
            taken: set[int] = set()
            for pair in np.lexsort((-scores.ravel(), -overlaps.ravel())):
                row, column = np.unravel_index(pair, overlaps.shape)
                person, prediction = int(ours[row]), int(theirs[column])
                if overlaps[row, column] < MIN_IOU:
                    break
                if matched[person] == NOBODY and prediction not in taken:
                    matched[person] = prediction
                    taken.add(prediction)
        found = int((matched != NOBODY).sum())
        if possible >= MANY_PAIRS and 0 < found < MIN_MATCHED * possible:
            raise InputError(
                f"{self.setting} must hold poses that overlap the boxes of the people in their "
                f"images, got {found} that do of {possible} in {self.path}; write x and y in "
                "pixels of the whole image, and its image_id as in data.train.annotations"
            )
        return matched

    def _require_in_boxes(self, store: CropStore, matched: NDArray[np.int64]) -> None:
        people = np.flatnonzero(matched != NOBODY)
        boxes, poses = store.boxes_image[people, None], self.keypoints_image[matched[people]]
        is_placed = (np.abs(poses) > AT_ORIGIN).any(axis=-1)
        is_sure = is_placed & (self.confidence[matched[people]] > SCORED_JOINT)  # (P, K)
        margin = BEYOND_BOX * boxes[..., 2:]
        low, high = boxes[..., :2] - margin, boxes[..., :2] + boxes[..., 2:] + margin
        is_outside = is_sure & ((poses < low) | (poses > high)).any(axis=-1)
        num_sure = is_sure.sum(axis=1)
        num_outside = int((2 * is_outside.sum(axis=1) > num_sure).sum())
        num_people = int((num_sure > 0).sum())
        if num_people >= MANY_PEOPLE and num_outside > MAX_OUTSIDE * num_people:
            raise InputError(
                f"{self.setting} must hold poses within the boxes of their people, got "
                f"{num_outside} of {num_people} people with most joints outside in {self.path}; "
                "write x and y in pixels of the whole image, not of a box or crop, and its "
                "annotation_id as in data.train.annotations"
            )

    def modes(
        self, store: CropStore, matched: NDArray[np.int64], num_modes: int, skeleton: Skeleton
    ) -> NDArray[np.float32]:
        """Return the poses as modes in stored-crop pixels, (N, K, M, 4).

        A pose is the first mode, with its confidence as height. Height 0 marks joints without
        confidence, and all joints of people without a prediction.

        Args:
            matched: result of ``match``.
            skeleton: joints of the store.
        """
        pairs = shared_joints(skeleton, self.skeleton)
        ours, theirs = np.array(pairs, np.int64).reshape(-1, 2).T
        modes = np.zeros((len(store), skeleton.num_joints, num_modes, 4), np.float32)
        modes[..., 3] = 1
        people = np.flatnonzero(matched != NOBODY)
        poses = apply_affine(self.keypoints_image[matched[people]], store.image_to_stored[people])
        places = np.ix_(people, ours)
        modes[..., 0, :2][places] = poses[:, theirs]
        modes[..., 0, 2][places] = self.confidence[matched[people]][:, theirs]
        return modes


def given_starts(path: Path, store: CropStore, skeleton: Skeleton) -> NDArray[np.float32]:
    """Return ``refine.start``: x, y in stored-crop pixels and score of each joint, (N, K, 3).

    Score 0 marks joints that the file lacks, and all joints of people without a prediction.

    Args:
        skeleton: joints of the store. The file may have another skeleton, found by the number of
            joints of its first entry; joints are paired by name.
    """
    predictions = Predictions(path, skeleton, START)
    matched = predictions.match(store)
    starts = predictions.modes(store, matched, 1, skeleton)[:, :, 0, :3]
    return np.ascontiguousarray(starts)


def stored_starts(path: Path, store: CropStore, skeleton: Skeleton) -> NDArray[np.float32]:
    """Like ``given_starts``, but computed once and kept beside the store for all trials."""
    joints = identity_of(skeleton) or skeleton.name
    key = fingerprint(STARTS_VERSION, hash_file(path), store.path.name, joints)
    file = store.path.parent / f"starts-{key}.arrow"
    if not file.exists():
        write_columns(file, {"starts": given_starts(path, store, skeleton)})
    starts: NDArray[np.float32] = read_columns(file)[0]["starts"]
    return starts


def check_start(path: Path, store: CropStore, skeleton: Skeleton) -> tuple[int, int]:
    """Return how many people to train on start from a prediction of the file, and how many don't.

    Raises:
        InputError: the file is broken, or matches no person.
    """
    starts = stored_starts(path, store, skeleton)
    number = int((starts[..., 2] > 0).any(axis=1).sum())
    if not number:
        raise InputError(
            f"{START} must hold poses of the people to train on, got none that is of any of "
            f"{len(store)} in {path}; change {START}, or its image_id or annotation_id to those "
            "of data.train.annotations"
        )
    return number, len(store) - number


def _annotation_ids(path: Path, entries: list[dict[str, Any]]) -> NDArray[np.int64] | None:
    given = [entry.get("annotation_id") for entry in entries]
    if all(number is None for number in given):
        return None
    seen: set[int] = set()
    for place, number in enumerate(given):
        if not isinstance(number, int) or number in seen:
            fault = (
                "annotation_id must be a whole number that no other entry has, in all entries or "
                f"in none, got {number!r}"
            )
            raise entry_error(path, place, entries[place], fault)
        seen.add(number)
    return np.array(given, np.int64)


def _by_image(image_ids: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Return the rows of each image id, in their order."""
    order = np.argsort(image_ids, kind="stable")
    images, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:]), strict=True))


def _box_of(pose: NDArray[np.float64], confidence: NDArray[np.float64]) -> list[float]:
    is_sure = confidence > SCORED_JOINT
    joints = pose[is_sure] if is_sure.any() else pose
    low, high = joints.min(axis=0), joints.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]
