"""Compose a drawn scene: people, occluders in front of them, and the labels of an annotator.

A scene depends only on (seed, split, index). Its labels are computed from geometry, not pixels.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from models.skeleton import COCO
from study.data.synthetic.body import FACE, Body, build_body
from study.data.synthetic.geometry import (
    Array,
    Axis,
    Box,
    Capsule,
    Rng,
    Vector,
    axis_of,
    in_silhouette,
    meet_box,
    meet_capsule,
    stack_axes,
)

# Difficulty of the images, as shares of images unless stated otherwise.
CROWDED = 0.38
"""Images with two or three people who overlap."""
THREE_OF_CROWDED = 0.15
"""Of the crowded images, those with three people."""
OCCLUDED = 0.22
"""Images with an object in front of a person."""
CUT = 0.07
"""Images whose border cuts off a person."""
UNLABELED = 0.6
"""Share of joints left unlabeled, of those hidden together with all their neighbors."""

SIDES = (120, 168)
"""Shortest and longest side of an image, pixels."""
STATURES = (72.0, 116.0)
"""Height of a person who stands straight, pixels."""
LAYER = 1000.0
"""Depth between two people, pixels: the nearer one is completely in front."""
MIN_VISIBLE = 5
"""A person with fewer visible joints is uncovered, or taken out of the image."""
MOST_REPAIRS = 8
"""Attempts to do so; a curled-up person may still show fewer joints."""

OCCLUDERS = {"pole": 2.0, "box": 2.5, "fence": 1.2, "plant": 2.0, "table": 1.5}
"""How often each occluder is drawn."""


@dataclasses.dataclass(frozen=True)
class Label:
    """Annotation of one person, in image pixels."""

    keypoints_image: tuple[tuple[float, float, int], ...]
    """x, y, visibility of COCO's joints."""
    box: tuple[float, float, float, float]
    """xywh around the drawn body, clipped to the image."""
    area: float
    """Silhouette inside the image, including hidden parts."""


@dataclasses.dataclass
class Scene:
    """People and the objects in front of them."""

    height: int
    width: int
    bodies: list[Body]
    whims: list[list[float]]
    """Number from 0 to 1 per person and joint; below UNLABELED a hidden joint gets no label."""
    occluders: list[Capsule | Box]


def compose_scene(seed: int, split: int, index: int) -> tuple[Scene, list[Label]]:
    """Compose the scene of one image, in which every person is visible, and its labels."""
    rng = Rng(seed, split, index, 0)
    height, width = rng.whole(*SIDES), rng.whole(*SIDES)
    count = 1
    if rng.chance(CROWDED):
        count = 3 if rng.chance(THREE_OF_CROWDED) else 2
    layers = _shuffled(rng, count)
    bodies: list[Body] = []
    for place in range(count):
        stature = min(rng.between(*STATURES), 0.85 * height)
        body = build_body(rng, stature)
        x, y = _beside(rng, bodies[0], body) if place else _inside(rng, body, height, width)
        bodies.append(body.moved((x, y, LAYER * layers[place])))
    whims = [[rng.between(0.0, 1.0) for _ in COCO.joints] for _ in bodies]
    scene = Scene(height, width, bodies, whims, [])
    if rng.chance(OCCLUDED):
        target = bodies[rng.whole(0, count - 1)]
        scene.occluders = _draw_occluder(rng, target, height)
    return _without_hidden_people(scene)


def _inside(rng: Rng, body: Body, height: int, width: int) -> tuple[float, float]:
    """Draw a move that puts the body into the image, or partly over one border."""
    left, top, right, bottom = body.bounds()
    x = -left + _slack(rng, width - (right - left))
    # More people stand on the ground than hang from the ceiling.
    y = -top + max(_slack(rng, height - (bottom - top)), _slack(rng, height - (bottom - top)))
    if rng.chance(CUT):
        if rng.chance(0.6):
            x += rng.sign() * rng.between(0.2, 0.5) * width
        else:
            y += rng.between(0.15, 0.5) * (height if rng.chance(0.75) else -height)
        center_x, center_y = x + (left + right) / 2, y + (top + bottom) / 2
        x += min(max(center_x, 0.08 * width), 0.92 * width) - center_x
        y += min(max(center_y, 0.08 * height), 0.92 * height) - center_y
    return x, y


def _slack(rng: Rng, space: float) -> float:
    return rng.between(0.0, space) if space > 0 else space / 2


def _beside(rng: Rng, first: Body, body: Body) -> tuple[float, float]:
    """Draw a move that makes the body overlap the first one."""
    a, b = first.bounds(), body.bounds()
    reach = (a[2] - a[0] + b[2] - b[0]) / 2
    x = (a[0] + a[2]) / 2 + rng.sign() * rng.between(0.45, 0.9) * reach
    y = a[3] + rng.between(-0.14, 0.14) * body.stature
    return x - (b[0] + b[2]) / 2, y - b[3]


def _shuffled(rng: Rng, count: int) -> list[int]:
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = rng.whole(0, last)
        order[last], order[other] = order[other], order[last]
    return order


def _draw_occluder(rng: Rng, target: Body, height: int) -> list[Capsule | Box]:
    """Draw an object half a layer in front of the target, near one of its joints."""
    names = sorted(target.joints)
    x, y, z = target.joints[names[rng.whole(0, len(names) - 1)]]
    x, y = x + rng.between(-12, 12), y + rng.between(-10, 10)
    z = round(z / LAYER) * LAYER + LAYER / 2
    kind = rng.pick(OCCLUDERS)
    if kind == "pole":
        radius, slant = rng.between(2.5, 6.0), rng.between(-15, 15)
        ends = (x - slant, -10.0, z), (x + slant, height + 10.0, z)
        return [Capsule("pole", *ends, radius, radius)]
    if kind == "box":
        half = rng.between(6, 14), rng.between(6, 14)
        sine = rng.between(-0.3, 0.3)
        cosine = math.sqrt(1.0 - sine * sine)
        return [Box("box", (x, y, z), *half, cosine, sine)]
    if kind == "table":
        top = Box("box", (x, y, z), rng.between(25, 50), rng.between(3, 6), 1.0, 0.0)
        leg = (x + rng.between(-20, 20), y, z)
        return [top, Capsule("pole", leg, (leg[0], height + 10.0, z), 2.5, 2.5)]
    return _draw_fence(rng, x, y, z) if kind == "fence" else _draw_plant(rng, x, y, z)


def _draw_fence(rng: Rng, x: float, y: float, z: float) -> list[Capsule | Box]:
    gap, radius, half = rng.between(9, 15), rng.between(1.2, 2.4), rng.between(15, 30)
    posts = rng.whole(3, 6)
    left = x - gap * (posts - 1) / 2
    fence: list[Capsule | Box] = []
    for post in range(posts):
        top, bottom = (left + gap * post, y - half, z), (left + gap * post, y + half, z)
        fence.append(Capsule("pole", top, bottom, radius, radius))
    for rail in (-0.7 * half, 0.6 * half):
        ends = (left - 5, y + rail, z + 3), (left + gap * (posts - 1) + 5, y + rail, z + 3)
        fence.append(Capsule("pole", *ends, radius, radius))
    return fence


def _draw_plant(rng: Rng, x: float, y: float, z: float) -> list[Capsule | Box]:
    root = (x, y + rng.between(12, 25), z)
    leaves: list[Capsule | Box] = []
    for leaf in range(rng.whole(6, 11)):
        tip = (root[0] + rng.between(-24, 24), root[1] - rng.between(12, 42), z + leaf)
        middle = ((root[0] * 2 + tip[0] * 3) / 5, (root[1] + tip[1]) / 2, z + leaf)
        leaves.append(Capsule("leaf", root, middle, 1.0, 3.4))
        leaves.append(Capsule("leaf", middle, tip, 3.4, 0.6))
    return leaves


def _without_hidden_people(scene: Scene) -> tuple[Scene, list[Label]]:
    labels = label_scene(scene)
    for _ in range(MOST_REPAIRS):
        num_visible = [sum(v == 2 for *_, v in label.keypoints_image) for label in labels]
        hidden = [i for i, count in enumerate(num_visible) if count < MIN_VISIBLE]
        if not hidden:
            break
        if scene.occluders:
            scene.occluders = []
        elif len(scene.bodies) > 1:
            del scene.bodies[hidden[0]], scene.whims[hidden[0]]
        else:
            scene.bodies = [scene.bodies[0].moved(_half_way_to_the_middle(scene))]
        labels = label_scene(scene)
    return scene, labels


def _half_way_to_the_middle(scene: Scene) -> Vector:
    left, top, right, bottom = scene.bodies[0].bounds()
    return (scene.width - left - right) / 4, (scene.height - top - bottom) / 4, 0.0


def label_scene(scene: Scene) -> list[Label]:
    """Return one label per person, in the scene's order."""
    columns = [stack_axes(body.parts) for body in scene.bodies]
    return [_label_person(scene, columns, index) for index in range(len(scene.bodies))]


def _label_person(scene: Scene, columns: list[Axis], index: int) -> Label:
    body = scene.bodies[index]
    points = np.array([body.joints[name] for name in COCO.joints])  # (K, 3)
    x, y, z = points.T
    gap = _height_above(columns[index], x, y) - z
    behind = np.zeros(len(points), dtype=bool)
    for other, column in enumerate(columns):
        if other != index:
            behind |= _height_above(column, x, y) > z + LAYER / 4
    behind |= _behind_occluders(scene.occluders, x, y, z)
    inside = [
        0 <= round(px, 2) <= scene.width - 1 and 0 <= round(py, 2) <= scene.height - 1
        for px, py, _ in points.tolist()
    ]
    keypoints = []
    for joint, (px, py, _) in enumerate(points.tolist()):
        visibility = 0
        if inside[joint]:
            visibility = _self_visibility(body, COCO.joints[joint], float(gap[joint]))
            if visibility and behind[joint]:
                lost = scene.whims[index][joint] < UNLABELED and all(
                    behind[near] or not inside[near] for near in _NEIGHBORS[joint]
                )
                visibility = 0 if lost else 1
        labeled = (round(px, 2), round(py, 2), visibility) if visibility else (0.0, 0.0, 0)
        keypoints.append(labeled)
    box = _clipped_box(body, scene.height, scene.width)
    return Label(tuple(keypoints), box, _silhouette_area(body, columns[index], box))


_NEIGHBORS = [
    [a + b - joint for a, b in COCO.edges if joint in (a, b)] for joint in range(COCO.num_joints)
]


def _height_above(columns: Axis, x: Array, y: Array) -> Array:
    """Return z of the nearest surface at each point; very far away if there is none."""
    hit = meet_capsule(columns, x, y)
    return np.where(hit.margin > 0, hit.depth, -1e9).max(axis=0)


def _behind_occluders(occluders: list[Capsule | Box], x: Array, y: Array, z: Array) -> Array:
    behind = np.zeros(len(x), dtype=bool)
    for shape in occluders:
        if isinstance(shape, Box):
            behind |= (meet_box(shape, x, y)[0] > 0) & (shape.center[2] > z)
        else:
            behind |= (meet_capsule(axis_of(shape), x, y).margin > 0) & (shape.start[2] > z)
    return behind


def _self_visibility(body: Body, joint: str, gap: float) -> int:
    """Return the visibility of a joint that lies ``gap`` pixels below the person's own surface.

    Joints on the far side of a head get no label; hidden joints of limbs do.
    """
    if joint.endswith(FACE):
        if gap > 0.7 * body.head_radius:
            return 0
        return 1 if gap > 0.3 * body.head_radius else 2
    return 1 if gap - body.joint_radius(joint) > 0.07 * body.stature else 2


def _clipped_box(body: Body, height: int, width: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = body.bounds()
    left, top = max(round(left, 2), 0.0), max(round(top, 2), 0.0)
    right, bottom = min(round(right, 2), float(width)), min(round(bottom, 2), float(height))
    return left, top, round(right - left, 2), round(bottom - top, 2)


def _silhouette_area(body: Body, columns: Axis, box: tuple[float, float, float, float]) -> float:
    """Measure the body's area by counting grid cells whose center lies on it."""
    left, top, width, height = box
    pitch = body.stature / 32
    across, down = max(1, round(width / pitch)), max(1, round(height / pitch))
    x = left + (np.arange(across) + 0.5) * (width / across)
    y = top + (np.arange(down) + 0.5) * (height / down)
    grid_x, grid_y = (axis.ravel() for axis in np.meshgrid(x, y))
    covered = in_silhouette(columns, grid_x, grid_y).any(axis=0)
    return round(int(covered.sum()) * (width / across) * (height / down), 2)
