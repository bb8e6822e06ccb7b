"""Which annotation files lie in a folder, where their pictures are, and whose joints they name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from models.skeleton import SKELETONS, Skeleton
from study.annotation_table import AnnotationTable
from study.config import InputError
from study.json_records import read_records

FOLDERS = ("annotations", "json", ".")
"""Where annotation files lie in a data set: COCO's way, CrowdPose's, and all in one folder."""
OFFICIAL = "person_keypoints_*.json"
"""COCO's names of files with joints; captions and outlines lie beside them."""
SAMPLE = 50
"""Pictures that are looked for in a folder to tell whether it is the right one."""


def annotation_files(path: Path) -> list[Path]:
    """The file itself, or those of a data set's folder that are JSON objects, by name.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"PATH must be a folder or an annotation file, got {path}: correct it")
    for folder in FOLDERS:
        inside = path / folder
        found = sorted(inside.glob(OFFICIAL)) or sorted(inside.glob("*.json"))
        if found := [file for file in found if _starts_an_object(file)]:
            return found
    raise InputError(
        "a data set's folder must hold annotation files (*.json in COCO's format), got none in "
        f"{path}, annotations or json below it; name a file, and its pictures by --images"
    )


def _starts_an_object(file: Path) -> bool:
    """Whether it may be an annotation file: results of a detector, say, are lists."""
    with file.open("rb") as content:
        return not content.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def find_skeleton(annotations: Path) -> Skeleton:
    """The skeleton with as many joints as the first person in the file has.

    Raises:
        InputError: there is no such, or nobody has joints.
    """
    for key, record in read_records(annotations):
        keypoints = record.get("keypoints") if isinstance(record, dict) else None
        if key == "annotations" and isinstance(keypoints, list) and keypoints:
            for skeleton in SKELETONS.values():
                if 3 * skeleton.num_joints == len(keypoints):
                    return skeleton
            known = ", ".join(f"{s.num_joints} ({name})" for name, s in SKELETONS.items())
            raise InputError(
                f"people must have the joints of a known skeleton, {known}, got "
                f"{len(keypoints) / 3:g} joints in {annotations}; add yours to models/skeleton.py"
            )
    raise InputError(
        f"the annotations must have 'keypoints', got none in {annotations}; is it another file "
        "of the data set that has them?"
    )


def find_images(table: AnnotationTable) -> Path:
    """The folder near the annotation file that holds most of a sample of its pictures.

    Raises:
        InputError: no folder holds any.
    """
    rows = np.unique(table.image_rows[table.is_used & (table.image_rows >= 0)])
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
    names = [table.image_names[row] for row in chosen]
    words = set(re.split(r"[^a-z0-9]+", table.path.stem.lower()))

    def score(folder: Path) -> tuple[int, bool]:
        # Splits may name their pictures alike: then the folder of the file's own split is it.
        found = sum((folder / name).is_file() for name in names)
        return found, folder.name.lower() in words

    folders = list(_folders_near(table.path))
    best = max(folders, key=score)
    if names and not score(best)[0]:
        looked = ", ".join(map(str, folders[:6])) + (" ..." if len(folders) > 6 else "")
        raise InputError(
            f"the pictures of {table.path} must lie near it, got none of {names[0]} and "
            f"{len(names) - 1} others in {looked}; name their folder by --images"
        )
    return best


def _folders_near(annotations: Path) -> Iterable[Path]:
    """Where the pictures of an annotation file may be, each once."""
    tops = [annotations.parent, annotations.parent.parent]
    if annotations.parent.name not in FOLDERS:
        tops.pop()
    found: dict[Path, None] = {}
    for top in tops:
        for folder in (top, top / "images"):
            if folder.is_dir():
                found[folder] = None
                found.update((p, None) for p in sorted(folder.iterdir()) if p.is_dir())
    return found


def train_file_of(val: Path, files: Iterable[Path]) -> Path | None:
    """The file that a validation file is held out of, by its name; none where there is none."""
    wanted = val.with_name(re.sub(r"val(?!id)|valid(ation)?", "train", val.name))
    return wanted if wanted != val and wanted in files else None
