"""Estimate and draw poses: ``python study/predict.py EXPORT IMAGES... --boxes BOXES.json``.

Without boxes each image is taken as one person, head to foot and not much more. With
``--poses POSES.json`` the refiner improves poses that another method has found.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # Inside a checkout: its root on the path in place of study/, whose file names would shadow
    # others.
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

BATCH_SIZE = 64
COLORS = {"left": (255, 127, 14), "right": (40, 150, 255), "middle": (255, 225, 77)}
"""RGB of the person's own sides."""
EDGING = (0, 0, 0)
FAINTEST, SURE = 0.15, 0.6
"""Opacity of a joint of score 0, and the score from which on a joint is opaque."""
EXPLANATION = """\
writes to FOLDER:
  <image's name>.jpg   the image with its poses: the person's own left orange, right blue,
                         fainter where the network is less sure
  keypoints.json         COCO keypoint results, with the file_name of each

BOXES is a COCO annotation file, whose 'images' name the images, or a detector's COCO results,
whose image_id is the number that an image's name ends in. An image without a box in it is left
out, with a warning: nobody was found there.

POSES is a COCO annotation file with keypoints, or COCO keypoint results. keypoints.json then has
its entries in their order, keypoints replaced by the export's joints and all else kept. Joints are
paired by name; one that POSES lacks, or has with score 0 or at (0, 0), starts from the network's
own. A person is cut out by 'bbox', else by the box of its joints.

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
    """The poses of these people, drawn and written to ``out``, and as COCO results.

    Raises:
        InputError: not an export, or an unreadable image; what was drawn before stays.
    """
    estimator, skeleton = load(export, device)
    _make_folder(out)
    detections: list[dict[str, Any]] = []
    for done, path in enumerate(images, start=1):
        image, found = read(path), people[path]
        boxes, scores = fitting(path, image, found)
        keypoints_image, joint_scores = estimate(estimator, skeleton, image, boxes)
        ids = np.full(len(boxes), found.image_id)
        rows = to_detections(keypoints_image, joint_scores, ids, scores)
        detections += [{**row, "file_name": path.name} for row in rows]
        drawn = draw_poses(image, keypoints_image, joint_scores, boxes, scores, skeleton)
        _write_image(out / f"{path.stem}.jpg", drawn)
        progress(done, len(images))
    _write(out / RESULTS, json.dumps(detections).encode())
    return detections


def improve(
    export: Path,
    images: Sequence[Path],
    poses: Path,
    out: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> int:
    """How many of the file's poses were improved; all are written to ``out``, and drawn.

    Raises:
        InputError: not an export with a refiner, a fault in the file, or an unreadable image.
    """
    estimator, skeleton = load(export, device)
    if estimator.refiner is None:
        raise InputError(
            f"--poses needs an export with a refiner, got {export} without one; make one by "
            "python study/export.py STUDY --refined, of a study of refine.epochs above 0"
        )
    given = read_poses(poses, images, skeleton)
    _make_folder(out)
    for done, path in enumerate(given.places, start=1):
        image, starts = read(path), given.starts(path)
        boxes = given.boxes(path, starts, (image.shape[0], image.shape[1]))
        keypoints_image, scores = estimate(estimator, skeleton, image, boxes, starts)
        given.put(path, starts, keypoints_image, scores)
        sure = given.scores(path)
        drawn = draw_poses(image, keypoints_image, scores, boxes, sure, skeleton)
        _write_image(out / f"{path.stem}.jpg", drawn)
        progress(done, len(given.places))
    _write(out / RESULTS, json.dumps(given.entries).encode())
    return sum(map(len, given.places.values()))


def load(export: Path, device: torch.device) -> tuple[RefinedPose, Skeleton]:
    """The exported estimator on the device, and the skeleton whose joints it finds."""
    try:
        estimator, info = load_export(export)
    except ValueError as error:
        raise InputError(str(error)) from None
    return estimator.to(device), SKELETONS[info["skeleton"]]


def read(path: Path) -> NDArray[np.uint8]:
    """The image, (H, W, 3) RGB."""
    if not path.stat().st_size:
        raise InputError(f"{path}: must be an image, got an empty file; replace it")
    return read_image(path)


def fitting(
    path: Path, image: NDArray[np.uint8], people: PersonBoxes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The boxes (N, 4) clipped to the image as those of a study are, and their scores (N,).

    A box with nothing inside is left out with a warning.
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
    """keypoints_image (N, K, 2) and scores (N, K) of the people in these boxes (N, 4).

    Args:
        starts: x, y in image pixels and score of the poses to improve, (N, K, 3); a joint of
            score 0 starts from the student's, as all do without.
    """
    frame = estimator.codec.frame
    affines = image_to_crop_affine(boxes, frame)
    device = next(estimator.parameters()).device
    joints = skeleton.num_joints
    keypoints, scores = [np.zeros((0, joints, 2))], [np.zeros((0, joints))]
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
        raise InputError("the export must put out numbers, got NaN; export the study again")
    return np.concatenate(keypoints), np.concatenate(scores)


def _in_crops(
    starts: NDArray[np.float64], affines: NDArray[np.float64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
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
    """A copy of the image with every pose on it, the surest last.

    Args:
        image: (H, W, 3) RGB.
        keypoints_image: (N, K, 2).
        scores: (N, K); a joint is the fainter, the lower its score.
        boxes: xywh, (N, 4); limbs are as thick as suits their size.
        box_scores: (N,); the lower, the fainter the whole person.
        skeleton: supplies the limbs, and by the joints' names their sides.
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
    """Blends a line through the points, (2, 2), or a dot, (1, 2), into the image."""
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
    """The device of that name.

    Raises:
        InputError: torch has none here.
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
    _write(file, cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())


def _write(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.writing")
    aside.write_bytes(content)
    aside.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Estimate the poses of people in images, and draw them.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", metavar="EXPORT", type=Path, help="what study/export.py wrote")
    parser.add_argument(
        "images", metavar="IMAGES", type=Path, nargs="+", help="files, or folders of them"
    )
    people_in = parser.add_mutually_exclusive_group()
    people_in.add_argument("--boxes", type=Path, help="where people are (default: whole images)")
    people_in.add_argument("--poses", type=Path, help="another method's poses, to be improved")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("poses"), help="default: poses"
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
                number = improve(options.export, images, options.poses, out, device, progress)
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
