"""Estimate and draw poses: ``python study/predict.py EXPORT IMAGES... --boxes BOXES.json``.

With ``--detector DETECTOR.onnx`` a detector finds the people; without it and boxes each image is
taken as one person, who should fill it. ``--video FILE`` takes the frames of a video as images.
With ``--poses POSES.json`` the refiner improves poses that another method found.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
if os.path.isfile(os.path.join(HERE, "__init__.py")):
    # In a checkout, replace study/ on the path by the root: names of its files would hide others.
    sys.path[0] = os.path.dirname(HERE)
import study  # noqa: F401  (checks the working folder before torch is imported)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages load

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from study.config.typed_paths import typed_path
from study.deploy.detector import FAMILIES, THRESHOLD, Detector, DetectorOptions, open_detector
from study.deploy.drawing import draw_poses
from study.deploy.estimation import choose_device, estimate, find_poses_of, load_estimator
from study.deploy.given_poses import read_poses
from study.deploy.inputs import RESULTS, GivenImage, find_images, first_names, read_given, warn
from study.deploy.outputs import Outputs, check_targets, listed
from study.deploy.person_boxes import PersonBoxes, find_people
from study.deploy.video import predict_video
from study.display import Display, escape_unprintable
from study.errors import InputError
from study.interrupts import AGAIN, ends_in_one_line
from study.storage.files import is_full_disk

EXPLANATION = """\
writes to FOLDER:
  <image's name>.jpg   the image with its poses: the person's own left side in orange, the right
                         side in blue, fainter where the network is less sure
  keypoints.json         COCO keypoint results, with the file_name of each image

A folder is searched with its sub-folders, which are kept in FOLDER and in file_name; hidden files
are passed over. Images that cannot be used are left out and listed at the end, and the exit
status is 1.

BOXES is a COCO annotation file whose 'images' name the images, with the folders if names are
equal, or a detector's COCO results, whose entries have a file_name or, as image_id, the number
that an image's name ends in. What may be two images is refused. Only boxes of people count: of
the category named person, or with category_id 1. If the file has height and width of an image,
they must be those of the image. An image without a box is left out, with a warning.

DETECTOR.onnx is a person detector, run by onnxruntime: YOLOX, RTMDet, YOLOv5 or later, with or
without NMS in the file. Its outputs show which it is; a line states how it is understood. Classes
without names are COCO's. An image without a person is drawn without poses, with a warning.

VIDEO is any video that OpenCV reads. FOLDER then gets <video's name>.mp4 with the poses, without
sound, and keypoints.json, where image_id is the number of the frame, from 0, and time_s its time.
Ctrl-C keeps the frames that are done.

POSES is a COCO annotation file with keypoints, or COCO keypoint results; images are matched as
with BOXES. keypoints.json then has the entries of POSES in their order, with the keypoints
replaced by the export's joints and all other keys kept. Joints are paired by name. A joint that
POSES lacks, or has with score 0 or at (0, 0), starts from the network's own estimate. A person is
cropped by 'bbox', or, without it, by the box of the joints.

examples:
  python study/predict.py studies/drawn-joint-joint/export person.jpg
  python study/predict.py studies/coco/export photos --detector yolox_s.onnx
  python study/predict.py studies/coco/export --video clip.mp4 --detector yolox_s.onnx
  python study/predict.py studies/coco/export val2017 --boxes person_keypoints_val2017.json
  python study/predict.py studies/coco/export val2017 --poses other_method.json --out better
"""


def predict(
    export: Path,
    people: Mapping[GivenImage, PersonBoxes],
    detector: Detector | None,
    outputs: Outputs,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> int:
    """Estimate the poses of these people, draw them, and write them as COCO results.

    Args:
        detector: finds the people of each image, in place of the given ones.

    Returns:
        The number of poses.

    Raises:
        InputError: ``export`` is no export, or no image can be used.
    """
    estimator, skeleton = load_estimator(export, device)
    outputs.make_folder()
    detections: list[dict[str, Any]] = []
    doubtful: list[str] = []
    empty: list[str] = []
    for done, (image, found) in enumerate(people.items(), start=1):
        try:
            pixels = read_given(image, found.image_size)
        except InputError as error:
            outputs.unusable[image.path] = str(error)
        else:
            if detector is not None:
                found = detector.people(pixels, found.image_id)
            poses = find_poses_of(found, pixels, image.path, estimator, skeleton)
            if not poses.rows:
                empty.append(image.name)
            if poses.is_doubtful:
                doubtful.append(image.name)
            detections += [{**row, "file_name": image.name} for row in poses.rows]
            outputs.draw(image, poses.drawn)
        progress(done, len(people))
    outputs.write(detections, len(people))
    if doubtful:
        warn(
            f"in {len(doubtful)} of {len(people)} images the pose is unsure or small "
            f"({first_names(doubtful)}): without --boxes each image is taken as one person who "
            "fills it; give the people's boxes by --boxes, or a detector by --detector"
        )
    if empty and detector is not None:
        warn(
            f"the detector finds no person in {len(empty)} of {len(people)} images "
            f"({first_names(empty)})"
        )
    return len(detections)


def improve_poses(
    export: Path,
    images: Sequence[GivenImage],
    poses: Path,
    outputs: Outputs,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Improve a file's poses in these images, draw them, and write all entries of the file.

    The entries of an image that cannot be used stay as they are.

    Returns:
        The number of improved poses, and the number of images with entries.

    Raises:
        InputError: the export has no refiner, an entry of the file is broken, or no image can be
            used.
    """
    estimator, skeleton = load_estimator(export, device)
    if estimator.refiner is None:
        raise InputError(
            f"--poses needs an export with a refiner, got {export} without one; create one by "
            "python study/export.py STUDY --refined, from a study with refine.epochs above 0"
        )
    given = read_poses(poses, images, skeleton)
    outputs.make_folder()
    improved = 0
    for done, image in enumerate(given.places, start=1):
        starts = given.starts(image)
        try:
            pixels = read_given(image, given.sizes[image])
            boxes = given.boxes(image, starts, (pixels.shape[0], pixels.shape[1]))
        except InputError as error:
            outputs.unusable[image.path] = str(error)
        else:
            keypoints_image, scores = estimate(estimator, skeleton, pixels, boxes, starts)
            given.put(image, starts, keypoints_image, scores)
            box_scores = given.scores(image)
            drawn = draw_poses(pixels, keypoints_image, scores, boxes, box_scores, skeleton)
            outputs.draw(image, drawn)
            improved += len(boxes)
        progress(done, len(given.places))
    outputs.write(given.entries, len(given.places))
    return improved, len(given.places)


def check_options(options: argparse.Namespace) -> None:
    """Check that the options fit together.

    Raises:
        InputError: two options exclude each other, or one lacks another.
    """
    if bool(options.images) == (options.video is not None):
        got = "both" if options.images else "neither"
        raise InputError(f"either IMAGES or --video must be given, got {got}")
    if options.video is not None and (options.boxes or options.poses):
        got = "--boxes" if options.boxes else "--poses"
        raise InputError(
            f"--video takes people from --detector, or each frame as one person, got {got}; leave "
            "it out"
        )
    if not 0 <= options.detector_threshold <= 1:
        raise InputError(f"--detector-threshold must be 0 to 1, got {options.detector_threshold}")
    chosen = (options.detector_threshold, options.detector_family, options.detector_class)
    if options.detector is None and chosen != (THRESHOLD, None, None):
        raise InputError("--detector-threshold, -family and -class need --detector, got none")


def run(options: argparse.Namespace) -> str:
    """Run the command; return what is missing in the results, if anything is.

    Raises:
        InputError: an argument is wrong, or no image can be used.
    """
    display, out = Display("auto"), options.out
    check_options(options)
    device, outputs = choose_device(options.device), Outputs(out)
    detector = None
    if options.detector is not None:
        threshold, family = options.detector_threshold, options.detector_family
        given = DetectorOptions(options.detector, threshold, family, options.detector_class)
        detector = open_detector(given, device)
        display.notify(detector.summary)
    if options.video is not None:
        return run_video(options, detector, outputs, device, display)
    images, unlisted = find_images(options.images, out)
    if options.poses is not None:
        check_targets(images, options.poses, out)
        with display.meters() as meter:
            progress = meter("improving poses")
            number, used = improve_poses(
                options.export, images, options.poses, outputs, device, progress
            )
    else:
        people = find_people(images, options.boxes)
        check_targets(list(people), options.boxes, out)
        with display.meters() as meter:
            progress = meter("estimating poses")
            number = predict(options.export, people, detector, outputs, device, progress)
        used = len(people)
    used -= len(outputs.unusable)
    print(f"{number} poses in {used} images, drawn and listed in {out}")
    missing = listed(unlisted | outputs.unusable | outputs.undrawn)
    return f"not all images are in the results:{missing}" if missing else ""


def run_video(
    options: argparse.Namespace,
    detector: Detector | None,
    outputs: Outputs,
    device: torch.device,
    display: Display,
) -> str:
    """Do what ``run`` does, for a video."""
    file: Path = options.video
    with display.meters() as meter:
        progress = meter("estimating poses")
        found = predict_video(options.export, file, detector, outputs, device, progress)
    number = found.num_frames
    frames = f"the first {number} frames" if found.is_stopped else f"{number} frames"
    print(f"{found.num_poses} poses in {frames}, drawn and listed in {outputs.out}")
    if found.is_stopped:
        raise KeyboardInterrupt(f"interrupted; the first {number} frames of {file} are written")
    if found.is_cut_off:
        return (
            f"{file} is cut off or damaged, only {number} frames could be read; they are written. "
            "Copy the video again if it was longer"
        )
    return ""


@ends_in_one_line()
def main(arguments: Sequence[str] | None = None) -> None:
    escape_unprintable()
    parser = argparse.ArgumentParser(
        description="Estimate the poses of people in images, and draw them.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "export", metavar="EXPORT", type=typed_path, help="folder that study/export.py wrote"
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=typed_path, nargs="*", help="images, or folders of them"
    )
    parser.add_argument("--video", type=typed_path, help="video, in place of images")
    people_in = parser.add_mutually_exclusive_group()
    people_in.add_argument(
        "--boxes", type=typed_path, help="JSON file of the people's boxes (default: whole images)"
    )
    people_in.add_argument(
        "--poses", type=typed_path, help="JSON file of another method's poses, which are improved"
    )
    people_in.add_argument(
        "--detector", metavar="DETECTOR.onnx", type=typed_path, help="ONNX file that finds people"
    )
    parser.add_argument(
        "--detector-threshold",
        metavar="SCORE",
        type=float,
        default=THRESHOLD,
        help=f"lowest score of a person, 0 to 1 (default: {THRESHOLD})",
    )
    parser.add_argument(
        "--detector-family",
        choices=FAMILIES,
        help="which pixels the detector takes (default: its outputs show it)",
    )
    parser.add_argument(
        "--detector-class",
        metavar="NUMBER",
        type=int,
        help="number of its class that is the person (default: by its names, or as in COCO)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=typed_path,
        default=Path("poses"),
        help="folder to write to (default: poses)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options = parser.parse_args(arguments)
    out = options.out
    try:
        missing = run(options)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        unwritten = f"{AGAIN}, since {out / RESULTS} was not written"
        raise KeyboardInterrupt(*error.args or (unwritten,)) from None
    except OSError as error:
        if is_full_disk(error):
            sys.exit(
                f"error: disk full: no space left on the disk of {out}, and {out / RESULTS} was "
                "not written; free some and run the same command again"
            )
        raise
    if missing:
        sys.exit(f"error: {missing}")


if __name__ == "__main__":
    main()
