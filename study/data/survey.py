"""Survey a data set: find its files, measure its people, print tables, draw labeled images."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from models.joint_names import LEFT, RIGHT, match_joints, split_side
from models.skeleton import SKELETONS, Skeleton
from study.data.annotations import CROWD_BOUNDS, AnnotationTable
from study.data.categories import category_id, person_category
from study.data.coco_json import read_records
from study.data.image_files import (
    SYSTEM_FOLDER,
    decode_image,
    has_similar_file,
    is_file,
    is_system_file,
)
from study.data.skeleton_file import first_names
from study.errors import InputError
from study.storage.files import atomic_path

FOLDERS = ("annotations", "json", ".")
"""Folders of annotation files in a data set: COCO's, CrowdPose's, and all in one folder."""
OFFICIAL = "person_keypoints_*.json"
"""COCO's files with joints; those with captions and outlines are in the same folder."""
SAMPLE = 50
"""Images searched in a folder to decide whether it is the right one."""
AREA_BOUNDS = (32.0**2, 96.0**2)
"""COCO's bounds between small, medium and large people, square pixels."""
HEIGHT_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of box heights that are shown."""
BLOCK = 8192
"""People compared with the others of their images at once."""
BAR = 20
"""Characters of the longest bar."""
TILE = 256
"""Longest side of an image on the sheet, pixels."""
GAP = 2
"""Width of the white border of a tile, pixels."""


def annotation_files(path: Path) -> list[Path]:
    """Return the file itself, or the annotation files of a data set's folder, by name.

    Raises:
        InputError: the path does not exist, or the folder has no such file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"PATH must be a folder or an annotation file, got {path}; correct it")
    for folder in FOLDERS:
        inside = path / folder
        found = sorted(inside.glob(OFFICIAL)) or sorted(inside.glob("*.json"))
        if found := [f for f in found if not is_system_file(f) and _starts_an_object(f)]:
            return found
    raise InputError(
        "a data set's folder must hold annotation files (*.json in COCO's format), got none in "
        f"{path}, annotations or json below it; give a file, and its images by --images"
    )


def _starts_an_object(file: Path) -> bool:
    """Check that the file may hold annotations; a detector's results, for example, are a list."""
    try:
        with file.open("rb") as content:
            return not content.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:  # reported once its records are read
        return True


def find_skeleton(annotations: Path, category: str | None = None) -> Skeleton:
    """Return the known skeleton whose joints the people of the file have.

    It is the one with the names of the category's joints, otherwise with as many joints as most
    labeled people.

    Args:
        category: name of the people's category; None finds it.

    Raises:
        InputError: no known skeleton has these joints, or no person has joints.
    """
    categories: Any = ()
    lengths: dict[int, Counter[int]] = {}  # of labeled people, by category
    for key, record in read_records(annotations):
        if key == "categories":
            categories = record
        keypoints = record.get("keypoints") if isinstance(record, dict) else None
        if key == "annotations" and isinstance(keypoints, list) and any(keypoints[2::3]):
            number = record.get("category_id")
            counts = lengths.setdefault(number if isinstance(number, int) else -1, Counter())
            counts[len(keypoints)] += 1
    chosen = person_category(categories, annotations, category, lengths)
    names = chosen.get("keypoints")
    is_named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    for skeleton in SKELETONS.values():
        if is_named and match_joints(names or (), skeleton.joints).order is not None:
            return skeleton
    if not lengths:
        raise InputError(
            "the annotations must have 'keypoints', got none with a labeled joint in "
            f"{annotations}; use the file of the data set that has them"
        )
    number = category_id(chosen)
    counts = lengths.get(-1 if number is None else number, next(iter(lengths.values())))
    length = counts.most_common(1)[0][0]
    for skeleton in SKELETONS.values():
        if 3 * skeleton.num_joints == length:
            return skeleton
    known = ", ".join(f"{s.num_joints} ({name})" for name, s in SKELETONS.items())
    named = f": {first_names(names)}" if is_named and names else ""
    raise InputError(
        f"people must have the joints of a known skeleton, {known}, got {length / 3:g} joints in "
        f"{annotations}{named}; use --skeleton from_data, or --skeleton FILE.yaml with your own"
    )


def find_images(table: AnnotationTable) -> Path:
    """Return the folder near the annotation file that holds most of a sample of its images.

    Raises:
        InputError: no folder holds any of them.
    """
    rows = np.unique(table.image_rows[table.is_used & (table.image_rows >= 0)])
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
    names = [table.images.names[row] for row in chosen]
    words = set(re.split(r"[^a-z0-9]+", table.path.stem.lower()))

    def score(folder: Path) -> tuple[int, bool]:
        # Two splits may use the same file names: then the folder with the split's name wins.
        found = sum(is_file(folder / name) for name in names)
        return found, folder.name.lower() in words

    folders = list(_folders_near(table.path))
    best = max(folders, key=score)
    if names and not score(best)[0]:
        similar = [f for f in folders if any(has_similar_file(f, name) for name in names)]
        if similar:  # the audit names both spellings
            return similar[0]
        searched = ", ".join(map(str, folders[:6])) + (" ..." if len(folders) > 6 else "")
        raise InputError(
            f"the images of {table.path} must lie near it, got none of {names[0]} and "
            f"{len(names) - 1} others in {searched}; give their folder by --images"
        )
    return best


def _folders_near(annotations: Path) -> Iterable[Path]:
    """Return the folders that may hold the images of an annotation file, each once."""
    tops = [annotations.parent, annotations.parent.parent]
    if annotations.parent.name not in FOLDERS:
        tops.pop()
    found: dict[Path, None] = {}
    for top in tops:
        for folder in (top, top / "images"):
            if folder.is_dir():
                found[folder] = None
                inside = sorted(p for p in folder.iterdir() if p.is_dir())
                found.update((p, None) for p in inside if p.name != SYSTEM_FOLDER)
    return found


def train_file_of(val: Path, files: Iterable[Path]) -> Path | None:
    """Return the training file that belongs to a validation file by its name, or None."""
    wanted = val.with_name(re.sub(r"val(?!id)|valid(ation)?", "train", val.name))
    return wanted if wanted != val and wanted in files else None


@dataclass(frozen=True)
class Figures:
    """Counts and shares of the people whom a study would use."""

    num_images: int
    num_with_people: int
    num_annotations: int
    rows: NDArray[np.int64]
    """Rows of the people in the annotation table, (N,)."""
    labeled: NDArray[np.float64]
    """Share of the people who have each joint labeled, (K,)."""
    visible: NDArray[np.float64]
    """Share of each joint's labels that are visible, (K,); NaN if it has none."""
    joints_per_person: NDArray[np.int64]
    """Number of people with 0, 1 .. K labeled joints, (K + 1,)."""
    box_heights: NDArray[np.float64]
    """Quantiles HEIGHT_SHARES of the box heights, pixels."""
    sizes: NDArray[np.int64]
    """Number of small, medium and large people by COCO's bounds of the area."""
    image_rows: NDArray[np.int64]
    """Rows of the images with people, ascending, (M,)."""
    crowd_indices: NDArray[np.float64]
    """crowdIndex of these images, (M,)."""
    is_crowd_computed: bool
    """Whether crowdIndex is computed from the joints because the file has none."""

    def crowd_groups(self) -> NDArray[np.int64]:
        """Return the number of easy, medium and hard images."""
        return np.bincount(np.digitize(self.crowd_indices, CROWD_BOUNDS), minlength=3)


def measure(table: AnnotationTable, left_out: Collection[int] = frozenset()) -> Figures:
    """Measure the people who are not left out by annotation id, at least one."""
    rows = np.flatnonzero(
        table.is_used & (table.image_rows >= 0) & ~np.isin(table.ids, list(left_out))
    )
    visibility = table.keypoints[rows, :, 2]  # (N, K)
    has_label = visibility > 0
    num_labels = has_label.sum(axis=0)
    image_rows = np.unique(table.image_rows[rows])
    given = table.images.crowd_indices[image_rows]
    is_computed = not np.isfinite(given).any()
    with np.errstate(invalid="ignore"):
        visible = (visibility == 2).sum(axis=0) / num_labels
    return Figures(
        num_images=len(table.images),
        num_with_people=len(image_rows),
        num_annotations=len(table.ids),
        rows=rows,
        labeled=num_labels / len(rows),
        visible=visible,
        joints_per_person=np.bincount(has_label.sum(axis=1), minlength=has_label.shape[1] + 1),
        box_heights=np.quantile(table.boxes[rows, 3], HEIGHT_SHARES),
        sizes=np.bincount(np.digitize(table.areas[rows], AREA_BOUNDS), minlength=3),
        image_rows=image_rows,
        crowd_indices=crowd_indices(table, rows) if is_computed else given,
        is_crowd_computed=is_computed,
    )


def crowd_indices(table: AnnotationTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute crowdIndex, 0 to 1, of each image of these people, by ascending row of the images.

    It is the mean over the people of: other people's joints in the person's box over the person's
    own joints there; at most 1 (Li et al., CrowdPose, CVPR 2019). Only people with joints are
    known here, so it differs a little from CrowdPose's file.
    """
    order = rows[np.argsort(table.image_rows[rows], kind="stable")]
    _, starts, sizes = np.unique(table.image_rows[order], return_index=True, return_counts=True)
    first_of, size_of = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    ratios = np.zeros(len(order))
    for start in range(0, len(order), BLOCK):
        people = np.arange(start, min(start + BLOCK, len(order)))
        owners = np.repeat(people, size_of[people])  # whose box, in each of P pairs
        begins = np.cumsum(size_of[people]) - size_of[people]
        others = first_of[owners] + np.arange(len(owners)) - np.repeat(begins, size_of[people])
        boxes = table.boxes[order[owners], None]  # (P, 1, 4)
        joints = table.keypoints[order[others]]  # (P, K, 3)
        offset = joints[..., :2] - boxes[..., :2]
        inside = ((offset >= 0) & (offset <= boxes[..., 2:])).all(axis=2) & (joints[..., 2] > 0)
        counts = inside.sum(axis=1)
        own = counts[owners == others]
        ratios[people] = (np.add.reduceat(counts, begins) - own) / np.maximum(own, 1)
    return np.minimum(np.add.reduceat(ratios, starts) / sizes, 1)


def counts_table(figures: Figures) -> Table:
    """Return a table of the numbers of images, people and joints, and of box heights."""
    grid = Table.grid(padding=(0, 2))
    people = len(figures.rows)
    heights = "  ".join(
        f"{100 * share:.0f} %: {height:.0f}"
        for share, height in zip(HEIGHT_SHARES, figures.box_heights, strict=True)
    )
    grid.add_row("images", f"{figures.num_images}, {figures.num_with_people} with people")
    grid.add_row("annotations", f"{figures.num_annotations}")
    per_image = people / figures.num_with_people
    grid.add_row("people", f"{people}, {per_image:.2f} per image with people")
    grid.add_row("labeled joints", f"{round(people * figures.labeled.sum())}")
    grid.add_row("box heights, px", heights)
    return grid


def bars_table(figures: Figures) -> Table:
    """Return a table with bars: people by crowding, size and number of labeled joints."""
    table = Table(box=None, padding=(0, 2))
    for heading in ("", "", "number", ""):
        table.add_column(heading, justify="right" if heading else "left")
    origin = "from the joints" if figures.is_crowd_computed else "of the file"
    joints = figures.joints_per_person
    edges = np.unique(np.linspace(1, len(joints), 6).astype(int)).tolist()
    spans = {
        f"{start} to {stop - 1}": int(joints[start:stop].sum())
        for start, stop in itertools.pairwise(edges)
    }
    crowding = zip(("easy", "medium", "hard"), figures.crowd_groups().tolist(), strict=True)
    sizes = zip(("small", "medium", "large"), figures.sizes.tolist(), strict=True)
    groups: dict[str, dict[str, int]] = {
        f"crowdIndex {origin}": dict(crowding),
        "size by COCO's area": dict(sizes),
        "labeled joints": spans,
    }
    for title, counts in groups.items():
        most = max(1, *counts.values())
        for place, (name, count) in enumerate(counts.items()):
            bar = "#" * round(BAR * count / most)
            table.add_row("" if place else title, name, str(count), bar)
    return table


def joints_table(figures: Figures, skeleton: Skeleton) -> Table:
    """Return a table of how often each joint is labeled, and how often a label is visible."""
    table = Table("joint", box=None, padding=(0, 2))
    table.add_column("labeled, % of people", justify="right")
    table.add_column("visible, % of labeled", justify="right")
    rows = zip(skeleton.joints, figures.labeled, figures.visible, strict=True)
    for name, labeled, visible in rows:
        share = "-" if np.isnan(visible) else f"{100 * visible:.1f}"
        table.add_row(name, f"{100 * labeled:.1f}", share)
    return table


def draw_sheet(
    paths: list[Path],
    people: list[list[list[float]]],
    target: Path,
    columns: int,
    skeleton: Skeleton,
) -> bool:
    """Draw images with their people's keypoints as a grid of tiles.

    Images that cannot be decoded are left out; nothing is written if none can.

    Args:
        people: keypoints of each person of each image, x, y and visibility in image pixels.
        columns: tiles in a row.

    Returns:
        Whether the sheet was written.
    """
    tiles = []
    for path, persons in zip(paths, people, strict=True):
        image = decode_image(path.read_bytes()) if is_file(path) else "missing"
        if isinstance(image, str):
            continue
        scale = TILE / max(image.shape[:2])
        large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for keypoints in persons:
            _draw_labels(large, keypoints, scale, skeleton)
        tiles.append(_pad_tile(large))
    if not tiles:
        return False
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    with atomic_path(target) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", np.vstack(rows))[1].tobytes())
    return True


def _pad_tile(image: cv2.typing.MatLike) -> cv2.typing.MatLike:
    """Center the image on a white tile."""
    down, right = TILE - image.shape[0], TILE - image.shape[1]
    return cv2.copyMakeBorder(
        image,
        top=down // 2 + GAP,
        bottom=down - down // 2 + GAP,
        left=right // 2 + GAP,
        right=right - right // 2 + GAP,
        borderType=cv2.BORDER_CONSTANT,
        value=(255, 255, 255),
    )


def _draw_labels(
    image: cv2.typing.MatLike, keypoints: list[float], scale: float, skeleton: Skeleton
) -> None:
    """Draw keypoints as a stick figure on an image enlarged by the scale."""
    points = [
        (round((x + 0.5) * scale), round((y + 0.5) * scale), v)
        for x, y, v in zip(keypoints[0::3], keypoints[1::3], keypoints[2::3], strict=True)
    ]
    for start, end in skeleton.edges:
        (ax, ay, av), (bx, by, bv) = points[start], points[end]
        if av and bv:
            sides = {split_side(skeleton.joints[joint])[0] for joint in (start, end)}
            color = (230, 230, 230)
            if (LEFT in sides) != (RIGHT in sides):
                color = (0, 150, 255) if LEFT in sides else (255, 170, 30)
            cv2.line(image, (ax, ay), (bx, by), color, 1, cv2.LINE_AA)
    for x, y, v in points:
        if v:
            cv2.circle(image, (x, y), 2, (90, 255, 90), -1 if v == 2 else 1, cv2.LINE_AA)
