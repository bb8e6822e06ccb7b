"""Poses that another method has found in the training images: a teacher, or refine.start.

They come as COCO keypoint results, a JSON list of ``{image_id, category_id, keypoints, score}``.
``keypoints`` are x, y in image pixels and a confidence for each joint. An entry may tell whom it
is of by ``annotation_id``, or its person's box by ``bbox``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.skeleton import SKELETONS, Skeleton, shared_joints
from study.cache.arrow_file import read_columns, write_columns
from study.cache.crop_store import CropStore
from study.data.annotations import SCORED_JOINT
from study.data.coco_results import are_finite, read_entries
from study.data.crops import apply_affine
from study.data.people import _iou
from study.errors import InputError
from study.storage.files import fingerprint, hash_file

MIN_IOU = 0.3
"""A prediction without annotation id is of the person whose box it overlaps, at least so much.

The box of a pose's joints is smaller than the person's box, so that a right one can be far below
the usual 0.5."""
NOBODY = -1
START = "refine.start"
STARTS_VERSION = 1
"""Raise it when predictions are matched or carried otherwise."""


class Predictions:
    """P poses of a file, in its order."""

    def __init__(self, path: Path, skeleton: Skeleton, setting: str = "teacher.init") -> None:
        """Reads the file.

        Args:
            skeleton: whose joints the file has; for START it may be another one, told by the
                number of joints of the first entry.
            setting: what names the file, as messages call it.

        Raises:
            InputError: names the file, the entry (from 0) and what must hold.
        """
        entries = read_entries(path, setting, "a JSON of COCO keypoint results", "predictions")
        if setting == START:
            skeleton = _skeleton_of(entries[0], skeleton)
        for number, entry in enumerate(entries):
            if fault := _fault_in(entry, skeleton, setting):
                raise InputError(f"{path}, entry {number}: {fault}; mend the file")
        self.path = path
        self.skeleton = skeleton
        rows = np.array([entry["keypoints"] for entry in entries], float)
        rows = rows.reshape(len(entries), skeleton.num_joints, 3)
        self.keypoints_image: NDArray[np.float64] = rows[..., :2]
        self.confidence: NDArray[np.float64] = rows[..., 2].clip(0, 1)
        self.scores = np.array([entry["score"] for entry in entries], float)
        self.image_ids = np.array([entry["image_id"] for entry in entries], np.int64)
        self.annotation_ids = _annotation_ids(path, entries)
        self.boxes = np.array(
            [
                entry.get("bbox") or _box_of(pose, confidence)
                for entry, pose, confidence in zip(
                    entries, self.keypoints_image, self.confidence, strict=True
                )
            ],
            float,
        )

    def match(self, store: CropStore) -> NDArray[np.int64]:
        """Which prediction is of each person of the store, (N,), NOBODY where there is none.

        By annotation id where the file has them. Else, in each image, by the overlap (IoU) of
        the boxes: the best pair first, the higher score first of equals, each person and each
        prediction once. A prediction without ``bbox`` has the box of the joints that score above
        0.2, or of all where none does.
        """
        matched = np.full(len(store), NOBODY)
        if self.annotation_ids is not None:
            places = {int(number): place for place, number in enumerate(self.annotation_ids)}
            found = [places.get(int(number), NOBODY) for number in store.annotation_ids]
            return np.array(found, np.int64)
        predicted = _by_image(self.image_ids)
        for image, ours in _by_image(store.image_ids).items():
            theirs = predicted.get(image, np.empty(0, np.int64))
            overlaps = _iou(store.boxes_image[ours], self.boxes[theirs])
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
        return matched

    def modes(
        self, store: CropStore, matched: NDArray[np.int64], num_modes: int, skeleton: Skeleton
    ) -> NDArray[np.float32]:
        """In stored-crop pixels, (N, K, M, 4): the pose as the first mode, as high as its score.

        Height 0 marks joints without confidence, and all those of people without a prediction.

        Args:
            matched: as ``match`` gives it.
            skeleton: whose joints the store has.
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
    """``refine.start``: x, y in stored-crop pixels and score of each person's joints, (N, K, 3).

    Score 0 marks the joints that the file lacks, and all those of people without a prediction.

    Args:
        skeleton: whose joints the store has. The file's may be another one, told by the number of
            joints of its first entry; joints are paired by name.
    """
    predictions = Predictions(path, skeleton, START)
    matched = predictions.match(store)
    starts = predictions.modes(store, matched, 1, skeleton)[:, :, 0, :3]
    return np.ascontiguousarray(starts)


def stored_starts(path: Path, store: CropStore, skeleton: Skeleton) -> NDArray[np.float32]:
    """As ``given_starts``; matched once, and kept beside the store for all trials."""
    key = fingerprint(STARTS_VERSION, hash_file(path), store.path.name, skeleton.name)
    file = store.path.parent / f"starts-{key}.arrow"
    if not file.exists():
        write_columns(file, {"starts": given_starts(path, store, skeleton)})
    starts: NDArray[np.float32] = read_columns(file)[0]["starts"]
    return starts


def check_start(path: Path, store: CropStore, skeleton: Skeleton) -> tuple[int, int]:
    """How many of the people to train on start from a prediction of the file, and how many not.

    Raises:
        InputError: the file is broken, or is of nobody here.
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


def _skeleton_of(first: Any, ours: Skeleton) -> Skeleton:
    """The known skeleton with as many joints as the first entry; ours if it fits, or none does."""
    keypoints = first.get("keypoints") if isinstance(first, dict) else None
    number = len(keypoints) / 3 if isinstance(keypoints, list) else 0
    fitting = [s for s in (ours, *SKELETONS.values()) if s.num_joints == number]
    return fitting[0] if fitting else ours


def _fault_in(entry: Any, skeleton: Skeleton, setting: str) -> str | None:
    """What must hold of an entry and does not."""
    whence = "as in the first entry" if setting == START else "teacher.skeleton"
    if not isinstance(entry, dict):
        return f"must be an object, got {entry!r}"
    if not isinstance(entry.get("image_id"), int):
        return f"image_id must be a whole number, got {entry.get('image_id')!r}"
    keypoints = entry.get("keypoints")
    if not are_finite(keypoints, 3 * skeleton.num_joints):
        got = f"{len(keypoints)}" if isinstance(keypoints, list) else repr(keypoints)
        return (
            f"keypoints must be {3 * skeleton.num_joints} finite numbers, x, y and a confidence "
            f"for each of {skeleton.num_joints} joints ({whence}: {skeleton.name}), got "
            f"{got}"
        )
    if not are_finite([entry.get("score")], 1):
        return f"score must be a finite number, got {entry.get('score')!r}"
    if entry.get("bbox") is not None and not are_finite(entry["bbox"], 4):
        return f"bbox must be four finite numbers, x, y, width and height, got {entry['bbox']!r}"
    return None


def _annotation_ids(path: Path, entries: list[dict[str, Any]]) -> NDArray[np.int64] | None:
    given = [entry.get("annotation_id") for entry in entries]
    if all(number is None for number in given):
        return None
    seen: set[int] = set()
    for place, number in enumerate(given):
        if not isinstance(number, int) or number in seen:
            raise InputError(
                f"{path}, entry {place}: annotation_id must be a whole number that no other entry "
                f"has, in all entries or in none, got {number!r}; mend the file"
            )
        seen.add(number)
    return np.array(given, np.int64)


def _by_image(image_ids: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """The places of each image's entries, in their order."""
    order = np.argsort(image_ids, kind="stable")
    images, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:]), strict=True))


def _box_of(pose: NDArray[np.float64], confidence: NDArray[np.float64]) -> list[float]:
    is_sure = confidence > SCORED_JOINT
    joints = pose[is_sure] if is_sure.any() else pose
    low, high = joints.min(axis=0), joints.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]
