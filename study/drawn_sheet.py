"""A sheet of drawn pictures, to look at."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from models.skeleton import COCO, Skeleton
from study.drawn_shapes import Array

TILE = 256
"""Longest side of a picture on the sheet, pixels."""


def draw_sheet(
    paths: list[Path],
    people: list[list[list[float]]],
    target: Path,
    columns: int,
    skeleton: Skeleton = COCO,
) -> int:
    """How many of the pictures were drawn, each with its people's keypoints, as a grid of tiles.

    Those that cannot be decoded are left out; where that is all, nothing is written.
    """
    tiles = []
    for path, persons in zip(paths, people, strict=True):
        picture = cv2.imread(str(path))
        if picture is None:
            continue
        scale = TILE / max(picture.shape[:2])
        large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
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


def _draw_labels(picture: Array, keypoints: list[float], scale: float, skeleton: Skeleton) -> None:
    """Keypoints as a stick figure on a picture that is enlarged by the scale."""
    points = [
        (round((x + 0.5) * scale), round((y + 0.5) * scale), v)
        for x, y, v in zip(keypoints[0::3], keypoints[1::3], keypoints[2::3], strict=True)
    ]
    for start, end in skeleton.edges:
        (ax, ay, av), (bx, by, bv) = points[start], points[end]
        if av and bv:
            names = skeleton.joints[start] + skeleton.joints[end]
            colour = (230, 230, 230)
            if ("left" in names) != ("right" in names):
                colour = (0, 150, 255) if "left" in names else (255, 170, 30)
            cv2.line(picture, (ax, ay), (bx, by), colour, 1, cv2.LINE_AA)
    for x, y, v in points:
        if v:
            cv2.circle(picture, (x, y), 2, (90, 255, 90), -1 if v == 2 else 1, cv2.LINE_AA)
