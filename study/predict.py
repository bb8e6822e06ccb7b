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

import numpy as np
import torch

from study.data.crops import read_image
from study.deploy.drawing import draw_poses, write_image
from study.deploy.estimation import choose_device, clip_to_image, estimate, load_estimator
from study.deploy.given_poses import read_poses
from study.deploy.inputs import RESULTS, PersonBoxes, check_targets, find_images, find_people
from study.display import Display, escape_unprintable
from study.errors import InputError
from study.metrics import to_detections
from study.storage.files import write_atomic

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
        write_image(out / f"{path.stem}.jpg", drawn)
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
        write_image(out / f"{path.stem}.jpg", drawn)
        progress(done, len(given.places))
    write_atomic(out / RESULTS, json.dumps(given.entries))
    return sum(map(len, given.places.values()))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out must be a folder to write to, got {out} ({error})") from None


def main(arguments: Sequence[str] | None = None) -> None:
    escape_unprintable()
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
