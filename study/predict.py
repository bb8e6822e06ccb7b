"""Estimate and draw poses: ``python study/predict.py EXPORT IMAGES... --boxes BOXES.json``.

Without boxes each image is taken as one person, who should fill it. With ``--poses POSES.json``
the refiner improves poses that another method found.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # In a checkout, replace study/ on the path by the root: names of its files would hide others.
    sys.path[0] = os.path.dirname(HERE)

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models.build import load_export
from models.refined_pose import RefinedPose
from models.skeleton import SKELETONS, Skeleton
from study.data.annotations import clip_boxes
from study.data.crops import apply_affine, image_to_crop_affine, invert_affine, read_image, warp
from study.deploy.given_poses import read_poses
from study.deploy.inputs import (
    RESULTS,
    PersonBoxes,
    check_targets,
    find_images,
    find_people,
    warn,
)
from study.display import Display
from study.errors import InputError
from study.metrics import to_detections
from study.storage.files import atomic_path, write_atomic

BATCH_SIZE = 64
COLORS = {"left": (255, 127, 14), "right": (40, 150, 255), "middle": (255, 225, 77)}
"""RGB of the person's own sides."""
EDGING = (0, 0, 0)
FAINTEST = 0.15
"""Opacity of a joint with score 0."""
SURE = 0.6
"""Joints with at least this score are opaque."""
EXPLANATION = """\
writes to FOLDER:
  <image's name>.jpg   the image with its poses: the person's own left side in orange, the right
                         side in blue, fainter where the network is less sure
  keypoints.json         COCO keypoint results, with the file_name of each image

BOXES is a COCO annotation file whose 'images' name the images, or a detector's COCO results whose
image_id is the number that an image's name ends in. An image without a box is left out, with a
warning.

POSES is a COCO annotation file with keypoints, or COCO keypoint results; images are matched as
with BOXES. keypoints.json then has the entries of POSES in their order, with the keypoints
replaced by the export's joints and all other keys kept. Joints are paired by name. A joint that
POSES lacks, or has with score 0 or at (0, 0), starts from the network's own estimate. A person is
cropped by 'bbox', or, without it, by the box of the joints.

examples:
  python study/predict.py studies/drawn-joint-joint/export person.jpg
  python study/predict.py studies/coco/export val2017 --boxes person_keypoints_val2017.json
  python study/predict.py studies/coco/export val2017 --poses other_method.json --out better
"""


def predict(
    export: Path,
    images: Sequence[Path],
    people: Mapping[Path, PersonBoxes],
    out: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Estimate the poses of these people, draw them, and write them as COCO results.

    Raises:
        InputError: ``export`` is no export, or an image cannot be decoded; images that were
            drawn before remain.
    """
    estimator, skeleton = load_estimator(export, device)
    _make_folder(out)
    detections: list[dict[str, Any]] = []
    for done, path in enumerate(images, start=1):
        image, found = read_image(path), people[path]
        boxes, scores = clip_to_image(path, image, found)
        keypoints_image, joint_scores = estimate(estimator, skeleton, image, boxes)
        ids = np.full(len(boxes), found.image_id)
        rows = to_detections(keypoints_image, joint_scores, ids, scores)
        detections += [{**row, "file_name": path.name} for row in rows]
        drawn = draw_poses(image, keypoints_image, joint_scores, boxes, scores, skeleton)
        _write_image(out / f"{path.stem}.jpg", drawn)
        progress(done, len(images))
    write_atomic(out / RESULTS, json.dumps(detections))
    return detections


def improve_poses(
    export: Path,
    images: Sequence[Path],
    poses: Path,
    out: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> int:
    """Improve a file's poses in these images, draw them, and write all entries of the file.

    Returns:
        The number of improved poses.

    Raises:
        InputError: the export has no refiner, an entry of the file is broken, or an image cannot
            be decoded.
    """
    estimator, skeleton = load_estimator(export, device)
    if estimator.refiner is None:
        raise InputError(
            f"--poses needs an export with a refiner, got {export} without one; create one by "
            "python study/export.py STUDY --refined, from a study with refine.epochs above 0"
        )
    given = read_poses(poses, images, skeleton)
    _make_folder(out)
    for done, path in enumerate(given.places, start=1):
        image, starts = read_image(path), given.starts(path)
        boxes = given.boxes(path, starts, (image.shape[0], image.shape[1]))
        keypoints_image, scores = estimate(estimator, skeleton, image, boxes, starts)
        given.put(path, starts, keypoints_image, scores)
        drawn = draw_poses(image, keypoints_image, scores, boxes, given.scores(path), skeleton)
        _write_image(out / f"{path.stem}.jpg", drawn)
        progress(done, len(given.places))
    write_atomic(out / RESULTS, json.dumps(given.entries))
    return sum(map(len, given.places.values()))


def load_estimator(export: Path, device: torch.device) -> tuple[RefinedPose, Skeleton]:
    """Load the exported estimator onto the device; return it and the skeleton of its joints."""
    try:
        estimator, info = load_export(export)
    except ValueError as error:
        raise InputError(str(error)) from None
    return estimator.to(device), SKELETONS[info["skeleton"]]


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
        warn(f"{path}: boxes outside the image left out: {np.count_nonzero(~is_inside)}")
    return clipped[is_inside], people.scores[is_inside]


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
    if not np.isfinite(keypoints[-1]).all():
        raise InputError("the export must predict finite numbers, got NaN; export the study again")
    return np.concatenate(keypoints), np.concatenate(scores)


def _in_crops(
    starts: NDArray[np.float64], affines: NDArray[np.float64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions in crop pixels (B, K, 2) and scores (B, K) of the given poses."""
    poses = np.concatenate((apply_affine(starts[..., :2], affines), starts[..., 2:]), axis=-1)
    moved = torch.from_numpy(poses).float().to(device)
    return moved[..., :2], moved[..., 2]


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
    sides = [joint.split("_")[0] for joint in skeleton.joints]
    opacities = (scores / SURE).clip(FAINTEST, 1) * box_scores[:, None]
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


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out must be a folder to write to, got {out} ({error})") from None


def _write_image(file: Path, image: NDArray[np.uint8]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Estimate the poses of people in images, and draw them.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "export", metavar="EXPORT", type=Path, help="folder that study/export.py wrote"
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=Path, nargs="+", help="image files, or folders of them"
    )
    people_in = parser.add_mutually_exclusive_group()
    people_in.add_argument(
        "--boxes", type=Path, help="JSON file of the people's boxes (default: whole images)"
    )
    people_in.add_argument(
        "--poses", type=Path, help="JSON file of another method's poses, which are improved"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("poses"),
        help="folder to write to (default: poses)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options = parser.parse_args(arguments)
    display = Display("auto")
    try:
        device = choose_device(options.device)
        images = find_images(options.images)
        out = options.out
        if options.poses is not None:
            check_targets(images, options.poses, out)
            with display.meters() as meter:
                progress = meter("improving poses")
                number = improve_poses(
                    options.export, images, options.poses, out, device, progress
                )
        else:
            images, people = find_people(images, options.boxes)
            check_targets(images, options.boxes, out)
            with display.meters() as meter:
                progress = meter("estimating poses")
                found = predict(options.export, images, people, out, device, progress)
                number = len(found)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{number} poses in {len(images)} images, drawn and listed in {out}")


if __name__ == "__main__":
    main()
