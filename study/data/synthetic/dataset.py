"""The built-in dataset: drawn, articulated, overlapping people in COCO's format and file names.

Nothing is downloaded. Annotations are the same bytes on every machine; images are, but for how
cv2 and its JPEG encoder round. An image depends on the seed, its split and its number alone, so a
larger dataset begins with a smaller one's images.
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
"""Raised by one whenever a change moves a label or the looks."""
SPLITS = ("train", "val")
MOST_IMAGES = 1_000_000
"""Of one split: the next split's image ids begin there."""
QUALITY = (86, 94)
"""JPEG quality of the images."""
SETTINGS = "settings.json"
HURRIED = 0.85
"""Of the people in train, those whom the annotator labeled in a hurry; val was done with care."""
SKIPPED = 0.75
"""Of a hurried annotator's joints, those left unlabeled though they could be seen."""
FEWEST_JOINTS = 3
"""A hurried annotator labels at least so many."""


def dataset_settings(*, seed: int, num_train_images: int, num_val_images: int) -> dict[str, Any]:
    """What decides a dataset's content; two datasets with the same settings are the same."""
    return {
        "dataset": "drawn people",
        "drawing": DRAWING,
        "seed": seed,
        # Names that data sets on disk have.
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
    """Leave the whole dataset in the folder; one that is there with these settings is kept.

    Args:
        progress: called with the images drawn and all images, after each image.

    Raises:
        InputError: the folder holds something else, or a dataset with other settings: neither is
            deleted, since a study may be reading it.
    """
    settings = dataset_settings(
        seed=seed, num_train_images=num_train_images, num_val_images=num_val_images
    )
    if not (0 < num_train_images <= MOST_IMAGES and 0 < num_val_images <= MOST_IMAGES):
        raise InputError(
            f"a drawn dataset has 1 to {MOST_IMAGES} images in each split, "
            f"got {num_train_images=} and {num_val_images=}"
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
    """Whether ``draw_dataset`` with these arguments has nothing left to draw.

    Raises:
        InputError: as there.
    """
    settings = dataset_settings(
        seed=seed, num_train_images=num_train_images, num_val_images=num_val_images
    )
    return _is_drawn(root, settings)


def _is_drawn(root: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very dataset; False where it is missing or empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / SETTINGS
    found = _read_settings(path)
    if found == settings:
        return True
    if found.get("dataset") == settings["dataset"]:
        raise InputError(
            f"{root} must hold the drawn dataset that is asked for, got another one: {path} says "
            f"{found}, asked for {settings}; delete that folder or change data.root"
        )
    raise InputError(
        f"{root} must be missing, empty or a drawn dataset, got other content without our "
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
        # Another process may have drawn the same dataset meanwhile: its work is as good.
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
            image, people, picture, quality = draw_image(seed, split, index)
            write_jpeg(picture, root / f"{name}2017" / image["file_name"], quality)
            images.append(image)
            annotations += people
            done += 1
            if progress is not None:
                progress(done, sum(counts))
        target = root / "annotations" / f"person_keypoints_{name}2017.json"
        target.write_text(_to_json(_to_coco(images, annotations)), encoding="ascii")


def draw_image(
    seed: int, split: int, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]], Array, int]:
    """One image's entry in COCO's images, its annotations, its pixels and its JPEG quality."""
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
    """The label as an annotator leaves it who may be in a hurry; at least FEWEST_JOINTS stay."""
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
    """CrowdPose's measure of an image: 0 where nobody's joints lie in another's box.

    The mean over the labeled people of (labeled joints of all others inside the person's box) /
    (own labeled joints), to two digits.
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
