"""From a pose estimator and stored crops to AP over all people, for any number of workers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore
from study.config.schema import Kind
from study.data.crops import apply_affine, invert_affine, stored_to_crop_affine
from study.errors import TrainingDiverged
from study.metrics import average_precision, oks_nms_by_image, to_detections
from study.training.batches import evaluation_batches
from study.workers import Workers

BATCH_SIZE = 64


class Estimator(Protocol):
    """A pose estimator of single people in crops."""

    @property
    def frame(self) -> CropFrame: ...

    def __call__(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return keypoints (B, K, 2) in pixels of the crops (B, 3, h, w), and scores (B, K)."""


def predict_crops(
    estimator: Estimator,
    store: CropStore,
    skeleton: Skeleton,
    workers: Workers,
    count: int | None = None,
    starts: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predict keypoints in stored-crop pixels (N, K, 2) and scores (N, K), on every worker.

    Args:
        count: predict only for the first ``count`` people.
        starts: poses that a ``RefinedPose`` refines, x and y in stored-crop pixels and score,
            (N, K, 3); None refines the student's.
    """
    count = len(store) if count is None else min(count, len(store))
    frame = estimator.frame
    rows, poses, scores = [], [], []
    with torch.inference_mode():
        for part, batch in evaluation_batches(
            store, skeleton, frame, count, BATCH_SIZE, workers, starts
        ):
            if batch.start_crop is None:
                pose, score = estimator(batch.crops)
            else:
                assert isinstance(estimator, RefinedPose)
                start = batch.start_crop
                pose, score = estimator(batch.crops, (start[..., :2], start[..., 2]))
            rows.append(part.numpy())
            poses.append(pose.double().cpu().numpy())
            scores.append(score.double().cpu().numpy())
    crop_to_stored = invert_affine(stored_to_crop_affine(frame))
    mine = (rows, poses, scores)
    keypoints = np.full((count, *store.keypoints_stored.shape[1:]), np.nan)
    confidence = np.full(keypoints.shape[:2], np.nan)
    for part_rows, part_poses, part_scores in workers.gather(mine):
        for row, pose, score in zip(part_rows, part_poses, part_scores, strict=True):
            keypoints[row] = apply_affine(pose, crop_to_stored[None])
            confidence[row] = score
    return keypoints, confidence


def detect_people(
    estimator: Estimator,
    store: CropStore,
    skeleton: Skeleton,
    workers: Workers,
    starts: NDArray[np.float32] | None = None,
    nms_threshold: float = 1.0,
) -> list[dict[str, Any]]:
    """Return COCO results, in image pixels, for all people or detected boxes of a store.

    Args:
        starts: as in ``predict_crops``.
        nms_threshold: drop the lower-scoring of two poses in an image whose OKS is above this;
            1 drops none.

    Raises:
        TrainingDiverged: a keypoint or score is not finite.
    """
    keypoints, scores = predict_crops(estimator, store, skeleton, workers, starts=starts)
    if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
        raise TrainingDiverged(
            "keypoints and scores must be finite, got NaN or infinity from the network; lower the "
            "learning rate"
        )
    stored_to_image = invert_affine(store.image_to_stored)
    keypoints_image = apply_affine(keypoints, stored_to_image)
    box_scores = np.ones(len(store)) if store.box_scores is None else store.box_scores
    poses = to_detections(keypoints_image, scores, store.image_ids, box_scores)
    if nms_threshold == 1:
        return poses
    kept = oks_nms_by_image(
        keypoints_image,
        np.array([pose["score"] for pose in poses]),
        _crop_areas(store),
        store.image_ids,
        skeleton.oks_sigmas,
        nms_threshold,
    )
    return [poses[place] for place in kept]


def _crop_areas(store: CropStore) -> NDArray[np.float64]:
    """Areas of the widened boxes, square image pixels; HRNet's OKS-NMS uses these."""
    height, width = store.input_size
    zoom = np.linalg.det(store.image_to_stored[..., :2])
    return np.asarray(height * width / zoom)


def evaluate(
    estimator: Estimator,
    store: CropStore,
    truth: Path,
    skeleton: Skeleton,
    kind: Kind,
    workers: Workers,
    starts: NDArray[np.float32] | None = None,
) -> dict[str, float]:
    """Return AP and its variants over all people of a store, the same on every worker.

    Figures without people, such as the AP of large people if there are none, are left out.

    Args:
        truth: COCO-format ground truth of the same images.
        kind: the rules of evaluation, coco or crowdpose.
        starts: as in ``predict_crops``.
    """
    detections = detect_people(estimator, store, skeleton, workers, starts)
    scores = None
    if workers.rank == 0:
        figures = average_precision(truth, detections, skeleton, kind)
        scores = {name: value for name, value in figures.items() if not math.isnan(value)}
    result = workers.from_first(scores)
    assert isinstance(result, dict)
    return result
