"""Survey a data set: its files, figures of its people, tables, a sheet of labeled images."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from models.skeleton import COCO, SKELETONS, Skeleton
from study.data.annotations import CROWD_BOUNDS, AnnotationTable
from study.data.coco_json import read_records
from study.data.synthetic.geometry import Array
from study.errors import InputError

FOLDERS = ("annotations", "json", ".")
"""Where annotation files lie in a data set: COCO's way, CrowdPose's, and all in one folder."""
OFFICIAL = "person_keypoints_*.json"
"""COCO's names of files with joints; captions and outlines lie beside them."""
SAMPLE = 50
"""Images that are looked for in a folder to tell whether it is the right one."""
AREA_BOUNDS = (32.0**2, 96.0**2)
"""Where COCO divides small, medium and large people, square pixels."""
HEIGHT_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
BLOCK = 8192
"""People whose neighbors' joints are looked at at once."""
BAR = 20
"""Characters of the longest bar."""
TILE = 256
"""Longest side of an image on the sheet, pixels."""


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
        f"{path}, annotations or json below it; name a file, and its images by --images"
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
    """The folder near the annotation file that holds most of a sample of its images.

    Raises:
        InputError: no folder holds any.
    """
    rows = np.unique(table.image_rows[table.is_used & (table.image_rows >= 0)])
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
    names = [table.images.names[row] for row in chosen]
    words = set(re.split(r"[^a-z0-9]+", table.path.stem.lower()))

    def score(folder: Path) -> tuple[int, bool]:
        # Splits may name their images alike: then the folder of the file's own split is it.
        found = sum((folder / name).is_file() for name in names)
        return found, folder.name.lower() in words

    folders = list(_folders_near(table.path))
    best = max(folders, key=score)
    if names and not score(best)[0]:
        looked = ", ".join(map(str, folders[:6])) + (" ..." if len(folders) > 6 else "")
        raise InputError(
            f"the images of {table.path} must lie near it, got none of {names[0]} and "
            f"{len(names) - 1} others in {looked}; name their folder by --images"
        )
    return best


def _folders_near(annotations: Path) -> Iterable[Path]:
    """Where the images of an annotation file may be, each once."""
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


@dataclass(frozen=True)
class Figures:
    """Counts and shares of the people whom a study would use."""

    num_images: int
    num_with_people: int
    num_annotations: int
    rows: NDArray[np.int64]
    """The people's places in the annotation file, (N,)."""
    labeled: NDArray[np.float64]
    """Share of the people who have each joint labeled, (K,)."""
    visible: NDArray[np.float64]
    """Share of those whose labeled joint is visible, (K,); NaN where nobody has it."""
    joints_per_person: NDArray[np.int64]
    """People with so many labeled joints, from 0 to K, (K + 1,)."""
    box_heights: NDArray[np.float64]
    """Pixels that 5, 25, 50, 75 and 95 % of the boxes are lower than."""
    sizes: NDArray[np.int64]
    """Small, medium and large people by COCO's bounds of the area."""
    crowd_indices: NDArray[np.float64]
    """Of each image with people, in the order of their rows."""
    is_crowd_computed: bool
    """Whether the file has no crowdIndex, so that it comes from the joints."""
    image_rows: NDArray[np.int64]
    """Rows of the images with people, ascending."""

    def crowd_groups(self) -> NDArray[np.int64]:
        """Images that are easy, medium and hard."""
        return np.bincount(np.digitize(self.crowd_indices, CROWD_BOUNDS), minlength=3)


def measure(table: AnnotationTable, left_out: Collection[int] = frozenset()) -> Figures:
    """The figures of the people without those left out by annotation id; at least one remains."""
    rows = np.flatnonzero(
        table.is_used & (table.image_rows >= 0) & ~np.isin(table.ids, list(left_out))
    )
    visibility = table.keypoints[rows, :, 2]  # (N, K)
    has_label = visibility > 0
    numbers = has_label.sum(axis=0)
    images = np.unique(table.image_rows[rows])
    given = table.images.crowd_indices[images]
    is_computed = not np.isfinite(given).any()
    with np.errstate(invalid="ignore"):
        visible = (visibility == 2).sum(axis=0) / numbers
    return Figures(
        num_images=len(table.images),
        num_with_people=len(images),
        num_annotations=len(table.ids),
        rows=rows,
        labeled=numbers / len(rows),
        visible=visible,
        joints_per_person=np.bincount(has_label.sum(axis=1), minlength=has_label.shape[1] + 1),
        box_heights=np.quantile(table.boxes[rows, 3], HEIGHT_SHARES),
        sizes=np.bincount(np.digitize(table.areas[rows], AREA_BOUNDS), minlength=3),
        crowd_indices=crowd_indices(table, rows) if is_computed else given,
        is_crowd_computed=is_computed,
        image_rows=images,
    )


def crowd_indices(table: AnnotationTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """How crowded each image of these people is, 0 to 1, by ascending row of the images.

    Mean over the people of: joints of others in a person's box over the person's own in it, at
    most 1 (Li et al., CrowdPose, CVPR 2019). From people with joints only, so it is not exactly
    what CrowdPose's file says.
    """
    order = rows[np.argsort(table.image_rows[rows], kind="stable")]
    _, starts, sizes = np.unique(table.image_rows[order], return_index=True, return_counts=True)
    first_of, size_of = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    ratios = np.zeros(len(order))
    for start in range(0, len(order), BLOCK):
        people = np.arange(start, min(start + BLOCK, len(order)))
        owners = np.repeat(people, size_of[people])  # P pairs of a box and whose joints
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
    """How many, and how large."""
    grid = Table.grid(padding=(0, 2))
    people = len(figures.rows)
    heights = "  ".join(
        f"{100 * share:.0f} %: {height:.0f}"
        for share, height in zip(HEIGHT_SHARES, figures.box_heights, strict=True)
    )
    grid.add_row("images", f"{figures.num_images}, {figures.num_with_people} with people")
    grid.add_row("annotations", f"{figures.num_annotations}")
    grid.add_row("people", f"{people}, {people / figures.num_with_people:.2f} an image with any")
    grid.add_row("labeled joints", f"{round(people * figures.labeled.sum())}")
    grid.add_row("box heights, px", heights)
    return grid


def bars_table(figures: Figures) -> Table:
    """Counts as bars: how crowded, how large, how well labeled."""
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
    groups: dict[str, dict[str, int]] = {
        f"crowdIndex {origin}": dict(
            zip(("easy", "medium", "hard"), figures.crowd_groups().tolist(), strict=True)
        ),
        "size by COCO's area": dict(
            zip(("small", "medium", "large"), figures.sizes.tolist(), strict=True)
        ),
        "labeled joints": spans,
    }
    for title, counts in groups.items():
        most = max(1, *counts.values())
        for place, (name, count) in enumerate(counts.items()):
            table.add_row(
                "" if place else title, name, str(count), "#" * round(BAR * count / most)
            )
    return table


def joints_table(figures: Figures, skeleton: Skeleton) -> Table:
    """How often each joint is labeled, and how often it is then visible."""
    table = Table("joint", box=None, padding=(0, 2))
    table.add_column("labeled, % of people", justify="right")
    table.add_column("visible, % of labeled", justify="right")
    for name, labeled, visible in zip(
        skeleton.joints, figures.labeled, figures.visible, strict=True
    ):
        seen = "-" if np.isnan(visible) else f"{100 * visible:.1f}"
        table.add_row(name, f"{100 * labeled:.1f}", seen)
    return table


def draw_sheet(
    paths: list[Path],
    people: list[list[list[float]]],
    target: Path,
    columns: int,
    skeleton: Skeleton = COCO,
) -> int:
    """How many of the images were drawn, each with its people's keypoints, as a grid of tiles.

    Those that cannot be decoded are left out; where that is all, nothing is written.
    """
    tiles = []
    for path, persons in zip(paths, people, strict=True):
        image = cv2.imread(str(path))
        if image is None:
            continue
        scale = TILE / max(image.shape[:2])
        large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for keypoints in persons:
            _draw_labels(large, keypoints, scale, skeleton)
        down, right = TILE - large.shape[0], TILE - large.shape[1]
        sides = (down // 2 + 2, down - down // 2 + 2, right // 2 + 2, right - right // 2 + 2)
        tiles.append(cv2.copyMakeBorder(large, *sides, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    count = len(tiles)
    if not tiles:
        return 0
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), np.vstack(rows)):
        raise OSError(f"cannot write {target}")
    return count


def _draw_labels(image: Array, keypoints: list[float], scale: float, skeleton: Skeleton) -> None:
    """Keypoints as a stick figure on an image that is enlarged by the scale."""
    points = [
        (round((x + 0.5) * scale), round((y + 0.5) * scale), v)
        for x, y, v in zip(keypoints[0::3], keypoints[1::3], keypoints[2::3], strict=True)
    ]
    for start, end in skeleton.edges:
        (ax, ay, av), (bx, by, bv) = points[start], points[end]
        if av and bv:
            names = skeleton.joints[start] + skeleton.joints[end]
            color = (230, 230, 230)
            if ("left" in names) != ("right" in names):
                color = (0, 150, 255) if "left" in names else (255, 170, 30)
            cv2.line(image, (ax, ay), (bx, by), color, 1, cv2.LINE_AA)
    for x, y, v in points:
        if v:
            cv2.circle(image, (x, y), 2, (90, 255, 90), -1 if v == 2 else 1, cv2.LINE_AA)
