"""Drawings of poses on their image: limbs by side, fainter where the network is less sure."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.joint_names import split_side
from models.skeleton import Skeleton
from study.errors import InputError
from study.storage.files import atomic_path

COLORS = {"left": (255, 127, 14), "right": (40, 150, 255), "middle": (255, 225, 77)}
"""RGB of the person's own sides."""
EDGING = (0, 0, 0)
FAINTEST = 0.15
"""Opacity of a joint with score 0."""
SURE = 0.6
"""Joints with at least this score are opaque."""
LONGEST = 65500
"""Pixels of a JPEG's height or width."""


def draw_poses(
    image: NDArray[np.uint8],
    keypoints_image: NDArray[np.float64],
    scores: NDArray[np.float64],
    boxes: NDArray[np.float64],
    box_scores: NDArray[np.float64],
    skeleton: Skeleton,
) -> NDArray[np.uint8]:
    """Draw every pose on a copy of the image, the surest pose last.

    Args:
        image: (H, W, 3) RGB.
        keypoints_image: (N, K, 2).
        scores: (N, K); joints with low scores are faint.
        boxes: xywh, (N, 4); the size of the box decides how thick the limbs are.
        box_scores: (N,); people with low scores are faint.
        skeleton: supplies the limbs, and their sides by the names of the joints.
    """
    drawn = image.copy()
    sides = [split_side(joint)[0] for joint in skeleton.joints]
    opacities = (scores / SURE).clip(FAINTEST, 1) * box_scores.clip(0, 1)[:, None]
    for person in np.argsort(opacities.mean(axis=1), kind="stable"):
        thickness = max(1, round(boxes[person, 2:].max() / 80))
        joints, opacity = keypoints_image[person], opacities[person]
        for start, end in skeleton.edges:
            side = sides[start] if sides[start] == sides[end] else "middle"
            ends = joints[[start, end]]
            sure = min(opacity[start], opacity[end])
            _stroke(drawn, ends, thickness + 2, EDGING, sure / 2)
            _stroke(drawn, ends, thickness, _color(side), sure)
        for joint, side, sure in zip(joints, sides, opacity, strict=True):
            _stroke(drawn, joint[None], 2 * thickness + 3, EDGING, sure / 2)
            _stroke(drawn, joint[None], 2 * thickness + 1, _color(side), sure)
    return drawn


def _color(side: str) -> tuple[int, int, int]:
    return COLORS.get(side, COLORS["middle"])


def _stroke(
    image: NDArray[np.uint8],
    points: NDArray[np.float64],
    thickness: int,
    color: tuple[int, int, int],
    opacity: float,
) -> None:
    """Blend a line between two points, (2, 2), or a dot, (1, 2), into the image."""
    height, width = image.shape[:2]
    low = np.floor(points.min(axis=0) - thickness - 1).clip(0, (width, height)).astype(int)
    high = np.ceil(points.max(axis=0) + thickness + 2).clip(0, (width, height)).astype(int)
    if (high <= low).any():
        return
    mask = np.zeros((high - low)[::-1], np.uint8)
    ends = np.rint((points - low) * 16).astype(int).tolist()  # cv2 takes sixteenths of a pixel
    cv2.line(mask, ends[0], ends[-1], 255, thickness, cv2.LINE_AA, 4)
    share = (mask / 255 * opacity)[..., None]
    part = image[low[1] : high[1], low[0] : high[0]]
    part[:] = np.rint(part * (1 - share) + np.array(color) * share)


def write_image(file: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image (H, W, 3) as JPEG, atomically; its folder is created.

    Raises:
        InputError: the image is too large for a JPEG.
    """
    height, width = image.shape[:2]
    if max(height, width) > LONGEST:
        raise InputError(
            f"a JPEG has at most {LONGEST} pixels in each direction, got {height} x {width}"
        )
    with atomic_path(file) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())
