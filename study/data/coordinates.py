"""Find boxes and joints whose numbers plainly mean something else than the file's format says.

A box of four numbers can be two corners, a center and a size, or fractions of the image, and no
number alone shows it. A person's joints show it: their extent fits the box only if both are read
as they were meant. One person may be odd, so a kind is a fault once a share of the people has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.joint_names import split_side
from study.data.annotations import AnnotationTable

COMMON = 0.05
"""Share of the people from which a kind is a fault. Official files have less than 0.002."""
BETTER = 0.2
"""A box is read otherwise if its IoU with the joints' extent is then higher by this."""
LARGEST_FRACTION = 1.5
"""Joints and boxes of numbers up to this are fractions, some outside the image."""
MARGIN = 0.25
"""Share of the box by which it is enlarged before joints count as outside."""
FAR_LARGER = 20
"""Size of a box over that of its joints' extent that cannot be meant; official: at most 4.1."""
AREA_RANGE = (0.01, 2)
"""Possible areas over that of the box; official: 0.24 to 0.82."""
LEAST_JOINTS = 4
"""Fewer labeled joints do not show a person's extent."""
FEW, REACH = 20, 0.55
"""Of this many people, some box reaches beyond this share of its image's width or height."""
FRACTION_JOINTS = "joints that look like fractions"
FRACTION_BOX = "box that looks like fractions"
RELATIVE_JOINTS = "joints that look counted from their box's corner"
EXCHANGED = "x and y that look exchanged"
NOT_IN_BOX = "joints outside their person's box"
FAR_LARGER_BOX = "box far larger than its joints"
OTHER_AREA = "area that does not fit the box"
OTHER_SCALE = "people at the top left of all images"
KEPT = "joints with coordinates and visibility 0"
SAME_BOX = "people of one image in the same box"
SAME_PLACE = "joints at one place"
LEAST_ALIKE, ALIKE = 3, 0.1
"""This number and share of the skeleton's joints are not at one place; official: at most 2."""
FROM_BELOW = "y that looks counted from the bottom"
UPPER, LOWER = {"nose", "head", "shoulder"}, {"hip", "knee", "ankle"}
"""Words in the names of joints that are above and below in most people."""
MOST_UPRIGHT = 0.8
"""Share of people who are upside down that nobody's data have; gymnasts: 0.33, others: 0.004."""
ORDERS = {
    "box that looks like two corners": ("x1, y1, x2, y2", (0, 1, 2, 3)),
    "box that looks like x1, x2, y1, y2": ("x1, x2, y1, y2", (0, 2, 1, 3)),
    "box that looks like y1, x1, y2, x2": ("y1, x1, y2, x2", (1, 0, 3, 2)),
}
"""Orders of a box's corners: how they are written, and places of left, top, right, bottom."""
CENTERED = "box that looks like a center and a size"
Check = tuple[str, NDArray[np.bool_], Callable[[int], str]]
"""Kind, whether each annotation has it (N,), and the detail of annotation i."""
_Text = Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class _Extents:
    """Boxes and joints of all N annotations; of use where ``is_sound``."""

    is_sound: NDArray[np.bool_]
    """Whether a used person has joints, a box and an image, (N,)."""
    has_extent: NDArray[np.bool_]
    """Whether enough joints are labeled too, not all in a row, (N,)."""
    has_half: NDArray[np.bool_]
    """Whether half of the joints are labeled too, so that their extent is the person's, (N,)."""
    joints: NDArray[np.float64]
    """Left, top, right, bottom of the labeled joints, (N, 4)."""
    boxes: NDArray[np.float64]
    """x, y, width, height, (N, 4)."""
    image_sizes: NDArray[np.float64]
    """Width and height, (N, 2)."""
    has_fraction_joints: NDArray[np.bool_]
    has_fraction_box: NDArray[np.bool_]


def coordinate_checks(table: AnnotationTable) -> list[Check]:
    """Return the kinds that a share of the people has: kind, who has it (N,), detail of one."""
    return [check for check, is_often in _checks(table) if is_often]


def coordinate_notes(table: AnnotationTable) -> list[Check]:
    """Return the kinds that only few people have, which are oddities."""
    odd = (NOT_IN_BOX, OTHER_AREA, KEPT, SAME_BOX, SAME_PLACE)
    return [c for c, is_often in _checks(table) if c[0] in odd and not is_often]


def other_scale(table: AnnotationTable) -> str | None:
    """Describe why all boxes seem to be in percent or of smaller images; None if they do not."""
    boxes, sizes = table.boxes[table.is_used], table.image_sizes[table.is_used, ::-1]
    if len(boxes) < FEW or not (sizes > 0).all():
        return None
    right, bottom = np.max((boxes[:, :2] + boxes[:, 2:]) / sizes, axis=0)
    if not max(right, bottom) < REACH or boxes.max() <= LARGEST_FRACTION:
        return None
    return (
        f"boxes must be in pixels of the images as they are stored, got none of {len(boxes)} that "
        f"reaches beyond {right:.2g} of its image's width and {bottom:.2g} of its height; they "
        "may be in percent, or in pixels of smaller images"
    )


def kept_note(table: AnnotationTable) -> str | None:
    """Describe how joints of visibility 0 with coordinates are read; None if few people have them.

    Some annotation tools write coordinates of all joints, so that nothing tells which are meant.
    """
    (_, mask, _), is_fault = _kept_check(table)
    if is_fault or not is_common(int(mask.sum()), table.num_people):
        return None
    return (
        f"{mask.sum()} of {table.num_people} people have them; they are read as not labeled; if "
        "they are hidden joints, write visibility 1"
    )


def _kept_check(table: AnnotationTable) -> tuple[Check, bool]:
    """Check who has joints in the image that visibility 0 leaves unlabeled.

    They are lost labels if the file writes 0, 0 for what is not labeled, or one of the other
    visibilities never.
    """
    points, visibility = table.keypoints[:, :, :2], table.keypoints[:, :, 2]
    is_zero = (visibility == 0) & table.is_used[:, None]
    sizes = table.image_sizes[:, None, ::-1]
    is_kept = is_zero & ((points > 0) & (points <= sizes)).all(axis=2)
    mask = is_kept.any(axis=1)
    num_unlabeled = int((is_zero & (points == 0).all(axis=2)).any(axis=1).sum())
    present = visibility[table.is_used]
    is_lost = is_common(num_unlabeled, table.num_people)
    is_lost |= not ((present == 1).any() and (present == 2).any())

    def text(i: int) -> str:
        return (
            f"visibility 0 means not labeled, but {is_kept[i].sum()} such joints have "
            "coordinates; write 2 for visible joints, 1 for hidden ones, and 0, 0, 0 for others"
        )

    return (KEPT, mask, text), is_lost and is_common(int(mask.sum()), table.num_people)


def upside_down_note(table: AnnotationTable) -> str | None:
    """Describe how many people are upside down if more than half are, and not nearly all."""
    (_, among, _), is_fault = _upside_down_check(table)
    count, total = int(_is_upside_down(table).sum()), int(among.sum())
    if is_fault or total < FEW or 2 * count <= total:
        return None
    return f"{count} of {total} people are upside down; if they are not, count y from the top"


def _upside_down_check(table: AnnotationTable) -> tuple[Check, bool]:
    """Check whether nearly all people are upside down; then all who show it have the fault."""
    upper, lower = _heights(table)
    among = np.isfinite(upper) & np.isfinite(lower)
    count, total = int(_is_upside_down(table).sum()), int(among.sum())

    def text(i: int) -> str:
        return (
            f"head and shoulders are at y {upper[i]:g}, hips and legs at y {lower[i]:g}; {count} "
            f"of {total} people are upside down; y must be counted from the top of the image"
        )

    return (FROM_BELOW, among, text), total >= FEW and count > MOST_UPRIGHT * total


def _is_upside_down(table: AnnotationTable) -> NDArray[np.bool_]:
    upper, lower = _heights(table)
    return np.asarray(upper > lower)  # False if one is NaN


def _heights(table: AnnotationTable) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean y of head and shoulders, and of hips and legs; NaN if unlabeled, (N,)."""
    words = [set(split_side(joint)[1].split()) for joint in table.skeleton.joints]
    means = []
    for part in (UPPER, LOWER):
        joints = table.keypoints[:, [bool(part & found) for found in words]]
        labeled = (joints[:, :, 2] > 0) & (joints[:, :, :2] > 0).any(axis=2)
        labeled &= table.is_used[:, None]
        total = np.where(labeled, joints[:, :, 1], 0).sum(axis=1)
        counts = labeled.sum(axis=1)
        means.append(np.where(counts > 0, total / np.maximum(counts, 1), np.nan))
    return means[0], means[1]


def _checks(table: AnnotationTable) -> list[tuple[Check, bool]]:
    """Return each kind, and whether it is common among the people who can have it."""
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near the largest
        return _all_checks(table, _measure(table))


def _all_checks(table: AnnotationTable, extents: _Extents) -> list[tuple[Check, bool]]:
    sound = extents.is_sound
    found = [_counted(check, sound) for check in _fraction_checks(table, extents)]
    found += [
        _counted(check, extents.has_extent, sound) for check in _order_checks(table, extents)
    ]
    is_named = np.zeros_like(sound)
    for (_, mask, _), is_often in found:
        is_named |= mask & is_often
    sizes = extents.joints[:, 2:] - extents.joints[:, :2]
    is_larger = np.hypot(*extents.boxes[:, 2:].T) > FAR_LARGER * np.hypot(*sizes.T)
    ratios = table.areas / np.maximum(table.boxes[:, 2] * table.boxes[:, 3], 1e-9)
    is_other_area = np.isfinite(ratios) & ~((ratios >= AREA_RANGE[0]) & (ratios <= AREA_RANGE[1]))

    def places(i: int) -> str:
        return f"its box is {_numbers(table.boxes[i])}, its joints are {_span(table, i)}"

    def area(i: int) -> str:
        box = _numbers(table.boxes[i])
        return f"area must be square pixels, or left out, got {table.areas[i]:g} in the box {box}"

    return [
        *found,
        _counted((NOT_IN_BOX, _is_outside(table) & ~is_named, places), sound),
        _counted((FAR_LARGER_BOX, is_larger & ~is_named, places), extents.has_half),
        _counted((OTHER_AREA, is_other_area & ~is_named, area), sound),
        _same_box_check(table),
        _counted(_same_place_check(table), sound),
        _kept_check(table),
        _upside_down_check(table),
    ]


def _counted(
    check: Check, among: NDArray[np.bool_], all_people: NDArray[np.bool_] | None = None
) -> tuple[Check, bool]:
    """Limit a check to these people; return it and whether it is common among them.

    Args:
        all_people: whose kind it is if most of ``among`` have it; None: of those who have it.
    """
    kind, mask, text = check
    mask = mask & among
    if all_people is not None and 2 * mask.sum() > among.sum() > 1:
        own = mask

        def text_of_all(i: int) -> str:
            return text(i) if own[i] else "as those of most people in the file"

        return (kind, all_people, text_of_all), True
    return (kind, mask, text), is_common(int(mask.sum()), int(among.sum()))


def is_common(count: int, total: int, share: float = COMMON) -> bool:
    """Check whether this number of all people is more than an oddity of one person."""
    return count > share * total and (count > 1 or count == total)


def _measure(table: AnnotationTable) -> _Extents:
    points = table.keypoints[:, :, :2]
    # Some converters label missing joints at 0, 0 or -1, -1.
    labeled = (table.keypoints[:, :, 2] > 0) & (points > 0).any(axis=2)  # (N, K)
    start = np.where(labeled[:, :, None], points, np.inf).min(axis=1)
    stop = np.where(labeled[:, :, None], points, -np.inf).max(axis=1)
    counts = labeled.sum(axis=1)
    sizes = table.image_sizes[:, ::-1]
    is_sound = table.is_used & (table.image_rows >= 0) & (counts > 0)
    is_sound &= np.isfinite(points).all(axis=(1, 2)) & (table.boxes[:, 2:] > 0).all(axis=1)
    is_sound &= (sizes > LARGEST_FRACTION).all(axis=1)
    has_extent = is_sound & (counts >= LEAST_JOINTS) & (stop > start).all(axis=1)
    joints = np.where(is_sound[:, None], np.concatenate([start, stop], axis=1), 0)
    boxes = np.where(is_sound[:, None], table.boxes, 0)
    return _Extents(
        is_sound=is_sound,
        has_extent=has_extent,
        has_half=has_extent & (2 * counts >= labeled.shape[1]),
        joints=joints,
        boxes=boxes,
        image_sizes=np.where(is_sound[:, None], sizes, 1),
        has_fraction_joints=is_sound & (np.abs(joints) <= LARGEST_FRACTION).all(axis=1),
        has_fraction_box=is_sound & (np.abs(boxes) <= LARGEST_FRACTION).all(axis=1),
    )


def _fraction_checks(table: AnnotationTable, extents: _Extents) -> list[Check]:
    has_joints, has_box = extents.has_fraction_joints, extents.has_fraction_box
    of_image = _iou(_corners(extents.boxes), extents.joints * np.tile(extents.image_sizes, 2))
    in_box = np.tile(extents.boxes[:, :2], 2) + extents.joints * np.tile(extents.boxes[:, 2:], 2)
    of_box = _iou(_corners(extents.boxes), in_box)
    rows = has_joints & ~has_box
    unit = "box" if of_box[rows].sum() > of_image[rows].sum() else "image"

    def box(i: int) -> str:
        return f"{_numbers(table.boxes[i])} are fractions of the image; write pixels"

    def joints(i: int) -> str:
        return f"its joints are {_span(table, i)}, fractions of the {unit}; write image pixels"

    return [(FRACTION_BOX, has_box, box), (FRACTION_JOINTS, has_joints, joints)]


def _order_checks(table: AnnotationTable, extents: _Extents) -> list[Check]:
    """Check whether boxes fit their joints better if one of both is read otherwise."""
    sizes = np.tile(extents.image_sizes, 2)
    boxes = np.where(extents.has_fraction_box[:, None], extents.boxes * sizes, extents.boxes)
    joints = np.where(extents.has_fraction_joints[:, None], extents.joints * sizes, extents.joints)
    corner, size = boxes[:, :2], boxes[:, 2:]
    given = _corners(boxes)
    read = {kind: (boxes[:, places], joints) for kind, (_, places) in ORDERS.items()}
    read[CENTERED] = (given - np.tile(size / 2, 2), joints)
    read[EXCHANGED] = (given, joints[:, [1, 0, 3, 2]])
    read[RELATIVE_JOINTS] = (given, joints + np.tile(corner, 2))
    ious = np.stack([_iou(box, extent) for box, extent in read.values()])
    best = np.argmax(ious, axis=0)
    is_better = ious.max(axis=0) > _iou(given, joints) + BETTER
    is_better &= extents.has_fraction_box | ~extents.has_fraction_joints

    def as_order(order: str) -> _Text:
        return lambda i: (
            f"{_numbers(table.boxes[i])} fits its joints as {order}; write x, y, width, height"
        )

    def exchanged(i: int) -> str:
        return (
            f"its box {_numbers(table.boxes[i])} fits its joints, {_span(table, i)}, if x and y "
            "of one of them are exchanged; write x first"
        )

    def relative(i: int) -> str:
        return (
            f"its joints, {_span(table, i)}, fit its box {_numbers(table.boxes[i])} if the box's "
            "corner is added; write image pixels"
        )

    texts = {kind: as_order(order) for kind, (order, _) in ORDERS.items()}
    texts[CENTERED] = as_order("center x, center y, width, height")
    texts |= {EXCHANGED: exchanged, RELATIVE_JOINTS: relative}
    return [(kind, is_better & (best == n), texts[kind]) for n, kind in enumerate(read)]


def _same_box_check(table: AnnotationTable) -> tuple[Check, bool]:
    """Check who shares the box with people of the same image who have other joints."""
    has_image = table.is_used & (table.image_rows >= 0)
    rows = np.flatnonzero(has_image & (table.boxes[:, 2:] > 0).all(axis=1))
    keys = np.column_stack([table.image_rows[rows], table.boxes[rows]])
    _, groups, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    groups = groups.reshape(-1)
    poses: dict[int, set[bytes]] = {}
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        if counts[group] > 1:
            poses.setdefault(group, set()).add(table.keypoints[row].tobytes())
    sizes = np.zeros(len(table.ids), np.int64)
    sizes[rows] = [len(poses.get(group, ())) for group in groups.tolist()]

    def text(i: int) -> str:
        return (
            f"{sizes[i]} people of image {table.image_ids[i]} have the box "
            f"{_numbers(table.boxes[i])}; write each person's own"
        )

    num_surplus = sum(len(alike) - 1 for alike in poses.values())
    return (SAME_BOX, sizes > 1, text), is_common(num_surplus, table.num_people)


def _same_place_check(table: AnnotationTable) -> Check:
    """Check who has several labeled joints at one place other than 0, 0."""
    points = table.keypoints[:, :, :2]
    is_labeled = (table.keypoints[:, :, 2] > 0) & (points > 0).any(axis=2)
    places = np.where(is_labeled, points[:, :, 0] + 1j * points[:, :, 1], np.nan)
    places = np.sort(places, axis=1)  # NaN, which equals nothing, is last
    span = max(LEAST_ALIKE, int(np.ceil(ALIKE * places.shape[1]))) - 1
    is_alike = places[:, span:] == places[:, : max(places.shape[1] - span, 0)]

    def text(i: int) -> str:
        place = places[i, span:][is_alike[i]][0]
        count = np.count_nonzero(places[i] == place)
        return (
            f"{count} labeled joints are at {place.real:g}, {place.imag:g}; write 0, 0, 0 for "
            "joints that are not labeled"
        )

    return (SAME_PLACE, is_alike.any(axis=1), text)


def _is_outside(table: AnnotationTable) -> NDArray[np.bool_]:
    """Return who has most labeled joints outside the enlarged box, (N,)."""
    labeled = table.keypoints[:, :, 2] > 0
    corner, size = table.boxes[:, None, :2], table.boxes[:, None, 2:]
    offset = table.keypoints[:, :, :2] - corner  # (N, K, 2)
    is_near = ((offset >= -MARGIN * size) & (offset <= (1 + MARGIN) * size)).all(axis=2)
    return np.asarray(2 * (is_near & labeled).sum(axis=1) < labeled.sum(axis=1))


def _corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return left, top, right, bottom of boxes xywh, (N, 4)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of rectangles left, top, right, bottom, (N, 4); 0 if one is none."""
    start, stop = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    shared = np.maximum(stop - start, 0).prod(axis=1)
    areas = [np.maximum(r[:, 2:] - r[:, :2], 0).prod(axis=1) for r in (boxes, others)]
    return np.asarray(shared / np.maximum(areas[0] + areas[1] - shared, 1e-9))


def _numbers(values: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _span(table: AnnotationTable, i: int) -> str:
    """Return where the labeled joints of a person are, for messages."""
    points = table.keypoints[i]
    points = points[points[:, 2] > 0, :2]
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return f"in x {left:g} to {right:g} and y {top:g} to {bottom:g}"
