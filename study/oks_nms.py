"""Poses of the same person found twice: OKS non-maximum suppression, hard and soft, as HRNet's.

All joints of two poses count, and the area is the mean of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from study.metrics import oks

SOFT_AT_MOST = 20
"""The soft kind keeps no more poses of a picture (HRNet's ``max_dets``)."""


def oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
    threshold: float = 0.9,
) -> np.ndarray:
    """Indices of the poses that remain, best first, when each drops those more alike than that.

    Args:
        keypoints: poses of one picture, (N, K, 2), in pixels.
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


def oks_nms_by_picture(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    image_ids: np.ndarray,
    sigmas: Sequence[float],
    threshold: float,
) -> np.ndarray:
    """Indices, ascending, of the poses that ``oks_nms`` leaves of each picture; args as there.

    Args:
        image_ids: the picture of each pose, (N,).
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
