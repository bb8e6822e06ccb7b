"""Evaluate poses: OKS, OKS-NMS, the official average precision of COCO and CrowdPose.

AP comes from faster-coco-eval, which agrees with the official code of both on every published
figure. AP is a fraction here; tables show it times 100.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from models.skeleton import Skeleton
from study.config.schema import Kind
from study.data.annotations import AREA_OF_BOX, CROWD_BOUNDS, PERSON_ID, SCORED_JOINT
from study.data.coco_json import load_document
from study.errors import InputError

OKS_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class _Evaluation(NamedTuple):
    """The library's evaluation, in which images have numbers in the order of their ids."""

    library: Any
    numbers: dict[int, int]
    """Number of each image id; the library confuses ids above 2 ** 53."""


def to_detections(
    keypoints_image: np.ndarray,
    joint_scores: np.ndarray,
    image_ids: np.ndarray,
    box_scores: np.ndarray,
) -> list[dict[str, Any]]:
    """Return N poses as COCO keypoint results.

    The score of a pose is its box score times the mean of the joint scores above 0.2, or 0 if
    there is none.

    Args:
        keypoints_image: (N, K, 2).
        joint_scores: (N, K).
        image_ids: (N,).
        box_scores: (N,); 1 for boxes from the ground truth.

    Raises:
        ValueError: a keypoint or score is NaN or infinite.
    """
    rows = np.concatenate([keypoints_image, joint_scores[:, :, None]], axis=2)  # (N, K, 3)
    if not np.isfinite(rows).all():
        person = int(np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))[0])
        raise ValueError(
            "keypoints and scores must be finite to be evaluated, got NaN or infinity for person "
            f"{person} in image {image_ids[person]}; the network that predicted them diverged"
        )
    is_scored = joint_scores > SCORED_JOINT
    mean = (joint_scores * is_scored).sum(axis=1) / np.maximum(is_scored.sum(axis=1), 1)
    columns = zip(
        np.asarray(image_ids).tolist(),
        rows.reshape(len(rows), rows.shape[1] * 3).tolist(),
        (box_scores * mean).tolist(),
        strict=True,
    )
    return [
        {"image_id": image_id, "category_id": PERSON_ID, "keypoints": row, "score": score}
        for image_id, row, score in columns
    ]


def average_precision(
    ground_truth: Path, detections: Sequence[dict[str, Any]], skeleton: Skeleton, kind: Kind
) -> dict[str, float]:
    """Return the official figures, each in 0..1, NaN if no person counts for it.

    ``ap ap50 ap75 ar ar50 ar75``, and for coco ``ap_m ap_l ar_m ar_l`` (by area), for crowdpose
    ``ap_easy ap_medium ap_hard`` (by the images' crowdIndex, NaN if an image has none).
    The last three are not rounded; the official code rounds them to four digits.

    Args:
        ground_truth: an annotation file, parsed once while it does not change. A person counts if
            ``num_keypoints`` is above 0; they are counted if the file has none.
        detections: COCO keypoint results. The best 20 of an image count; without any, AP is 0.
        skeleton: supplies the OKS sigmas.

    Raises:
        InputError: the ground truth has no person that counts, or a detection is of an image
            that it lacks.
    """
    document = _ground_truth(ground_truth, skeleton.num_joints, _file_stamp(ground_truth))
    evaluation = _evaluation(document, detections, skeleton.oks_sigmas, kind)
    image_ids = [image["id"] for image in document["images"]]
    # (T, R, areas), (T, areas); T: 0.5, 0.55 .. 0.95
    precision, recall = _accumulate(evaluation, image_ids)
    figures = {}
    for suffix, thresholds in (("", slice(None)), ("50", slice(1)), ("75", slice(5, 6))):
        figures[f"ap{suffix}"] = _mean(precision[thresholds, :, 0])
        figures[f"ar{suffix}"] = _mean(recall[thresholds, 0])
    if math.isnan(figures["ap"]):
        raise InputError(
            "the ground truth must have a person with num_keypoints above 0 to measure AP, got "
            f"none in {ground_truth}; change data.{{train,val}}.annotations"
        )
    if kind == "coco":
        for place, label in ((1, "m"), (2, "l")):
            figures[f"ap_{label}"] = _mean(precision[:, :, place])
            figures[f"ar_{label}"] = _mean(recall[:, place])
        return figures
    for label, group in zip(("easy", "medium", "hard"), _crowd_groups(document), strict=True):
        group_ap = _mean(_accumulate(evaluation, group)[0][:, :, 0]) if group else math.nan
        figures[f"ap_{label}"] = group_ap
    return figures


def ap_by_threshold(
    ground_truth: Path, detections: Sequence[dict[str, Any]], skeleton: Skeleton, kind: Kind
) -> dict[float, float]:
    """Return AP at each OKS threshold of 0.50, 0.55 .. 0.95; their mean is AP.

    Args and NaN are those of ``average_precision``.
    """
    document = _ground_truth(ground_truth, skeleton.num_joints, _file_stamp(ground_truth))
    evaluation = _evaluation(document, detections, skeleton.oks_sigmas, kind)
    precision, _ = _accumulate(evaluation, [image["id"] for image in document["images"]])
    return {
        threshold: _mean(of_threshold)
        for threshold, of_threshold in zip(OKS_THRESHOLDS, precision[:, :, 0], strict=True)
    }


def ap_by_joint(
    ground_truth: Path, detections: Sequence[dict[str, Any]], skeleton: Skeleton, kind: Kind
) -> dict[str, float]:
    """Return AP of each joint by name: the same evaluation with all other joints removed.

    OKS is that of the one joint, with the person's own area, and only people with this joint
    labeled count; poses are ranked by their whole score. As in every evaluation, a pose matched
    with an unlabeled person is no false positive: here, if the joint lies within that person's
    box grown to three times its size. Args are those of ``average_precision``; NaN if no person
    has the joint.
    """
    document = _ground_truth(ground_truth, skeleton.num_joints, _file_stamp(ground_truth))
    image_ids = [image["id"] for image in document["images"]]
    figures = {}
    for place, name in enumerate(skeleton.joints):
        numbers = slice(3 * place, 3 * place + 3)
        people = [_with_one_joint(person, numbers) for person in document["annotations"]]
        poses = [{**pose, "keypoints": pose["keypoints"][numbers]} for pose in detections]
        sigma = skeleton.oks_sigmas[place]
        evaluation = _evaluation({**document, "annotations": people}, poses, [sigma], kind)
        figures[name] = _mean(_accumulate(evaluation, image_ids)[0][:, :, 0])
    return figures


def oks(
    keypoints: np.ndarray,
    other: np.ndarray,
    visibility: np.ndarray,
    area: np.ndarray,
    sigmas: Sequence[float],
    boxes: np.ndarray | None = None,
) -> np.ndarray:
    """Return COCO's object keypoint similarity of two poses, in 0..1; shapes broadcast.

    It is the mean over the labeled joints. If no joint is labeled, COCO measures how far the pose
    lies outside the other person's box grown to three times its size; without ``boxes`` OKS is 0.

    Args:
        keypoints: (..., K, 2), in pixels like all lengths here.
        other: pose to compare with, usually the ground truth, (..., K, 2).
        visibility: of the other pose's joints, (..., K).
        area: of the other person, (...).
        boxes: xywh of the other person, (..., 4).
    """
    variances = (2 * np.asarray(sigmas)) ** 2
    labeled = np.greater(visibility, 0)
    offsets = np.abs(keypoints - other)
    if boxes is not None:
        start, size = boxes[..., None, :2], boxes[..., None, 2:]
        beyond = np.maximum(start - size - keypoints, 0) + np.maximum(
            keypoints - start - 2 * size, 0
        )
        is_boxed = ~labeled.any(axis=-1)
        offsets = np.where(is_boxed[..., None, None], beyond, offsets)
        labeled = labeled | is_boxed[..., None]
    errors = (offsets**2).sum(axis=-1) / variances
    errors = errors / (np.asarray(area)[..., None] + np.spacing(1)) / 2
    total = (np.exp(-errors) * labeled).sum(axis=-1)
    return np.asarray(total / np.maximum(labeled.sum(axis=-1), 1))


def read_truth(ground_truth: Path, skeleton: Skeleton) -> dict[str, Any]:
    """Return the annotation file as it is evaluated; callers must not change it."""
    return _ground_truth(ground_truth, skeleton.num_joints, _file_stamp(ground_truth))


def _file_stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change when the file is replaced or written to; () if it is missing."""
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _ground_truth(path: Path, num_joints: int, _stamp: tuple[int, ...]) -> dict[str, Any]:
    """Return only what an evaluation needs of the file; callers must not change it."""
    document = load_document(path)
    return {
        "images": document["images"],
        "annotations": [
            _as_evaluated(annotation, number, num_joints)
            for number, annotation in enumerate(document["annotations"], start=1)
        ],
        "categories": [{"id": PERSON_ID}],
    }


def _as_evaluated(annotation: dict[str, Any], number: int, num_joints: int) -> dict[str, Any]:
    """Return the annotation with all keys that the library needs, missing ones filled in.

    The number, from 1, replaces the id, since to the library id 0 means "not matched". A missing
    area is computed from the box, as CrowdPose does.
    """
    keypoints = annotation.get("keypoints") or [0] * (3 * num_joints)
    box = annotation.get("bbox") or [0.0, 0.0, 0.0, 0.0]
    defaults = {
        "area": AREA_OF_BOX * box[2] * box[3],
        "iscrowd": 0,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }
    given = {key: annotation[key] for key in defaults if annotation.get(key) is not None}
    return {
        "id": number,
        "category_id": PERSON_ID,
        "image_id": annotation["image_id"],
        "keypoints": keypoints,
        "bbox": box,
        **defaults,
        **given,
    }


def _with_one_joint(person: dict[str, Any], numbers: slice) -> dict[str, Any]:
    keypoints = person["keypoints"][numbers]
    is_labeled = person["num_keypoints"] > 0 and keypoints[2] > 0
    return {**person, "keypoints": keypoints, "num_keypoints": int(is_labeled)}


def _evaluation(
    document: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    sigmas: Sequence[float],
    kind: Kind,
) -> _Evaluation:
    """Set up the library's evaluation on copies of the records, since it writes into them."""
    known = {image["id"] for image in document["images"]}
    if unknown := {found["image_id"] for found in detections} - known:
        raise InputError(
            "detections must be of images of the ground truth, got image ids "
            f"{sorted(unknown)[:5]}; change data.{{train,val}}.annotations or the detections"
        )
    numbers = {image_id: n for n, image_id in enumerate(sorted(known), start=1)}
    rows = np.array([found["keypoints"] for found in detections])
    corners = rows.reshape(len(detections), len(sigmas), 3)[:, :, :2]
    areas = np.ptp(corners, axis=1).prod(axis=1).tolist()
    records = [
        {**found, "id": number, "category_id": PERSON_ID, "area": area}
        for number, (found, area) in enumerate(zip(detections, areas, strict=True), start=1)
    ]
    images = [{**image, "id": numbers[image["id"]]} for image in document["images"]]

    def as_read(people: Sequence[dict[str, Any]]) -> COCO:
        own = [
            {**person, "image_id": numbers[person["image_id"]]}
            for person in people
            if person["image_id"] in known
        ]
        read = {**document, "images": images, "annotations": own}
        return COCO(read, print_function=_print_nothing)

    evaluation = COCOeval_faster(
        as_read(document["annotations"]),
        as_read(records),
        "keypoints" if kind == "coco" else "keypoints_crowd",
        print_function=_print_nothing,
        kpt_oks_sigmas=list(sigmas),
        use_area=kind == "coco",
    )
    evaluation.params.catIds = [PERSON_ID]
    # The slow part; it is the same for every group of images.
    evaluation.computeOks = functools.cache(evaluation.computeOks)
    return _Evaluation(evaluation, numbers)


def _accumulate(evaluation: _Evaluation, image_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, areas) and recall (T, areas) of images, -1 if no person counts."""
    library, numbers = evaluation
    library.params.imgIds = [numbers[image_id] for image_id in image_ids]
    library.evaluate()
    library.accumulate()
    precision, recall = library.eval["precision"], library.eval["recall"]
    return precision[:, :, 0, :, -1], recall[:, 0, :, -1]


def _crowd_groups(document: dict[str, Any]) -> list[list[int]]:
    """Return ids of the easy, medium and hard images; all empty if one has no crowdIndex."""
    images = document["images"]
    if any(image.get("crowdIndex") is None for image in images):
        return [[], [], []]
    levels = np.searchsorted(CROWD_BOUNDS, [image["crowdIndex"] for image in images], side="right")
    return [
        [image["id"] for image, own in zip(images, levels, strict=True) if own == level]
        for level in range(3)
    ]


def _mean(values: np.ndarray) -> float:
    applies = values > -1
    return float(values[applies].mean()) if applies.any() else math.nan


def _print_nothing(*_: object) -> None:
    """Take the library's progress messages."""


def oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
    threshold: float = 0.9,
) -> np.ndarray:
    """Greedily keep the best poses; drop those whose OKS with a kept one exceeds the threshold.

    Args:
        keypoints: poses of one image, (N, K, 2), in pixels.
        scores: (N,).
        areas: square pixels, (N,).
        threshold: an OKS; 1 drops no pose.

    Returns:
        Indices of the kept poses, best first.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[_similarities(best, order, keypoints, areas, sigmas) <= threshold]
    return np.array(kept, np.int64)


def oks_nms_by_image(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    image_ids: np.ndarray,
    sigmas: Sequence[float],
    threshold: float,
) -> np.ndarray:
    """Return the indices, ascending, of the poses that ``oks_nms`` keeps in each image.

    Args:
        keypoints: (N, K, 2), in pixels.
        scores: (N,).
        areas: square pixels, (N,).
        image_ids: image of each pose, (N,).
        threshold: an OKS; 1 drops no pose.
    """
    order = np.argsort(image_ids, kind="stable")
    starts = np.flatnonzero(np.diff(image_ids[order])) + 1
    kept = [
        rows[oks_nms(keypoints[rows], scores[rows], areas[rows], sigmas, threshold)]
        for rows in np.split(order, starts)
    ]
    return np.sort(np.concatenate(kept))


def _similarities(
    one: int,
    others: np.ndarray,
    keypoints: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
) -> np.ndarray:
    """Return the OKS of a pose with each of M others, (M,)."""
    area = (areas[one] + areas[others]) / 2
    every_joint = np.ones(keypoints.shape[1])
    return oks(keypoints[one], keypoints[others], every_joint, area, sigmas)
