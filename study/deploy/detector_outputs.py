"""Outputs of person detectors: which layout an ONNX file has, and the boxes in it.

Boxes are x1, y1, x2, y2 in pixels of the detector's input. A layout is recognized by the outputs
for one gray image, and by the names of the classes if the file has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from study.errors import InputError

Array = NDArray[np.floating]
Size = tuple[int, int]

KNOWN_LAYOUTS = (
    "dets (1, N, 5) with labels (1, N) as mmdeploy exports RTMDet and YOLOX; (1, cells, 5 + "
    "classes) of YOLOX, YOLOv5, YOLOv6 and YOLOv7; (1, 4 + classes, cells) of YOLOv8 and later; "
    "final boxes (1, N, 6) of YOLOv8 and later, or (N, 7) of YOLOv6 and YOLOv7"
)
STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
"""Input pixels per cell of a detector's grids."""
ANCHORS = 3
"""Boxes per cell of YOLOv5 and YOLOv7."""
CORNERS = 4
COCO_CLASSES = 80
NUM_MASKS = 32
"""Numbers per box that the YOLO projects' segmentation adds."""
FEATURE_MAP_AXES = 5
"""Axes of the feature maps that older YOLOv5 exports output beside the boxes."""
LIKELY = 0.05
"""Boxes with lower scores may have any form."""
SHARES = 2.0
"""Boxes of this size at most, pixels, are shares of the input's sides."""
SCORE_SLACK = 1e-2
"""Amount by which half precision may exceed a score of 1."""


class Candidates(NamedTuple):
    """The N boxes that a detector outputs for an image, most of them with low scores."""

    boxes: Array
    """x1, y1, x2, y2 in pixels of the detector's input, (N, 4)."""
    scores: Array
    """(N,), of the likeliest class."""
    classes: Array
    """Number of the likeliest class, (N,)."""


@dataclass(frozen=True)
class Layout:
    """A layout of outputs, and what it says about the detector."""

    description: str
    family: str | None
    """Which pixels the detector takes: yolox or yolo; None: the outputs do not show it."""
    num_classes: int | None
    """None: the outputs do not show it."""
    has_nms: bool
    """The graph already leaves each person one box."""
    decode: Callable[[Sequence[Array]], Candidates]


def recognize(
    outputs: Mapping[str, Array], size: Size, num_names: int | None, task: str | None
) -> Layout | None:
    """Return the layout of these outputs for a gray image; None if none or several fit.

    Args:
        outputs: by their names.
        size: height and width of the detector's input.
        num_names: number of the class names in the file; None if it has none.
        task: detect, pose or segment, as the YOLO projects' files have it; None if unknown.
    """
    first, *others = outputs.values()
    values = [first, *(value for value in others if value.ndim != FEATURE_MAP_AXES)]
    if len(values) > 1 and _are_dets_with_labels(values[0], values[1]):
        return Layout("boxes after NMS", None, num_names, True, _dets_with_labels)
    has_masks = len(values) == 2 and values[1].ndim == 4 and values[1].shape[1] == NUM_MASKS
    if len(values) > 1 and not has_masks:
        return None
    if first.ndim == 2 and first.shape[1] == 7:
        return Layout("boxes after NMS", "yolo", num_names, True, _rows_of_seven)
    if first.ndim != 3 or first.shape[0] != 1:
        return None
    extra = NUM_MASKS if has_masks else 0
    _, rows, columns = first.shape
    if _strides(columns, size):
        return _channels_first(rows, extra, num_names, task, first)
    for anchors in (1, ANCHORS):
        if rows % anchors == 0 and (strides := _strides(rows // anchors, size)):
            return _cells_first(first, size, strides, anchors, extra, num_names)
    is_final = columns == 6 + extra or (task == "pose" and columns > 6)
    if is_final and not _are_shares(first[0, :, :CORNERS]):
        return Layout("final boxes", "yolo", num_names, True, _final_boxes)
    return None


def _are_dets_with_labels(dets: Array, labels: Array) -> bool:
    return dets.ndim == 3 and dets.shape[2] == 5 and labels.shape == dets.shape[:2]


def _strides(num_cells: int, size: Size) -> tuple[int, ...] | None:
    """Return the strides of the grids that have this many cells in all; None if none do."""
    for strides in STRIDES:
        if len(_cells(size, strides)) == num_cells:
            return strides
    return None


def _cells(size: Size, strides: Sequence[int]) -> NDArray[np.float64]:
    """Return column, row and stride of each cell, finest grid first, rows from the top, (N, 3)."""
    grids = []
    for stride in strides:
        height, width = (-(-side // stride) for side in size)
        rows, columns = np.mgrid[:height, :width]
        grids.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], axis=1))
    return np.concatenate(grids).astype(float)


def _channels_first(
    rows: int, extra: int, num_names: int | None, task: str | None, output: Array
) -> Layout | None:
    """Return the layout (1, 4 + classes, N) of YOLOv8 and later."""
    num_classes = num_names or rows - CORNERS - extra
    is_pose = task == "pose"
    fits = rows == CORNERS + num_classes + extra or (is_pose and rows > CORNERS + num_classes)
    if num_classes < 1 or not fits or not _in_pixels(output[0, :CORNERS].T):
        return None
    decode = partial(_decode_channels_first, num_classes)
    return Layout("a box per cell", "yolo", num_classes, False, decode)


def _cells_first(
    output: Array,
    size: Size,
    strides: tuple[int, ...],
    anchors: int,
    extra: int,
    num_names: int | None,
) -> Layout | None:
    """Return the layout (1, N, 5 + classes), or (1, N, 4 + classes) if the names show it."""
    columns = output.shape[2] - extra
    if columns - CORNERS in ((1, COCO_CLASSES) if num_names is None else (num_names,)):
        if anchors > 1 or extra or not _in_pixels(output[0, :, :CORNERS]):
            return None
        transposed = partial(_decode_channels_last, columns - CORNERS)
        return Layout("a box per cell", "yolo", columns - CORNERS, False, transposed)
    num_classes = columns - CORNERS - 1
    if num_classes < 1 or num_names not in (None, num_classes):
        return None
    cells = _cells(size, strides)
    rows = output[0]
    is_raw = anchors == 1 and _is_raw(rows, cells)
    if not is_raw and not _in_pixels(rows[:, :CORNERS]):
        return None
    is_yolo6 = bool((rows[:, CORNERS] == 1).all())
    family = "yolo" if anchors > 1 or is_yolo6 else "yolox"
    decode = partial(_decode_cells, num_classes, cells if is_raw else None)
    description = "offsets per cell" if is_raw else "a box and objectness per cell"
    return Layout(description, family, num_classes, False, decode)


def _is_raw(rows: Array, cells: NDArray[np.float64]) -> bool:
    """Return whether the centers are offsets from the cells instead of input pixels."""
    centers = rows[:, :2].astype(float)
    if (rows[:, 2:CORNERS] < 0).any():
        return True
    as_offsets = np.median(np.abs(centers))
    as_pixels = np.median(np.abs(centers / cells[:, 2:] - cells[:, :2]))
    return bool(as_offsets < as_pixels)


def _in_pixels(boxes: Array) -> bool:
    """Return whether these centers and sizes (N, 4) can be pixels; 0 to 1 are shares."""
    return bool(boxes[:, :2].max() > SHARES)


def _are_shares(boxes: Array) -> bool:
    """Return whether most boxes are shares of the input, as RT-DETR's are; zeros are none."""
    return bool(len(boxes) and 0 < np.median(boxes.max(axis=1)) <= SHARES)


def _dets_with_labels(outputs: Sequence[Array]) -> Candidates:
    dets, labels = outputs[0][0], outputs[1][0]
    return Candidates(dets[:, :4], dets[:, 4], labels)


def _rows_of_seven(outputs: Sequence[Array]) -> Candidates:
    """Read image, x1, y1, x2, y2, class and score of each box."""
    rows = outputs[0]
    return Candidates(rows[:, 1:5], rows[:, 6], rows[:, 5])


def _final_boxes(outputs: Sequence[Array]) -> Candidates:
    """Read x1, y1, x2, y2, score and class of each box."""
    rows = outputs[0][0]
    return Candidates(rows[:, :4], rows[:, 4], rows[:, 5])


def _decode_channels_first(num_classes: int, outputs: Sequence[Array]) -> Candidates:
    return _likeliest(outputs[0][0].T, num_classes, CORNERS)


def _decode_channels_last(num_classes: int, outputs: Sequence[Array]) -> Candidates:
    return _likeliest(outputs[0][0], num_classes, CORNERS)


def _decode_cells(
    num_classes: int, cells: NDArray[np.float64] | None, outputs: Sequence[Array]
) -> Candidates:
    rows = outputs[0][0].astype(float)
    if cells is not None:
        rows[:, :2] = (rows[:, :2] + cells[:, :2]) * cells[:, 2:]
        rows[:, 2:4] = np.exp(rows[:, 2:4]) * cells[:, 2:]
    found = _likeliest(rows, num_classes, CORNERS + 1)
    return found._replace(scores=found.scores * rows[:, CORNERS])


def _likeliest(rows: Array, num_classes: int, first_class: int) -> Candidates:
    """Read center, size and the classes' scores of each box."""
    scores = rows[:, first_class : first_class + num_classes]
    half = rows[:, 2:4] / 2
    boxes = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1)
    return Candidates(boxes, scores.max(axis=1), scores.argmax(axis=1))


def check_candidates(found: Candidates) -> None:
    """Check that scores, classes and boxes are such.

    Raises:
        InputError: a score is outside of 0 to 1, a class is no whole number, or likely boxes are
            no corners in pixels.
    """
    scores, classes = found.scores, found.classes
    if not ((scores >= -SCORE_SLACK) & (scores <= 1 + SCORE_SLACK)).all():
        raise InputError(
            "the detector must output scores of 0 to 1, got "
            f"{np.min(scores):.3g} to {np.max(scores):.3g}; export it with its last sigmoid, and "
            "with its outputs in their usual order"
        )
    if not (classes == np.round(classes)).all():
        raise InputError(
            f"the detector must output whole numbers as classes, got {classes[:3].tolist()}; "
            "export it with its outputs in their usual order"
        )
    likely = found.boxes[scores > LIKELY]
    if not (np.isfinite(likely).all() and (likely[:, 2:] >= likely[:, :2] - 1).all()):
        raise InputError(
            "the detector must output boxes as x1, y1, x2, y2 in pixels of its input, got "
            f"{likely[:2].round(3).tolist()}; export it with its outputs in their usual form"
        )


def suppress(boxes: Array, scores: Array, max_iou: float) -> NDArray[np.intp]:
    """Return the boxes that no surer kept box overlaps by more than ``max_iou``, surest first."""
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        first, others = order[0], order[1:]
        kept.append(first)
        start = np.maximum(boxes[first, :2], boxes[others, :2])
        stop = np.minimum(boxes[first, 2:], boxes[others, 2:])
        shared = np.prod(np.maximum(stop - start, 0), axis=1)
        union = areas[first] + areas[others] - shared
        order = others[shared <= max_iou * union]
    return np.array(kept, dtype=np.intp)
