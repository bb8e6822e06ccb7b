"""Shapes of drawn people: frames, capsules and boxes, and where rays of sight meet them.

Image frame: x to the right, y down, z towards the camera, all in pixels; the center of a pixel has
integer coordinates. The projection is orthographic. Labels and images use the same two functions,
so labels agree with the image. Only operations that IEEE 754 rounds exactly are used (no
reductions, no powers; sines are rounded), so that float64 results are the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = tuple[float, float, float]
Array = npt.NDArray[Any]


class Rng:
    """One random stream of the Mersenne Twister.

    Python guarantees that ``random()`` gives the same sequence for a seed in every version. So
    does numpy for its frozen RandomState, which takes twenty times as long to seed.
    """

    def __init__(self, seed: int, split: int, index: int, stream: int) -> None:
        # Hashed: the twister's own seeding gives [2] and [2, 1] the same stream.
        text = f"{seed} {split} {index} {stream}"
        self._random = random.Random(int(hashlib.sha256(text.encode()).hexdigest(), 16))

    def between(self, low: float, high: float) -> float:
        """Draw a number from low to high."""
        return low + (high - low) * self._random.random()

    def chance(self, probability: float) -> bool:
        """Draw True with this probability."""
        return self._random.random() < probability

    def whole(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def sign(self) -> int:
        """Draw 1 or -1."""
        return 1 if self.chance(0.5) else -1

    def pick(self, weights: dict[str, float]) -> str:
        """Draw a key with the probability of its weight."""
        left = self.between(0.0, 1.0) * math.fsum(weights.values())
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        return next(iter(weights))

    def grain(self, *shape: int) -> Array:
        """Draw noise from 0 to 1 in 256 steps, float32 of the shape."""
        data = self._random.randbytes(math.prod(shape))
        return np.frombuffer(data, dtype=np.uint8).reshape(shape) * np.float32(1 / 255)


def step(origin: Vector, *moves: tuple[Vector, float]) -> Vector:
    """Move from the origin by the given distances along the given directions."""
    x, y, z = origin
    for direction, distance in moves:
        x += direction[0] * distance
        y += direction[1] * distance
        z += direction[2] * distance
    return (x, y, z)


def between(first: Vector, second: Vector, share: float) -> Vector:
    """Return the point at this share of the way from the first to the second."""
    (ax, ay, az), (bx, by, bz) = first, second
    return (ax + (bx - ax) * share, ay + (by - ay) * share, az + (bz - az) * share)


def turn(first: Vector, second: Vector, degrees: float) -> tuple[Vector, Vector]:
    """Return both directions after the first is turned by the angle towards the second."""
    cosine = round(math.cos(math.radians(degrees)), 6)
    sine = round(math.sin(math.radians(degrees)), 6)
    zero = (0.0, 0.0, 0.0)
    return (
        step(zero, (first, cosine), (second, sine)),
        step(zero, (second, cosine), (first, -sine)),
    )


class Frame(NamedTuple):
    """Directions of a body part's own left, up and front in the image frame."""

    left: Vector
    up: Vector
    front: Vector

    def yaw(self, degrees: float) -> Frame:
        """Turn about the up direction: the front moves to the left."""
        front, left = turn(self.front, self.left, degrees)
        return Frame(left, self.up, front)

    def pitch(self, degrees: float) -> Frame:
        """Turn about the left direction: the top moves to the front, the bottom to the back."""
        up, front = turn(self.up, self.front, degrees)
        return Frame(self.left, up, front)

    def roll(self, degrees: float) -> Frame:
        """Turn about the front direction: the top moves to the left, the bottom to the right."""
        up, left = turn(self.up, self.left, degrees)
        return Frame(left, up, self.front)


FACING_THE_CAMERA = Frame((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))


class Capsule(NamedTuple):
    """A rod with round ends; its radius changes linearly from end to end."""

    part: str
    start: Vector
    end: Vector
    start_radius: float
    end_radius: float
    frame: Frame = FACING_THE_CAMERA
    origin: Vector = (0.0, 0.0, 0.0)
    """Origin of patterns, which are measured in the part's own frame."""

    def moved(self, by: Vector) -> Capsule:
        """Return the capsule moved by a vector."""
        start, end, origin = (
            (p[0] + by[0], p[1] + by[1], p[2] + by[2]) for p in (self.start, self.end, self.origin)
        )
        return Capsule(
            self.part, start, end, self.start_radius, self.end_radius, self.frame, origin
        )

    def bounds(self) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom in the image."""
        (ax, ay, _), (bx, by, _), ar, br = self.start, self.end, self.start_radius, self.end_radius
        return (
            min(ax - ar, bx - br),
            min(ay - ar, by - br),
            max(ax + ar, bx + br),
            max(ay + ar, by + br),
        )


class Box(NamedTuple):
    """A flat board that faces the camera, turned in the image plane."""

    part: str
    center: Vector
    half_width: float
    half_height: float
    cosine: float
    sine: float


class Axis(NamedTuple):
    """Parameters of a capsule for rays of sight: numbers, or columns for many capsules."""

    x: Any
    y: Any
    z: Any
    radius: Any
    ux: Any
    uy: Any
    length: Any
    slope: Any
    lean: Any
    taper: Any


class Hit(NamedTuple):
    """Points where rays of sight meet a capsule; every array has the rays' shape."""

    margin: Array
    """Pixels to the silhouette, positive inside."""
    depth: Array
    """z of the surface; meaningless outside the silhouette."""
    place: Array
    """Position along the axis in the image, pixels, from 0 to its length."""
    along: Array
    across: Array
    rise: Array
    """Vector from the axis to the surface: along and across the axis in the image, and up."""
    radius: Array


def axis_of(capsule: Capsule) -> Axis:
    """Return the capsule's axis; one that points at the camera gets a tiny length."""
    (ax, ay, az), (bx, by, bz) = capsule.start, capsule.end
    span = math.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
    length = max(span, 1e-3)
    ux, uy = ((bx - ax) / span, (by - ay) / span) if span > 1e-3 else (1.0, 0.0)
    slope = (bz - az) / length
    lean = slope / math.sqrt(1.0 + slope * slope)
    radius, taper = capsule.start_radius, (capsule.end_radius - capsule.start_radius) / length
    if not -1.0 < taper < 1.0:  # one end hides the other
        radius, taper = max(capsule.start_radius, capsule.end_radius), 0.0
    return Axis(ax, ay, az, radius, ux, uy, length, slope, lean, taper)


def stack_axes(capsules: Sequence[Capsule]) -> Axis:
    """Return the axes of P capsules as columns of float64, (P, 1) each."""
    table = np.array([axis_of(capsule) for capsule in capsules], dtype=np.float64)
    return Axis(*table.T[:, :, None])


def _nearest(axis: Axis, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Return position along and across the axis, radius there, and distance past the ends."""
    dx, dy = x - axis.x, y - axis.y
    along = dx * axis.ux + dy * axis.uy
    across = dy * axis.ux - dx * axis.uy
    nearest = np.minimum(np.maximum(along, 0.0), axis.length)
    return along, across, axis.radius + axis.taper * nearest, along - nearest


def in_silhouette(axis: Axis, x: Array, y: Array) -> Array:
    """Return whether each ray of sight through (x, y) meets the capsule."""
    _, across, radius, past = _nearest(axis, x, y)
    return across * across + past * past < radius * radius


def meet_capsule(axis: Axis, x: Array, y: Array) -> Hit:
    """Return where rays of sight through (x, y) meet the capsule.

    The result is exact for a constant radius, and close to it for a radius that changes.
    """
    along, across, radius, past = _nearest(axis, x, y)
    square = across * across
    margin = radius - np.sqrt(square + past * past)
    height = radius * radius - square
    reach = np.sqrt(np.maximum(height, 0.0))
    place = np.minimum(np.maximum(along + axis.lean * reach, 0.0), axis.length)
    beyond = along - place
    rise = np.sqrt(np.maximum(height - beyond * beyond, 0.0))
    depth = axis.z + axis.slope * place + rise
    return Hit(margin, depth, place, beyond, across, rise, radius)


def meet_box(box: Box, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return pixels to the board's edge, positive inside, and the position on it (right, down)."""
    dx, dy = x - box.center[0], y - box.center[1]
    right = dx * box.cosine + dy * box.sine
    down = dy * box.cosine - dx * box.sine
    margin = np.minimum(box.half_width - np.abs(right), box.half_height - np.abs(down))
    return margin, right, down
