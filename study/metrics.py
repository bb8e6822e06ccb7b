"""How good poses are: OKS, OKS-NMS, the official average precision of COCO and CrowdPose, PCK.

AP is faster-coco-eval's, which equals the official code of both on every published figure. AP is
a fraction here; where it is shown, it is shown times 100.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from models.skeleton import Skeleton
from study.config.schema import Kind
from study.data.annotations import AREA_OF_BOX, CROWD_BOUNDS, PERSON_ID, SCORED_JOINT
from study.data.coco_json import load_document
from study.errors import InputError

OKS_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TORSO = (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip"))
SOFT_AT_MOST = 20
"""The soft kind keeps no more poses of an image (HRNet's ``max_dets``)."""


def to_detections(
    keypoints_image: np.ndarray,
    joint_scores: np.ndarray,
    image_ids: np.ndarray,
    box_scores: np.ndarray,
) -> list[dict[str, Any]]:
    """N poses as COCO's results; score = box score x mean of the joint scores above 0.2, else 0.

    Args:
        keypoints_image: (N, K, 2).
        joint_scores: (N, K).
        image_ids: (N,).
        box_scores: (N,); 1 for boxes from the ground truth.
    """
    rows = np.concatenate([keypoints_image, joint_scores[:, :, None]], axis=2)  # (N, K, 3)
    if not np.isfinite(rows).all():
        person = int(np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))[0])
        raise ValueError(
            "keypoints and scores must be finite to be evaluated, got NaN or infinity for person "
            f"{person} in image {image_ids[person]}; the network that made them diverged"
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
    """The official figures, each in 0..1, NaN where the ground truth has nobody it is about.

    ``ap ap50 ap75 ar ar50 ar75``, and for coco ``ap_m ap_l ar_m ar_l`` (by area), for crowdpose
    ``ap_easy ap_medium ap_hard`` (by the images' crowdIndex, NaN where an image has none).
    The last three are not rounded to four digits, as they are in the official code.

    Args:
        ground_truth: an annotation file; a person counts from ``num_keypoints`` 1 on, which are
            counted where the file has none. It is parsed once while it stays as it is.
        detections: COCO's results; at most the best 20 of an image count, none at all is AP 0.
        skeleton: supplies the OKS sigmas.
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
    """AP at each OKS threshold of 0.50, 0.55 .. 0.95, whose mean is AP; args and NaN as there."""
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
    """AP of each joint by name: the same evaluation, of people who have that joint alone.

    OKS is that of the one joint, with the person's own area, and only people who have it labeled
    count; poses are ranked by their whole score. As in any evaluation, a pose that goes to a
    person without label is no false one: here where the joint lies within that person's box grown
    to three times its size. Args as ``average_precision``; NaN where nobody has the joint.
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
    """COCO's similarity of two poses, mean over the labeled joints, 0..1; shapes broadcast.

    Where nothing is labeled, COCO measures how far a pose lies outside the other person's box
    grown to three times its size; without ``boxes`` it is 0 there.

    Args:
        keypoints: (..., K, 2), in pixels, as all lengths here.
        other: the pose to compare with, usually the ground truth, (..., K, 2).
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


def torso_lengths(keypoints: np.ndarray, visibility: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Mean length (N,) of those shoulder-to-other-hip diagonals that are labeled, else NaN."""
    total, count = np.zeros(len(keypoints)), np.zeros(len(keypoints))
    for shoulder, hip in TORSO:
        if shoulder in skeleton.joints and hip in skeleton.joints:
            ends = [skeleton.joints.index(shoulder), skeleton.joints.index(hip)]
            is_labeled = (visibility[:, ends] > 0).all(axis=1)
            lengths = np.linalg.norm(keypoints[:, ends[0]] - keypoints[:, ends[1]], axis=-1)
            total += np.where(is_labeled, lengths, 0)
            count += is_labeled
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def joint_errors(keypoints: np.ndarray, truth: np.ndarray, visibility: np.ndarray) -> np.ndarray:
    """Mean distance (K,) of each joint where the truth labels it, in the unit given, else NaN.

    Args: as ``pck``.
    """
    labeled = visibility > 0
    distances = np.linalg.norm(keypoints - truth, axis=-1)  # (N, K)
    total, count = np.where(labeled, distances, 0).sum(axis=0), labeled.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def pck(
    keypoints: np.ndarray,
    truth: np.ndarray,
    visibility: np.ndarray,
    lengths: np.ndarray,
    fraction: float = 0.2,
) -> float:
    """The share of labeled joints no further off than that fraction of the person's length.

    Args:
        keypoints: (N, K, 2).
        truth: (N, K, 2).
        visibility: of the truth, (N, K).
        lengths: ``torso_lengths`` of the truth, (N,); people with NaN or 0 are left out.

    Returns:
        In 0..1; NaN where no joint counts.
    """
    counted = (visibility > 0) & (lengths > 0)[:, None]
    distances = np.linalg.norm(keypoints - truth, axis=-1)  # (N, K)
    is_right = distances <= fraction * lengths[:, None]
    return float(is_right[counted].mean()) if counted.any() else math.nan


def read_truth(ground_truth: Path, skeleton: Skeleton) -> dict[str, Any]:
    """The file as it is evaluated; nobody may change it."""
    return _ground_truth(ground_truth, skeleton.num_joints, _file_stamp(ground_truth))


def _file_stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change when the file is replaced or written to; () if it is missing."""
    if not path.is_file():
        return ()
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _ground_truth(path: Path, num_joints: int, _stamp: tuple[int, ...]) -> dict[str, Any]:
    """The file, with what an evaluation needs and no more; nobody may change it."""
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
    """The annotation with all that the library asks for; what the file lacks as it is read.

    The number is from 1 on and takes the place of the id, since to the library id 0 means "not
    matched". An area is made of the box, as CrowdPose does.
    """
    keypoints = annotation.get("keypoints") or [0] * (3 * num_joints)
    box = annotation.get("bbox") or [0.0, 0.0, 0.0, 0.0]
    made = {"area": AREA_OF_BOX * box[2] * box[3], "iscrowd": 0}
    made["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
    given = {key: annotation[key] for key in made if annotation.get(key) is not None}
    return {
        **{"id": number, "category_id": PERSON_ID, "image_id": annotation["image_id"]},
        **{"keypoints": keypoints, "bbox": box},
        **(made | given),
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
) -> Any:
    """The library's evaluation, on records of its own, since it writes into them."""
    strange = {found["image_id"] for found in detections} - {i["id"] for i in document["images"]}
    if strange:
        raise InputError(
            "detections must be of images of the ground truth, got image ids "
            f"{sorted(strange)[:5]}; change data.{{train,val}}.annotations or the detections"
        )
    rows = np.array([found["keypoints"] for found in detections])
    corners = rows.reshape(len(detections), len(sigmas), 3)[:, :, :2]
    areas = np.ptp(corners, axis=1).prod(axis=1).tolist()
    records = [
        {**found, "id": number, "category_id": PERSON_ID, "area": area}
        for number, (found, area) in enumerate(zip(detections, areas, strict=True), start=1)
    ]
    truth = [dict(annotation) for annotation in document["annotations"]]
    evaluation = COCOeval_faster(
        COCO({**document, "annotations": truth}, print_function=_say_nothing),
        COCO({**document, "annotations": records}, print_function=_say_nothing),
        "keypoints" if kind == "coco" else "keypoints_crowd",
        print_function=_say_nothing,
        kpt_oks_sigmas=list(sigmas),
        use_area=kind == "coco",
    )
    evaluation.params.catIds = [PERSON_ID]
    # The slow part, which is the same whatever group of images is asked for.
    evaluation.computeOks = functools.cache(evaluation.computeOks)
    return evaluation


def _accumulate(evaluation: Any, image_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, areas) and recall (T, areas) of these images, -1 where nobody counts."""
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return precision[:, :, 0, :, -1], recall[:, 0, :, -1]


def _crowd_groups(document: dict[str, Any]) -> list[list[int]]:
    """Ids of the easy, the medium and the hard images; all empty where one has no crowdIndex."""
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


def _say_nothing(*_: object) -> None:
    """The library tells of its progress through this."""


def oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
    threshold: float = 0.9,
) -> np.ndarray:
    """Indices of the poses that remain, best first, when each drops those more alike than that.

    Args:
        keypoints: poses of one image, (N, K, 2), in pixels.
        scores: (N,).
        areas: square pixels, (N,).
        threshold: an OKS; 1 drops nobody.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[_alike(best, order, keypoints, areas, sigmas) <= threshold]
    return np.array(kept, np.int64)


def soft_oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
    threshold: float = 0.9,
) -> np.ndarray:
    """Indices of at most 20 poses, in the order in which they win.

    Each winner lowers the others' scores by exp(-OKS^2 / threshold), which decides who is next;
    the scores that the poses are evaluated with stay as they were. Args: as ``oks_nms``.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    left = np.asarray(scores, float)[order]
    kept: list[int] = []
    while len(order) and len(kept) < SOFT_AT_MOST:
        best, order = order[0], order[1:]
        kept.append(best)
        alike = _alike(best, order, keypoints, areas, sigmas)
        left = left[1:] * np.exp(-(alike**2) / threshold)
        again = np.argsort(-left, kind="stable")
        order, left = order[again], left[again]
    return np.array(kept, np.int64)


def oks_nms_by_image(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    image_ids: np.ndarray,
    sigmas: Sequence[float],
    threshold: float,
) -> np.ndarray:
    """Indices, ascending, of the poses that ``oks_nms`` leaves of each image; args as there.

    Args:
        image_ids: the image of each pose, (N,).
    """
    order = np.argsort(image_ids, kind="stable")
    starts = np.flatnonzero(np.diff(image_ids[order])) + 1
    kept = [
        rows[oks_nms(keypoints[rows], scores[rows], areas[rows], sigmas, threshold)]
        for rows in np.split(order, starts)
    ]
    return np.sort(np.concatenate(kept))


def _alike(
    one: int,
    others: np.ndarray,
    keypoints: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
) -> np.ndarray:
    """OKS of a pose with each of the others, (M,)."""
    area = (areas[one] + areas[others]) / 2
    every_joint = np.ones(keypoints.shape[1])
    return oks(keypoints[one], keypoints[others], every_joint, area, sigmas)
