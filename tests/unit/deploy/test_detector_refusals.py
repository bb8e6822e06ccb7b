"""ONNX files that are no person detectors of a known layout are refused, with what they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from study.deploy.detector import DetectorOptions, open_detector
from study.errors import InputError

CPU = torch.device("cpu")
CELLS = 8 * 12 + 4 * 6 + 2 * 3
"""Cells of 8, 16 and 32 pixels in an image of 64 x 96."""


def write_text(folder: Path, text: str, facts: dict[str, str] | None = None) -> DetectorOptions:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    for key, value in (facts or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder / "other.onnx")
    return DetectorOptions(folder / "other.onnx")


def constant(shape: tuple[int, ...], entry: str = "float[1, 3, 64, 96]") -> str:
    """A model with outputs of zeros, whatever the image."""
    sizes = ", ".join(map(str, shape))
    return (
        f"g ({entry} images) => (float[{sizes}] output) <int64[{len(shape)}] s = {{{sizes}}}> "
        "{ output = ConstantOfShape(s) }"
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 1000), (1, 17, 16, 12), (1, 17, 192), (1, 300, 84), (1, 84, CELLS), (1, 300, 57)],
    ids=["classifier", "heatmaps", "simcc", "rt-detr", "shares", "pose"],
)
def test_file_without_a_known_layout_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    expected = rf"known layout, dets .* with outputs output \({shape[0]}, {shape[1]}.* 64 x 96 pix"
    with pytest.raises(InputError, match=expected):
        open_detector(write_text(tmp_path, constant(shape)), CPU)


def test_classifiers_and_other_inputs_are_refused(tmp_path: Path) -> None:
    options = write_text(tmp_path, constant((1, 300, 6)), {"task": "obb"})
    with pytest.raises(InputError, match="whose task is obb"):
        open_detector(options, CPU)
    for entry in ("float[4, 3, 64, 96]", "float[1, 64, 96, 3]", "uint8[1, 3, 64, 96]"):
        options = write_text(tmp_path, constant((1, 300, 6), entry))
        with pytest.raises(InputError, match="must take one image at a time, of floats"):
            open_detector(options, CPU)
    options.path.write_text("no model")
    with pytest.raises(InputError, match="--detector must be an ONNX file"):
        open_detector(options, CPU)


def test_outputs_that_are_no_scores_or_classes_are_refused(tmp_path: Path) -> None:
    """As in files with other columns, in shares of the image, or without the last sigmoid."""
    text = (
        "g (float[1, 3, 64, 96] images) => (float[1, 1, 6] output) "
        "<float[1, 1, 6] output = {%s}> {}"
    )
    image = np.zeros((40, 50, 3), np.uint8)
    for numbers, expected in (
        ("1, 2, 30, 40, 7.5, 0", "scores of 0 to 1, got 7.5"),
        ("1, 2, 30, 40, 0.5, 0.7", "whole numbers as classes"),
        ("50, 30, 20, 40, 0.5, 0", "boxes as x1, y1, x2, y2 in pixels of its input, got"),
        ("0.5, 0.3, 0.9, 0.7, 0.5, 0", "known layout"),
    ):
        model = text.replace("output = {%s}> {}", f"o = {{{numbers}}}> {{ output = Identity(o) }}")
        with pytest.raises(InputError, match=expected):
            open_detector(write_text(tmp_path, model), CPU).find(image)


def test_final_boxes_with_joints_are_read_as_boxes(tmp_path: Path) -> None:
    facts = {"names": "{0: 'person'}", "task": "pose"}
    detector = open_detector(write_text(tmp_path, constant((1, 300, 57)), facts), CPU)
    assert "final boxes" in detector.summary and "task pose" in detector.summary
