"""OKS-NMS against the official HRNet's, and image by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.skeleton import COCO
from study.metrics import oks, oks_nms, oks_nms_by_image

SIGMAS = (0.1, 0.1)


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    found = json.loads((shared / "reference/evaluation/oks_nms.json").read_text())
    assert isinstance(found, dict)
    return found


def candidates(reference: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keypoints (N, 17, 2), scores (N,) and areas (N,)."""
    poses = reference["candidates"]
    rows = np.array([pose["keypoints"] for pose in poses]).reshape(-1, 17, 3)
    columns = (np.array([pose[key] for pose in poses]) for key in ("score", "area"))
    return rows[:, :, :2], *columns


def pose_at(x: float) -> np.ndarray:
    return np.array([[x, 0.0], [x, 10.0]])


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_official_poses_are_kept(threshold: float, reference: dict[str, Any]) -> None:
    kept = oks_nms(*candidates(reference), COCO.oks_sigmas, threshold)
    assert kept.tolist() == reference["results"][f"oks_nms_{threshold}"]


def test_oks_of_the_candidates_is_the_official_one(reference: dict[str, Any]) -> None:
    keypoints, _, areas = candidates(reference)
    area = (areas[:, None] + areas) / 2
    found = oks(keypoints[:, None], keypoints, np.ones(17), area, COCO.oks_sigmas)
    np.testing.assert_allclose(found, reference["oks"], atol=1e-9)


def test_no_poses_keep_none() -> None:
    assert oks_nms(np.zeros((0, 2, 2)), np.zeros(0), np.zeros(0), SIGMAS).shape == (0,)


def test_threshold_of_1_drops_no_pose() -> None:
    twins = np.stack([pose_at(5)] * 3)
    assert len(oks_nms(twins, np.array([0.1, 0.9, 0.5]), np.full(3, 100.0), SIGMAS, 1.0)) == 3


def test_duplicate_is_dropped_and_another_pose_stays() -> None:
    keypoints = np.stack([pose_at(0), pose_at(0), pose_at(500)])
    scores, areas = np.array([0.9, 0.8, 0.3]), np.full(3, 100.0)
    assert oks_nms(keypoints, scores, areas, SIGMAS).tolist() == [0, 2]


def test_duplicate_in_another_image_stays() -> None:
    keypoints = np.stack([pose_at(0)] * 4)
    scores, areas = np.array([0.1, 0.2, 0.3, 0.4]), np.full(4, 100.0)
    images = np.array([7, 3, 7, 3])
    kept = oks_nms_by_image(keypoints, scores, areas, images, SIGMAS, 0.9)
    assert kept.tolist() == [2, 3]


def test_all_images_at_once_equal_each_image_alone(reference: dict[str, Any]) -> None:
    keypoints, scores, areas = candidates(reference)
    images = np.arange(len(scores)) % 3
    kept = oks_nms_by_image(keypoints, scores, areas, images, COCO.oks_sigmas, 0.7)
    for image in range(3):
        rows = np.flatnonzero(images == image)
        own = oks_nms(keypoints[rows], scores[rows], areas[rows], COCO.oks_sigmas, 0.7)
        assert kept[images[kept] == image].tolist() == np.sort(rows[own]).tolist()
