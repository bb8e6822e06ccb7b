"""Person detectors in ONNX files: each known layout yields the box that is in the image."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from study.deploy.detector import FAMILIES, Detector, DetectorOptions, fit, open_detector
from study.deploy.detector_outputs import suppress
from study.errors import InputError

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 96
CELLS = 8 * 12 + 4 * 6 + 2 * 3
"""Cells of 8, 16 and 32 pixels."""
PLACE, COLUMN, ROW = 8 * 12 + 2 * 6 + 5, 5, 2
"""Cell that predicts the box: of the grid with 16 pixels per cell."""
FINDER = """
    image = Cast<to = 1>(images)
    scaled = Mul(image, std)
    pixels = Add(scaled, mean)
    red = Gather<axis = 1>(pixels, red_at)
    green = Gather<axis = 1>(pixels, one)
    excess = Sub(red, green)
    above = Relu(excess)
    cover = Div(above, full)
    columns = ReduceMax<keepdims = 0>(cover, one_)
    rows = ReduceMax<keepdims = 0>(cover, two_)
    w = ReduceSum(columns, one_)
    h = ReduceSum(rows, one_)
    w1 = Max(w, tiny)
    h1 = Max(h, tiny)
    xs = Mul(columns, x_centers)
    ys = Mul(rows, y_centers)
    sx = ReduceSum(xs, one_)
    sy = ReduceSum(ys, one_)
    cx = Div(sx, w1)
    cy = Div(sy, h1)
    least = ReduceMin<keepdims = 0>(green)
    distance = Abs(least)
    is_black = Less(distance, two)
    black = Cast<to = 1>(is_black)
    area = Mul(w, h)
    seen = Min(area, unit)
    sure = Mul(seen, black)
    half_w = Div(w1, two)
    half_h = Div(h1, two)
    x1 = Sub(cx, half_w)
    y1 = Sub(cy, half_h)
    x2 = Add(cx, half_w)
    y2 = Add(cy, half_h)
"""
"""Finds the one rectangle of pure red: its place and size in the input, (1, 1) each.

``sure`` is 1 if it is there, in the pixels that the detector's family takes, and 0 otherwise.
"""
HEADS = {
    "dets": """
        score = Mul(sure, high)
        row = Concat<axis = 1>(x1, y1, x2, y2, score)
        dets = Unsqueeze(row, zero_)
        labels = Identity(label_rows)
    """,
    "final": """
        score = Mul(sure, high)
        row = Concat<axis = 1>(x1, y1, x2, y2, score, person)
        found = Concat<axis = 0>(row, padding)
        output0 = Unsqueeze(found, zero_)
    """,
    "seven": """
        score = Mul(sure, high)
        output = Concat<axis = 1>(nothing, x1, y1, x2, y2, person, score)
    """,
    "first": """
        score = Mul(sure, high)
        scores = Mul(score, person_row)
        row = Concat<axis = 1>(cx, cy, w1, h1, scores)
        found = ScatterND(base, place, row)
        turned = Transpose<perm = [1, 0]>(found)
        output0 = Unsqueeze(turned, zero_)
    """,
    "last": """
        score = Mul(sure, high)
        scores = Mul(score, person_row)
        row = Concat<axis = 1>(cx, cy, w1, h1, scores)
        found = ScatterND(base, place, row)
        output0 = Unsqueeze(found, zero_)
    """,
    "cells": """
        objectness = Mul(sure, half)
        scores = Mul(high, person_row)
        row = Concat<axis = 1>(cx, cy, w1, h1, objectness, scores)
        found = ScatterND(base, place, row)
        output = Unsqueeze(found, zero_)
    """,
    "ones": """
        score = Mul(sure, high)
        scores = Mul(score, person_row)
        row = Concat<axis = 1>(cx, cy, w1, h1, unit, scores)
        found = ScatterND(base, place, row)
        outputs = Unsqueeze(found, zero_)
    """,
    "raw": """
        objectness = Mul(sure, half)
        scores = Mul(high, person_row)
        gx = Div(cx, stride)
        gy = Div(cy, stride)
        ox = Sub(gx, column)
        oy = Sub(gy, row_number)
        rw = Div(w1, stride)
        rh = Div(h1, stride)
        lw = Log(rw)
        lh = Log(rh)
        row = Concat<axis = 1>(ox, oy, lw, lh, objectness, scores)
        found = ScatterND(base, place, row)
        output = Unsqueeze(found, zero_)
    """,
}
OUTPUTS = {"dets": "float[1, N, 5] dets, int64[1, N] labels"}


def cells() -> NDArray[np.float32]:
    """Center and size of each cell, finest grid first, (CELLS, 4)."""
    rows = [
        [(x + 0.5) * stride, (y + 0.5) * stride, stride, stride]
        for stride in (8, 16, 32)
        for y in range(HEIGHT // stride)
        for x in range(WIDTH // stride)
    ]
    return np.array(rows, np.float32)


def base_of(head: str, num_classes: int, anchors: int) -> NDArray[np.float32]:
    """The unlikely boxes of all cells, (N, 4 or 5 + classes)."""
    base = np.tile(cells(), (anchors, 1))
    if head == "raw":
        base = np.tile(np.float32([0.4, 0.6, 0.1, -0.2]), (CELLS, 1))
    objectness = {"cells": 0.01, "raw": 0.01, "ones": 1.0}.get(head)
    if objectness is not None:
        base = np.concatenate([base, np.full((len(base), 1), objectness)], axis=1)
    scores = np.full((len(base), num_classes), 1e-3)
    return np.concatenate([base, scores], axis=1).astype(np.float32)


def write(
    folder: Path,
    head: str,
    family: str = "yolo",
    num_classes: int = 80,
    person: int = 0,
    anchors: int = 1,
    entry: str = f"float[1, 3, {HEIGHT}, {WIDTH}]",
    facts: dict[str, str] | None = None,
    mark: str = "",
    external: bool = False,
) -> DetectorOptions:
    """Write a detector of red rectangles, which sees only the pixels of its family."""
    pixels = FAMILIES[family]
    output = OUTPUTS.get(head, f"float[a, b] {'output'}" if head == "seven" else None)
    if output is None:
        name = HEADS[head].strip().splitlines()[-1].split("=")[0].strip()
        output = f"float[a, b, c] {name}"
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]>\n'
        f"finder ({entry} images) => ({output}) {{{FINDER}{HEADS[head]}}}"
    )
    number = np.float32
    one_hot = np.zeros((1, num_classes), number)
    one_hot[0, person] = 1
    place = PLACE + (anchors - 1) * CELLS
    values = {
        "mean": number(pixels.mean).reshape(1, 3, 1, 1),
        "std": number(pixels.std).reshape(1, 3, 1, 1),
        "red_at": np.int64(0 if pixels.is_rgb else 2),
        "one": np.int64(1),
        "zero_": np.int64([0]),
        "one_": np.int64([1]),
        "two_": np.int64([2]),
        "x_centers": (np.arange(WIDTH, dtype=number) + 0.5)[None],
        "y_centers": (np.arange(HEIGHT, dtype=number) + 0.5)[None],
        "full": number(255),
        "tiny": number([[1e-3]]),
        "unit": number([[1]]),
        "two": number(2),
        "high": number([[0.9]]),
        "half": number([[0.5]]),
        "stride": number(16),
        "column": number(COLUMN),
        "row_number": number(ROW),
        "person": number([[person]]),
        "nothing": number([[0]]),
        "label_rows": np.int64([[person]]),
        "padding": np.zeros((7, 6), number),
        "person_row": one_hot,
        "base": base_of(head, num_classes, anchors),
        "place": np.int64([[place]]),
    }
    used = {name for node in model.graph.node for name in node.input}
    for name, value in values.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    if mark:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, number), mark))
    for key, text in (facts or {}).items():
        model.metadata_props.add(key=key, value=text)
    file = folder / "detector.onnx"
    if external:
        onnx.save_model(
            model, file, save_as_external_data=True, location="d.data", size_threshold=500
        )
    else:
        onnx.save(model, file)
    return DetectorOptions(file)


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """A gray image with a red box, xywh, whose middle is as red as its edges."""
    image = np.full((height, width, 3), 60, np.uint8)
    x, y, w, h = box
    image[y : y + h, x : x + w] = (255, 0, 0)
    return image


def find(options: DetectorOptions, image: NDArray[np.uint8]) -> tuple[list, list]:
    boxes, scores = open_detector(options, CPU).find(image)
    return boxes.tolist(), scores.tolist()


def names(*classes: str) -> dict[str, str]:
    return {"names": str(dict(enumerate(classes))), "task": "detect"}


@pytest.mark.parametrize(
    ("head", "family", "settings", "score"),
    [
        ("dets", "rtmdet", {"mark": "bbox_head.rtm_cls.0.weight"}, 0.9),
        ("dets", "yolox", {"mark": "bbox_head.multi_level_conv_cls.0.weight"}, 0.9),
        ("raw", "yolox", {}, 0.45),
        ("raw", "yolox", {"num_classes": 1}, 0.45),
        ("cells", "yolox", {}, 0.45),
        ("cells", "yolo", {"anchors": 3}, 0.45),
        ("cells", "yolo", {"anchors": 3, "facts": names("dog", "person"), "person": 1}, 0.45),
        ("ones", "yolo", {}, 0.9),
        ("first", "yolo", {}, 0.9),
        ("first", "yolo", {"num_classes": 1}, 0.9),
        (
            "first",
            "yolo",
            {"num_classes": 3, "person": 2, "facts": names("a", "b", "Person")},
            0.9,
        ),
        ("last", "yolo", {}, 0.9),
        ("last", "yolo", {"num_classes": 2, "facts": names("person", "head")}, 0.9),
        ("final", "yolo", {}, 0.9),
        ("final", "yolo", {"person": 1, "facts": names("dog", "person")}, 0.9),
        ("seven", "yolo", {}, 0.9),
    ],
)
def test_box_in_the_image_is_found_in_every_layout(
    head: str, family: str, settings: dict, score: float, tmp_path: Path
) -> None:
    if "facts" in settings:
        settings = {"num_classes": 2, **settings}
    options = write(tmp_path, head, family, **settings)
    box = (11, 7, 12, 21)
    boxes, scores = find(options, scene(40, 50, box))
    np.testing.assert_allclose(boxes, [box], atol=0.5)
    np.testing.assert_allclose(scores, [score], atol=0.01)
    assert find(options, scene(40, 50, (0, 0, 0, 0))) == ([], [])


@pytest.mark.parametrize(("head", "family"), [("first", "yolo"), ("raw", "yolox")])
@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (64, 96, (10, 20, 30, 25)),
        (30, 90, (60, 4, 20, 21)),
        (60, 20, (3, 35, 9, 20)),
        (9, 13, (2, 1, 5, 6)),
        (7, 96, (70, 1, 20, 5)),
        (128, 192, (40, 20, 60, 80)),
        (256, 128, (16, 80, 80, 120)),
    ],
)
def test_box_is_in_image_pixels_for_images_of_any_shape(
    head: str, family: str, height: int, width: int, box: tuple, tmp_path: Path
) -> None:
    boxes, _ = find(write(tmp_path, head, family), scene(height, width, box))
    np.testing.assert_allclose(boxes, [box], atol=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_keeps_its_aspect_ratio_in_the_input(family: str) -> None:
    pixels = FAMILIES[family]
    image = np.full((20, 10, 3), (250, 100, 10), np.uint8)
    fitted, placement = fit(image, (HEIGHT, WIDTH), pixels)
    raw = fitted[0].transpose(1, 2, 0) * pixels.std + pixels.mean
    left = 32 if family == "yolo" else 0
    color = [250, 100, 10] if family == "yolo" else [10, 100, 250]
    np.testing.assert_allclose(
        raw[:, left : left + 32], np.broadcast_to(color, (64, 32, 3)), 0, 0.1
    )
    outside = np.delete(raw, np.s_[left : left + 32], axis=1)
    np.testing.assert_allclose(outside, 114, atol=0.1)
    assert placement.zoom.tolist() == [3.2, 3.2] and placement.offset.tolist() == [left, 0]


def test_feature_maps_beside_the_boxes_are_passed_over(tmp_path: Path) -> None:
    """YOLOv5 exported them until 2022."""
    options = write(tmp_path, "cells", anchors=3)
    model = onnx.load(options.path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 8, 12, 85)), "map"))
    model.graph.node.append(onnx.helper.make_node("Identity", ["map"], ["345"]))
    shape = (1, 3, 8, 12, 85)
    model.graph.output.append(onnx.helper.make_tensor_value_info("345", 11, shape))
    onnx.save(model, options.path)
    boxes, _ = find(options, scene(40, 50, (5, 6, 20, 30)))
    np.testing.assert_allclose(boxes, [[5, 6, 20, 30]], atol=0.5)


@pytest.mark.parametrize(
    ("names", "person"),
    [
        ("{'0': 'dog', '1': 'person'}", 1),
        ("['dog', 'person']", 1),
        ("{0: '0', 1: '1'}", None),
        ("no names", None),
    ],
)
def test_names_of_classes_may_have_several_forms(
    names: str, person: int | None, tmp_path: Path
) -> None:
    options = write(tmp_path, "first", num_classes=2, person=1, facts={"names": names})
    if person is not None:
        assert open_detector(options, CPU).person == person
    else:
        with pytest.raises(InputError, match="state the person's by --detector-class"):
            open_detector(options, CPU)


def test_very_long_image_keeps_a_row_of_pixels(tmp_path: Path) -> None:
    fitted, placement = fit(np.zeros((2, 500, 3), np.uint8), (HEIGHT, WIDTH), FAMILIES["yolo"])
    assert fitted.shape == (1, 3, HEIGHT, WIDTH) and placement.zoom.tolist() == [96 / 500, 0.5]


def test_free_axes_get_640_pixels_or_what_the_file_states(tmp_path: Path) -> None:
    options = write(tmp_path, "final", entry="float[batch, 3, height, width]")
    with pytest.raises(InputError, match="640 x 640 pixels, got an error"):
        open_detector(options, CPU)  # the finder's rulers are of 64 x 96
    facts = {"imgsz": f"[{HEIGHT}, {WIDTH}]"}
    options = write(tmp_path, "final", entry="float[batch, 3, height, width]", facts=facts)
    detector = open_detector(options, CPU)
    assert detector.size == (HEIGHT, WIDTH)
    np.testing.assert_allclose(
        detector.find(scene(40, 50, (5, 6, 20, 30)))[0][0], [5, 6, 20, 30], 0, 0.5
    )


def test_half_precision_and_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    options = write(tmp_path, "first", entry=f"float16[1, 3, {HEIGHT}, {WIDTH}]", external=True)
    assert (tmp_path / "d.data").stat().st_size > 1000
    np.testing.assert_allclose(
        find(options, scene(40, 50, (5, 6, 20, 30)))[0], [[5, 6, 20, 30]], 0, 0.5
    )
    (tmp_path / "d.data").unlink()
    with pytest.raises(InputError, match=r"--detector=.* keeps weights in d\.data beside it"):
        open_detector(options, CPU)


def test_unsure_people_and_other_classes_are_left_out(tmp_path: Path) -> None:
    image = scene(40, 50, (5, 6, 20, 30))
    options = write(tmp_path, "first")
    assert len(find(DetectorOptions(options.path, threshold=0.89), image)[0]) == 1
    assert find(DetectorOptions(options.path, threshold=0.91), image) == ([], [])
    assert find(write(tmp_path, "first", person=17), image) == ([], [])
    assert find(write(tmp_path, "final", person=17), image) == ([], [])
    chosen = DetectorOptions(write(tmp_path, "first", person=17).path, person=17)
    assert len(find(chosen, image)[0]) == 1


def test_overlapping_boxes_of_one_person_become_the_surest() -> None:
    boxes = np.array([[0, 0, 10, 20], [0, 1, 10, 20], [6, 0, 16, 20], [50, 50, 60, 60]], float)
    kept = suppress(boxes, np.array([0.5, 0.8, 0.6, 0.4]), 0.65)
    # The first shares 190 of 200 with the second; the third shares 76 of 314.
    assert kept.tolist() == [1, 2, 3]
    large = np.array([[0, 0, 10, 10], [0, 0, 10, 20]], float)  # share 100 of 200
    assert suppress(large, np.array([0.9, 0.8]), 0.65).tolist() == [0, 1]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.65).tolist() == []


def test_box_beyond_the_image_is_clipped_to_it(tmp_path: Path) -> None:
    image = scene(40, 50, (30, 25, 20, 15))
    boxes, _ = find(write(tmp_path, "dets", "yolox", mark="multi_level_conv_cls"), image)
    x, y, w, h = boxes[0]
    assert x + w <= 50 and y + h <= 40
    np.testing.assert_allclose(boxes, [[30, 25, 20, 15]], atol=0.5)


def test_family_that_the_outputs_do_not_show_must_be_stated(tmp_path: Path) -> None:
    options = write(tmp_path, "dets", "rtmdet")
    with pytest.raises(InputError, match="--detector-family, one of yolox, rtmdet, yolo"):
        open_detector(options, CPU)
    image = scene(40, 50, (5, 6, 20, 30))
    assert len(find(DetectorOptions(options.path, family="rtmdet"), image)[0]) == 1
    assert find(DetectorOptions(options.path, family="yolox"), image) == ([], [])


@pytest.mark.parametrize(
    ("settings", "person", "expected"),
    [
        ({"num_classes": 20}, None, r"20 classes \(no names\); state .* --detector-class"),
        (
            {"num_classes": 2, "facts": names("cat", "dog")},
            None,
            r"2 classes \(cat, dog\); state .* --detector-class",
        ),
        ({"num_classes": 20}, 20, "must be one of the 20 classes of .*, counted from 0, got 20"),
        ({"num_classes": 20}, -1, "must be one of the 20 classes of .*, counted from 0, got -1"),
    ],
)
def test_class_that_is_the_person_must_be_known(
    settings: dict, person: int | None, expected: str, tmp_path: Path
) -> None:
    options = DetectorOptions(write(tmp_path, "first", **settings).path, person=person)
    with pytest.raises(InputError, match=expected):
        open_detector(options, CPU)


def test_boxes_of_a_pose_model_are_used_and_this_is_stated(tmp_path: Path) -> None:
    facts = {"names": "{0: 'person'}", "task": "pose"}
    options = write(tmp_path, "first", num_classes=52, facts=facts)  # 1 class, 17 x 3 for joints
    assert "only the boxes of its task pose are used" in open_detector(options, CPU).summary
    boxes, _ = find(options, scene(40, 50, (5, 6, 20, 30)))
    np.testing.assert_allclose(boxes, [[5, 6, 20, 30]], atol=0.5)


def test_graphics_card_that_onnxruntime_lacks_is_stated(tmp_path: Path) -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    detector: Detector = open_detector(write(tmp_path, "first"), torch.device("cuda"))
    assert "runs on the CPU, since onnxruntime has no CUDA here" in detector.summary
    assert "runs on the CPU" not in open_detector(write(tmp_path, "first"), CPU).summary


def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = write(tmp_path, "first")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"--detector needs the library onnxruntime.*\[onnx\]"):
        open_detector(options, CPU)


def test_summary_states_how_the_file_is_understood(tmp_path: Path) -> None:
    summary = open_detector(write(tmp_path, "raw", "yolox"), CPU).summary
    assert summary == (
        "detector.onnx: pixels as yolox has them, input 64 x 96, offsets per cell, class 0 of 80 "
        "is the person"
    )
