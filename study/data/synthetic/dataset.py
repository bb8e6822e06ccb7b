"""The built-in data set: drawn, articulated, overlapping people in COCO's format and file names.

Nothing is downloaded. Annotations are the same bytes on every machine; images are too, except
for rounding in cv2 and its JPEG encoder. An image depends only on the seed, its split and its
number, so a larger data set begins with the images of a smaller one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.skeleton import COCO
from study.data.synthetic.geometry import Array, Rng
from study.data.synthetic.render import draw_scene, write_jpeg
from study.data.synthetic.scene import Label, compose_scene
from study.errors import InputError

DRAWING = 2
"""Raise it by one with every change that moves a label or changes the looks."""
SPLITS = ("train", "val")
MOST_IMAGES = 1_000_000
"""Most images of one split: the image ids of the next split begin there."""
QUALITY = (86, 94)
"""JPEG quality of the images."""
SETTINGS = "settings.json"
HURRIED = 0.85
"""Share of train's people labeled by an annotator in a hurry; val was labeled with care."""
SKIPPED = 0.75
"""Share of visible joints that a hurried annotator leaves unlabeled."""
FEWEST_JOINTS = 3
"""A hurried annotator labels at least this many joints."""


def dataset_settings(*, seed: int, num_train_images: int, num_val_images: int) -> dict[str, Any]:
    """Return the settings of a data set; data sets with the same settings are the same."""
    return {
        "dataset": "drawn people",
        "drawing": DRAWING,
        "seed": seed,
        # Keys of data sets on disk.
        "train_pictures": num_train_images,
        "val_pictures": num_val_images,
    }


def draw_dataset(
    root: Path,
    *,
    seed: int,
    num_train_images: int,
    num_val_images: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw the whole data set into the folder, unless it already holds this data set.

    Args:
        progress: called after each image with the number of drawn images and of all.

    Raises:
        InputError: the folder holds something else, or a data set with other settings; neither is
            deleted, since a study may be reading it.
    """
    settings = dataset_settings(
        seed=seed, num_train_images=num_train_images, num_val_images=num_val_images
    )
    if not (0 < num_train_images <= MOST_IMAGES and 0 < num_val_images <= MOST_IMAGES):
        raise InputError(
            f"a drawn data set must have 1 to {MOST_IMAGES} images in each split, got "
            f"{num_train_images=} and {num_val_images=}; change data.num_train_images or "
            "data.num_val_images"
        )
    if _is_drawn(root, settings):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.half-drawn-"))
    try:
        _draw_splits(aside / "whole", seed, (num_train_images, num_val_images), progress)
        (aside / "whole" / SETTINGS).write_text(_to_json(settings), encoding="ascii")
        _rename(aside / "whole", root, settings)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_drawn(root: Path, *, seed: int, num_train_images: int, num_val_images: int) -> bool:
    """Return whether ``draw_dataset`` with these arguments would have nothing to draw.

    Raises:
        InputError: the folder holds something else, or a data set with other settings.
    """
    settings = dataset_settings(
        seed=seed, num_train_images=num_train_images, num_val_images=num_val_images
    )
    return _is_drawn(root, settings)


def _is_drawn(root: Path, settings: dict[str, Any]) -> bool:
    """Return whether the folder holds exactly this data set; False if it is missing or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / SETTINGS
    found = _read_settings(path)
    if found == settings:
        return True
    if found.get("dataset") == settings["dataset"]:
        raise InputError(
            f"{root} must hold the drawn data set with the settings {settings}, got another one "
            f"with {found} in {path}; delete that folder or change data.root"
        )
    raise InputError(
        f"{root} must be missing, empty or a drawn data set, got other content without its "
        f"{SETTINGS}; change data.root"
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rename(whole: Path, root: Path, settings: dict[str, Any]) -> None:
    try:
        os.rename(whole, root)
    except OSError:
        # Another process may have drawn the same data set in the meantime; it is as good.
        if not _is_drawn(root, settings):
            raise


def _draw_splits(
    root: Path,
    seed: int,
    counts: tuple[int, ...],
    progress: Callable[[int, int], None] | None,
) -> None:
    (root / "annotations").mkdir(parents=True)
    done = 0
    for split, (name, count) in enumerate(zip(SPLITS, counts, strict=True)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (root / f"{name}2017").mkdir()
        for index in range(count):
            record, people, pixels, quality = draw_image(seed, split, index)
            write_jpeg(pixels, root / f"{name}2017" / record["file_name"], quality)
            images.append(record)
            annotations += people
            done += 1
            if progress is not None:
                progress(done, sum(counts))
        target = root / "annotations" / f"person_keypoints_{name}2017.json"
        target.write_text(_to_json(_to_coco(images, annotations)), encoding="ascii")


def draw_image(
    seed: int, split: int, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]], Array, int]:
    """Draw one image; return its record in COCO's images, annotations, pixels and JPEG quality."""
    scene, labels = compose_scene(seed, split, index)
    image_id = split * MOST_IMAGES + index + 1
    if SPLITS[split] == "train":
        hurry = Rng(seed, split, index, 2)
        labels = [skip_joints(label, hurry) for label in labels]
    annotations = [
        _to_annotation(label, image_id, 10 * image_id + place)
        for place, label in enumerate(labels)
    ]
    image = {
        "id": image_id,
        "file_name": f"{image_id:012d}.jpg",
        "height": scene.height,
        "width": scene.width,
        "crowdIndex": crowd_index(annotations),
    }
    rng = Rng(seed, split, index, 1)
    return image, annotations, draw_scene(scene, rng), rng.whole(*QUALITY)


def skip_joints(label: Label, hurry: Rng) -> Label:
    """Remove joints that a hurried annotator would skip; keep at least FEWEST_JOINTS."""
    is_hurried = hurry.chance(HURRIED)
    skips = [is_hurried and hurry.chance(SKIPPED) for _ in label.keypoints_image]
    kept = [v > 0 and not skip for (*_, v), skip in zip(label.keypoints_image, skips, strict=True)]
    if sum(kept) < FEWEST_JOINTS:
        return label
    joints = tuple(
        joint if keep else (0.0, 0.0, 0)
        for joint, keep in zip(label.keypoints_image, kept, strict=True)
    )
    return dataclasses.replace(label, keypoints_image=joints)


def _to_annotation(label: Label, image_id: int, annotation_id: int) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": list(label.box),
        "area": label.area,
        "num_keypoints": sum(v > 0 for *_, v in label.keypoints_image),
        "keypoints": [value for joint in label.keypoints_image for value in joint],
    }


def crowd_index(annotations: list[dict[str, Any]]) -> float:
    """Return CrowdPose's crowdIndex of an image: 0 if no joint lies in another person's box.

    It is the mean over the labeled people of (other people's labeled joints in the person's box) /
    (own labeled joints), to two digits. Unlike CrowdPose's and ``survey.crowd_indices``, it is not
    limited to 1: the annotations of drawing 2 are published with it.
    """
    joints = [_labeled_joints(annotation["keypoints"]) for annotation in annotations]
    ratios = []
    for person, (own, annotation) in enumerate(zip(joints, annotations, strict=True)):
        if not own:
            continue
        left, top, width, height = annotation["bbox"]
        others = [joint for other, rest in enumerate(joints) if other != person for joint in rest]
        within = sum(left <= x <= left + width and top <= y <= top + height for x, y in others)
        ratios.append(within / len(own))
    return round(math.fsum(ratios) / len(ratios), 2) if ratios else 0.0


def _labeled_joints(keypoints: list[float]) -> list[tuple[float, float]]:
    x, y, visibility = keypoints[0::3], keypoints[1::3], keypoints[2::3]
    return [(x[joint], y[joint]) for joint, v in enumerate(visibility) if v > 0]


def _to_coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    category = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(COCO.joints),
        "skeleton": [[start + 1, end + 1] for start, end in COCO.edges],
    }
    info = {"description": "Drawn people", "version": str(DRAWING)}
    return {
        "info": info,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [category],
    }


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n"
