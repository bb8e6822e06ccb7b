"""Poses of the people in one image: crops, the exported estimator, and back to the image.

``predict.py`` calls it for each image; it takes any boxes, from a file or from a detector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.build import exported_skeleton, load_export
from models.refined_pose import RefinedPose
from models.skeleton import Skeleton
from study.data.annotations import SCORED_JOINT, clip_boxes
from study.data.crops import apply_affine, image_to_crop_affine, invert_affine, warp
from study.deploy.drawing import draw_poses
from study.deploy.inputs import warn
from study.deploy.person_boxes import PersonBoxes
from study.errors import InputError
from study.metrics import to_detections

BATCH_SIZE = 64
SMALL = 0.4
"""A pose that spans less of the width and of the height is hardly that of one who fills an image.

With MoveNet Lightning, these are 57 % of 35 COCO images of several people, 76 % of 51 without any,
and of images of one person 2 % (94 crops of COCO) to 7 % (250 of LSPET), none with a good pose.
"""


class ImagePoses(NamedTuple):
    """The poses of the people in an image."""

    rows: list[dict[str, Any]]
    """COCO results."""
    drawn: NDArray[np.uint8]
    """The image with its poses, (H, W, 3) RGB."""
    is_doubtful: bool
    """Whether the image is taken as one person, but the pose is unsure or small."""


def find_poses_of(
    people: PersonBoxes,
    image: NDArray[np.uint8],
    path: Path,
    estimator: RefinedPose,
    skeleton: Skeleton,
) -> ImagePoses:
    """Estimate and draw the poses of these people.

    Args:
        image: (H, W, 3) RGB.
        path: the image's file, for warnings.
    """
    boxes, scores = clip_to_image(path, image, people)
    keypoints_image, joint_scores = estimate(estimator, skeleton, image, boxes)
    ids = np.full(len(boxes), people.image_id)
    return ImagePoses(
        to_detections(keypoints_image, joint_scores, ids, scores),
        draw_poses(image, keypoints_image, joint_scores, boxes, scores, skeleton),
        people.boxes is None and not fills_image(keypoints_image, joint_scores, image),
    )


def load_estimator(export: Path, device: torch.device) -> tuple[RefinedPose, Skeleton]:
    """Load the exported estimator onto the device; return it and the skeleton of its joints."""
    try:
        estimator, info = load_export(export)
    except ValueError as error:
        raise InputError(str(error)) from None
    return estimator.to(device), exported_skeleton(info)


def clip_to_image(
    path: Path, image: NDArray[np.uint8], people: PersonBoxes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the boxes (N, 4), clipped to the image like a study's, and their scores (N,).

    A box outside the image is left out with a warning.
    """
    height, width = image.shape[:2]
    boxes = people.boxes
    if boxes is None:
        boxes = np.array([[0.0, 0.0, width, height]])
    clipped = clip_boxes(boxes, np.array([[height, width]]))
    is_inside = (clipped[:, 2:] > 0).all(axis=1)
    if not is_inside.all():
        first = boxes[~is_inside][0].tolist()
        warn(
            f"{path}: boxes outside the image left out: {np.count_nonzero(~is_inside)} (of x, y, "
            f"width and height {first}, the image is {width} x {height} pixels)"
        )
    return clipped[is_inside], people.scores[is_inside]


def fills_image(
    keypoints_image: NDArray[np.float64], scores: NDArray[np.float64], image: NDArray[np.uint8]
) -> bool:
    """Check that the sure joints of a pose span much of the image's width or height.

    Args:
        keypoints_image: (N, K, 2).
        scores: (N, K); joints count that also count in the score of a pose.
        image: (H, W, 3).
    """
    sure = keypoints_image[scores > SCORED_JOINT]  # (J, 2)
    if not len(sure):
        return False
    height, width = image.shape[:2]
    return bool((np.ptp(sure, axis=0) >= SMALL * np.array([width, height])).any())


def estimate(
    estimator: RefinedPose,
    skeleton: Skeleton,
    image: NDArray[np.uint8],
    boxes: NDArray[np.float64],
    starts: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return keypoints_image (N, K, 2) and scores (N, K) of the people in these boxes (N, 4).

    Args:
        starts: x, y in image pixels and score of the poses to improve, (N, K, 3); joints with
            score 0 start from the student's. None: all joints do.
    """
    frame = estimator.codec.frame
    affines = image_to_crop_affine(boxes, frame)
    device = next(estimator.parameters()).device
    num_joints = skeleton.num_joints
    keypoints, scores = [np.zeros((0, num_joints, 2))], [np.zeros((0, num_joints))]
    for start in range(0, len(boxes), BATCH_SIZE):
        part = affines[start : start + BATCH_SIZE]
        cut = np.stack([warp(image, affine, frame.size) for affine in part])
        crops = torch.from_numpy(cut).to(device).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            if starts is None:
                keypoints_crop, confidence = estimator(crops)
            else:
                given = _in_crops(starts[start : start + BATCH_SIZE], part, device)
                keypoints_crop, confidence = estimator(crops, given)
        keypoints.append(apply_affine(keypoints_crop.double().cpu().numpy(), invert_affine(part)))
        scores.append(confidence.double().cpu().numpy())
    found = np.concatenate(keypoints), np.concatenate(scores)
    if not all(np.isfinite(part).all() for part in found):
        raise InputError("the export must predict finite numbers, got NaN; export the study again")
    return found


def _in_crops(
    starts: NDArray[np.float64], affines: NDArray[np.float64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions in crop pixels (B, K, 2) and scores (B, K) of the given poses."""
    poses = np.concatenate((apply_affine(starts[..., :2], affines), starts[..., 2:]), axis=-1)
    moved = torch.from_numpy(poses).float().to(device)
    return moved[..., :2], moved[..., 2]


def choose_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: torch does not have it on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device must be one that torch has here, cpu or cuda, got {name} ({reason})"
        ) from None
    return device
