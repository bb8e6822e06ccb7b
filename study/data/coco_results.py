"""The two files that evaluations share with other people's code: boxes come in, poses go out.

Boxes are COCO detections, a JSON list of ``{image_id, category_id, bbox, score}`` with xywh in
image pixels, as the usual ``COCO_val2017_detections_AP_H_56_person.json``. Poses are COCO
keypoint results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.skeleton import Skeleton
from study.data.annotations import AREA_OF_BOX, PERSON_ID, clip_boxes, read_table
from study.data.people import People, find_neighbors
from study.errors import InputError
from study.storage.files import write_atomic

SETTING = "data.val.detections"


def read_detections(
    file: Path, annotations: Path, images: Path, skeleton: Skeleton, threshold: float
) -> People:
    """The found people of an annotation file's images, with box scores and no known keypoints.

    Boxes of other categories and other images, and those that score below the threshold, are
    left out; so are those of which nothing lies in the image, for boxes are clipped as labeled
    ones are (HRNet's reader of detections takes them as they come). An ``annotation_id`` is the
    place in the file, from 0.

    Args:
        annotations: names the images and their sizes.
        images: the images' folder.
        skeleton: whose joints are to be looked for.

    Raises:
        InputError: the file is broken or leaves nobody, or an image is not there.
    """
    found = read_entries(
        file, SETTING, "null or a JSON of COCO detections, relative to data.root", "detections"
    )
    for place, entry in enumerate(found):
        if fault := _fault_in(entry):
            raise InputError(f"{file}, detection {place} (from 0): {fault}; mend the file")
    table = read_table(annotations, skeleton)
    rows = {image: row for row, image in enumerate(table.picture_ids.tolist())}
    wanted = [
        place
        for place, entry in enumerate(found)
        if entry["category_id"] == PERSON_ID and entry["image_id"] in rows
    ]
    if not wanted:
        raise InputError(
            f"{SETTING} must hold boxes of people (category_id {PERSON_ID}) in the images of "
            f"{annotations}, got none among the {len(found)} of {file}; change {SETTING} or "
            "data.val.annotations"
        )
    places = np.array(wanted)
    image_rows = np.array([rows[found[place]["image_id"]] for place in wanted])
    scores = np.array([found[place]["score"] for place in wanted], float)
    boxes = clip_boxes(
        np.array([found[place]["bbox"] for place in wanted], float),
        table.picture_sizes[image_rows],
    )
    kept = np.flatnonzero((scores >= threshold) & (boxes[:, 2:] > 0).all(axis=1))
    if not len(kept):
        raise InputError(
            f"{SETTING} must leave a box within its image that scores at least "
            f"data.val.detection_threshold={threshold:g}, got none of {len(wanted)} in {file}, "
            f"whose highest score is {scores.max():g}; lower the threshold or change {SETTING}"
        )
    kept = kept[np.argsort(image_rows[kept], kind="stable")]
    boxes, image_rows = boxes[kept], image_rows[kept]
    paths = tuple(images / table.image_names[row] for row in image_rows)
    _require_images(file, paths)
    image_ids = table.picture_ids[image_rows]
    return People(
        annotation_ids=places[kept],
        image_ids=image_ids,
        source_ids=image_ids,
        boxes=boxes,
        areas=AREA_OF_BOX * boxes[:, 2:].prod(axis=1),
        keypoints_image=np.zeros((len(kept), skeleton.num_joints, 2)),
        visibility=np.zeros((len(kept), skeleton.num_joints), np.uint8),
        neighbors=find_neighbors(boxes, image_rows),
        image_paths=paths,
        annotations=file,
        has_source=False,
        box_scores=scores[kept],
    )


def write_poses(poses: Sequence[dict[str, Any]], file: Path) -> None:
    """The file holds these COCO keypoint results; never seen unfinished."""
    write_atomic(file, json.dumps(list(poses)))


def _fault_in(entry: Any) -> str | None:
    """What must hold of an entry and does not."""
    if not isinstance(entry, dict):
        return f"must be an object, got {str(entry)[:200]}"
    for key in ("image_id", "category_id"):
        if not isinstance(entry.get(key), int):
            return f"{key} must be a whole number, got {entry.get(key)!r}"
    if not are_finite(entry.get("bbox"), 4):
        return f"bbox must be four finite numbers, x, y, width, height, got {entry.get('bbox')!r}"
    if min(entry["bbox"][2:]) < 0:
        return f"a bbox's width and height must not be negative, got {entry['bbox']}"
    if not are_finite([entry.get("score")], 1):
        return f"score must be a finite number, got {entry.get('score')!r}"
    return None


def _require_images(file: Path, paths: Sequence[Path]) -> None:
    gone = next((path for path in dict.fromkeys(paths) if not path.is_file()), None)
    if gone is not None:
        raise InputError(
            f"images of which {file} has boxes must be there, got none at {gone}; put it there, "
            f"or change data.val.images or {SETTING}"
        )


def read_entries(path: Path, setting: str, wanted: str, kind: str) -> list[dict[str, Any]]:
    """The list that a JSON of COCO's results holds, its entries unseen.

    Args:
        setting: which names the file.
        wanted: what the setting must be.
        kind: what the entries are.

    Raises:
        InputError: it is no such list, or an empty one.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{setting} must be {wanted}, got {setting}={path} ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path} must hold a list of {kind}, at least one, got {type(entries).__name__}"
            f"{' without any' if entries == [] else ''}; change {setting}"
        )
    return entries


def are_finite(values: Any, count: int) -> bool:
    """Whether this is a list of so many numbers, none of them NaN or infinite."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) for value in values)
        and all(abs(value) <= sys.float_info.max for value in values)  # false of NaN
    )
