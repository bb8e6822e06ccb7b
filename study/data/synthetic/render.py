"""Scenes to images: shaded capsules in a depth buffer over textured backgrounds.

Every part is intersected as for the labels (``geometry.py``). An unfinished image is planar,
(3, height, width).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from study.data.synthetic.appearance import (
    OUTFIT,
    TEXTURED,
    Color,
    Look,
    Tones,
    draw_color,
    draw_look,
    texture,
    tones_of,
)
from study.data.synthetic.geometry import (
    Array,
    Axis,
    Box,
    Capsule,
    Hit,
    Rng,
    axis_of,
    meet_box,
    meet_capsule,
)
from study.data.synthetic.scene import LAYER, Scene

# Difficulty of the images.
CLUTTER = 2
"""Mean number of distracting shapes behind the people."""
CONFUSED = 0.15
"""Share of clutter, occluders and backgrounds in the colors of a person."""
SAME_OUTFIT = 0.1
"""Share of images whose people all wear the same outfit."""
GRAIN = (1.5, 5.0)
"""Least and most noise, gray levels, one standard deviation."""

Window = tuple[slice, slice]


class Piece(NamedTuple):
    """A capsule and its colors; with a look, the trunk and the head are textured."""

    capsule: Capsule
    tones: Tones
    look: Look | None = None


class Canvas:
    """An unfinished image: colors, and the depth of the topmost surface."""

    def __init__(
        self, background: Array, light: tuple[float, float, float], ambient: float
    ) -> None:
        self.colors = background
        _, self.height, self.width = background.shape
        self.depth = np.full((self.height, self.width), -1e6, dtype=np.float32)
        self.y, self.x = np.indices(self.depth.shape, dtype=np.float32)
        self.light = light
        self.ambient = ambient

    def window(self, bounds: tuple[float, float, float, float]) -> Window | None:
        """Return rows and columns that the bounds touch; None outside the image."""
        x0, y0 = max(int(bounds[0]) - 1, 0), max(int(bounds[1]) - 1, 0)
        x1, y1 = min(int(bounds[2]) + 3, self.width), min(int(bounds[3]) + 3, self.height)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def lay(self, where: Window, cover: Array, depth: Array, colors: Array) -> None:
        """Blend in colors (3, ...) where they are nearer than the present surface."""
        below = self.depth[where]
        cover = cover * (depth > below)
        patch = self.colors[:, *where]
        patch += cover * (colors - patch)
        np.copyto(below, depth, where=cover > 0.5)

    def lay_pieces(self, pieces: Sequence[Piece]) -> None:
        """Draw capsules, the far ones first, so that near edges blend over them.

        The rays of all pieces are intersected at once.
        """
        order = sorted(pieces, key=lambda p: p.capsule.start[2] + p.capsule.end[2])
        found = [(piece, self.window(piece.capsule.bounds())) for piece in order]
        seen = [(piece, where) for piece, where in found if where is not None]
        if not seen:
            return
        x = np.concatenate([self.x[where].ravel() for _, where in seen])
        y = np.concatenate([self.y[where].ravel() for _, where in seen])
        sizes = [(w[0].stop - w[0].start) * (w[1].stop - w[1].start) for _, w in seen]
        axes = [axis_of(piece.capsule) for piece, _ in seen]
        axis = Axis(*np.repeat(np.array(axes, dtype=np.float32).T, sizes, axis=1))
        hit = meet_capsule(axis, x, y)
        cover = np.minimum(np.maximum(hit.margin + np.float32(0.5), 0), 1)
        paint = _paint_tones(seen, axes, sizes, hit.place)
        shade = self._shade(axis, hit)
        start = 0
        for (piece, where), size in zip(seen, sizes, strict=True):
            rays = slice(start, start + size)
            colors, depth = paint[:, rays], hit.depth[rays]
            if piece.look is not None and piece.capsule.part in TEXTURED:
                colors = texture(piece.capsule, piece.look, depth, x[rays], y[rays])
            shape = self.depth[where].shape
            lit = (colors * shade[rays]).reshape(3, *shape)
            self.lay(where, cover[rays].reshape(shape), depth.reshape(shape), lit)
            start += size

    def _shade(self, axis: Axis, hit: Hit) -> Array:
        lx, ly, lz = (np.float32(value) for value in self.light)
        shine = hit.along * (axis.ux * lx + axis.uy * ly) + hit.rise * lz
        shine += hit.across * (axis.ux * ly - axis.uy * lx)
        shine /= hit.radius
        return self.ambient + (1.0 - self.ambient) * np.maximum(shine, 0)

    def lay_box(self, box: Box, color: Color) -> None:
        """Draw a board with a grain and a bright rim."""
        reach = box.half_width + box.half_height
        x, y, z = box.center
        where = self.window((x - reach, y - reach, x + reach, y + reach))
        if where is None:
            return
        margin, right, down = meet_box(box, self.x[where], self.y[where])
        cover = np.minimum(np.maximum(margin + np.float32(0.5), 0), 1)
        grain = 0.82 + 0.1 * ((right * 0.21) % 1 < 0.5) + 0.12 * (margin > 2) - 0.004 * down
        paint = np.array(color, dtype=np.float32)[:, None, None] * grain.astype(np.float32)
        self.lay(where, cover, np.full_like(cover, z), paint)

    def lay_shadow(self, bounds: tuple[float, float, float, float]) -> None:
        """Darken the floor below a body."""
        left, _, right, bottom = bounds
        half_width, half_height = 0.42 * (right - left) + 3, 3.5
        x, y = (left + right) / 2, bottom - 2
        where = self.window((x - half_width, y - half_height, x + half_width, y + half_height))
        if where is not None:
            dx, dy = (self.x[where] - x) / half_width, (self.y[where] - y) / half_height
            self.colors[:, *where] *= 1 - 0.5 * np.maximum(1 - dx * dx - dy * dy, 0)


def _paint_tones(
    seen: Sequence[tuple[Piece, Window]], axes: list[Axis], sizes: list[int], place: Array
) -> Array:
    """Return the color of each of N rays by its position on the axis of its piece, (3, N)."""
    rows = [
        (*first, *second, share * axis.length)
        for ((_, (first, second, share), _), _), axis in zip(seen, axes, strict=True)
    ]
    columns = np.repeat(np.array(rows, dtype=np.float32).T, sizes, axis=1)
    rest = np.minimum(np.maximum(place - columns[6] + np.float32(0.5), 0), 1)
    return columns[:3] + rest * (columns[3:6] - columns[:3])


def draw_scene(scene: Scene, rng: Rng) -> Array:
    """Draw a scene as an image, uint8 BGR, (height, width, 3)."""
    looks = [draw_look(rng, body) for body in scene.bodies]
    if rng.chance(SAME_OUTFIT):
        shared = {name: getattr(looks[0], name) for name in OUTFIT}
        looks = [dataclasses.replace(look, **shared) for look in looks]
    background = _draw_background(scene, looks, rng)
    light = (rng.between(-0.8, 0.8), -0.45, 0.75)
    canvas = Canvas(background, light, rng.between(0.35, 0.6))
    pieces = _lay_clutter(canvas, looks, rng)
    for body, look in zip(scene.bodies, looks, strict=True):
        canvas.lay_shadow(body.bounds())
        pieces += [Piece(part, tones_of(part.part, look), look) for part in body.parts]
    colors = {part: _any_color(looks, rng) for part in ("pole", "box")}
    for shape in scene.occluders:
        if isinstance(shape, Capsule):
            pieces.append(_plain(shape, colors.get(shape.part) or _leaf_color(rng)))
    canvas.lay_pieces(pieces)
    for shape in scene.occluders:
        if isinstance(shape, Box):
            canvas.lay_box(shape, colors["box"])
    return _develop(canvas.colors, rng)


def _plain(capsule: Capsule, color: Color) -> Piece:
    return Piece(capsule, (color, color, 1.0))


def _leaf_color(rng: Rng) -> Color:
    return (rng.between(20, 80), rng.between(90, 190), rng.between(30, 120))


def _any_color(looks: list[Look], rng: Rng) -> Color:
    if not rng.chance(CONFUSED):
        return draw_color(rng, 0.8)
    look = looks[rng.whole(0, len(looks) - 1)]
    return (look.skin, look.shirt, look.trousers, look.hair)[rng.whole(0, 3)]


def _lay_clutter(canvas: Canvas, looks: list[Look], rng: Rng) -> list[Piece]:
    """Draw boards behind all people; return poles, bent limbs and balls, which are drawn later."""
    pieces = []
    for item in range(rng.whole(0, 2 * CLUTTER)):
        x, y = rng.between(0, canvas.width), rng.between(0, canvas.height)
        z, color = -LAYER * 8 + 20.0 * item, _any_color(looks, rng)
        kind = rng.pick({"limb": 3, "board": 2, "ball": 1, "pole": 1})
        if kind == "board":
            half = rng.between(6, 30), rng.between(6, 30)
            canvas.lay_box(Box("box", (x, y, z), *half, 1.0, 0.0), color)
            continue
        start, radius = (x, y, z), rng.between(2.5, 7.0)
        reach = {"limb": 26.0, "ball": 0.0, "pole": 120.0}[kind]
        for _ in range(2 if kind == "limb" else 1):
            end = (
                start[0] + rng.between(-reach, reach),
                start[1] + rng.between(-reach, reach),
                z,
            )
            pieces.append(_plain(Capsule("pole", start, end, radius, radius * 0.8), color))
            start, radius = end, radius * 0.8
    return pieces


def _draw_background(scene: Scene, looks: list[Look], rng: Rng) -> Array:
    """Draw a wall and a floor with a gradient, blotches and perhaps a pattern, planar."""
    height, width = scene.height, scene.width
    first, second, floor = _any_color(looks, rng), draw_color(rng, 0.6), draw_color(rng, 0.6)
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    rows = np.array(first, np.float32) * (1 - ramp) + ramp * np.array(second, np.float32)
    horizon = rng.whole(height // 2, height)
    rows[horizon:] = 0.35 * rows[horizon:] + 0.65 * np.array(floor, np.float32)
    background = np.repeat(rows[:, None], width, axis=1)
    _lay_pattern(background, rng)
    cells = rng.whole(3, 12), rng.whole(3, 12)
    coarse = rng.grain(*cells, 3) * 0.4 + rng.grain(*cells, 1) * 0.6 - 0.5
    blotches = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    background += blotches * rng.between(10, 120)
    return np.ascontiguousarray(background.transpose(2, 0, 1))


def _lay_pattern(background: Array, rng: Rng) -> None:
    kind = rng.pick({"none": 3, "stripes": 2, "tiles": 2, "blobs": 2})
    height, width = background.shape[:2]
    pitch, strength = rng.between(7, 30), rng.between(-50, 50)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    if kind == "stripes":
        slant = rng.between(-1, 1)
        across = (x + slant * y) if rng.chance(0.5) else (y + slant * x)
        background += (np.float32(strength) * ((across / pitch) % 1 < 0.5))[..., None]
    elif kind == "tiles":
        lines = ((x / pitch) % 1 < 0.12) | ((y / pitch) % 1 < 0.12)
        background += (np.float32(strength) * lines)[..., None]
    elif kind == "blobs":
        for _ in range(rng.whole(3, 14)):
            center = (rng.whole(0, width), rng.whole(0, height))
            axes = (rng.whole(3, 26), rng.whole(3, 26))
            color = draw_color(rng, 0.6)
            cv2.ellipse(background, center, axes, rng.between(0, 180), 0, 360, color, -1)


def _develop(colors: Array, rng: Rng) -> Array:
    """Apply exposure, a little blur and grain; turn planar colors into BGR pixels."""
    contrast, brightness = rng.between(0.8, 1.15), rng.between(-18, 18)
    grain = rng.grain(*colors.shape[1:]) - np.float32(0.5)
    grain *= np.float32(3.46 * rng.between(*GRAIN))
    colors *= np.float32(contrast)
    colors += grain + np.float32(128.5 + brightness - 128 * contrast)
    pixels = np.clip(colors, 0, 255, out=colors).astype(np.uint8).transpose(1, 2, 0)
    if rng.chance(0.5):
        return cv2.GaussianBlur(np.ascontiguousarray(pixels), (3, 3), rng.between(0.3, 0.8))
    return np.ascontiguousarray(pixels)


def write_jpeg(image: Array, target: Path, quality: int) -> None:
    """Write the image as a JPEG file."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    target.write_bytes(data.tobytes())
