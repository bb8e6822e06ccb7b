"""A person detector in an ONNX file: an image's people as boxes.

Layouts of outputs are in ``detector_outputs.py``; this module fits images to the detector's
input and boxes to the image.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from study.data.annotations import PERSON
from study.deploy.detector_outputs import (
    COCO_CLASSES,
    KNOWN_LAYOUTS,
    Array,
    Candidates,
    Layout,
    Size,
    check_candidates,
    recognize,
    suppress,
)
from study.deploy.person_boxes import PersonBoxes
from study.errors import InputError
from study.teachers.onnx_model import open_session

THRESHOLD = 0.3
MAX_IOU = 0.65
"""Two boxes that overlap more are one person (YOLOX's and RTMDet's evaluations)."""
FREE_SIZE = 640
"""Side of the input if the file leaves it free, pixels."""
PADDING = 114
"""Gray around an image that has another shape than the input."""
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
USABLE_TASKS = (None, "detect", "pose", "segment")


class Pixels(NamedTuple):
    """The pixels that a family of detectors takes."""

    is_rgb: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_centered: bool
    """The image lies in the middle of the input; otherwise at its top left."""


FAMILIES = {
    "yolox": Pixels(False, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
    "rtmdet": Pixels(False, (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), False),
    "yolo": Pixels(True, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), True),
}
"""yolo: YOLOv5 and later."""
HEADS = {"yolox": b"multi_level_conv_cls", "rtmdet": b"rtm_cls"}
"""Names of the last layers, in files whose outputs do not show the family."""


class Placement(NamedTuple):
    """Place of an image in the input of a detector."""

    zoom: NDArray[np.float64]
    """Input pixels per image pixel, x and y."""
    offset: NDArray[np.float64]
    """Place of the image's top left corner, x and y in input pixels."""


@dataclass(frozen=True)
class DetectorOptions:
    """A detector that a user gives, and what the user states about it."""

    path: Path
    threshold: float = THRESHOLD
    """Lowest score of a person, 0 to 1."""
    family: str | None = None
    """One of FAMILIES; None: the file's outputs show it."""
    person: int | None = None
    """Number of the class that is the person; None: by the names in the file, or as in COCO."""


@dataclass(frozen=True)
class Detector:
    """A detector that is open, and how to read it."""

    session: Any
    size: Size
    """Height and width of the input."""
    dtype: type
    pixels: Pixels
    layout: Layout
    person: int
    """Number of the class that is the person."""
    threshold: float
    """Lowest score of a person."""
    summary: str
    """One line on how the file is understood."""

    def find(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the people's boxes, xywh in image pixels (N, 4), and scores (N,), surest first.

        Args:
            image: (H, W, 3) RGB.

        Raises:
            InputError: the outputs are no scores, classes and boxes.
        """
        fitted, placement = fit(image, self.size, self.pixels)
        found = self.layout.decode(run(self.session, fitted.astype(self.dtype)))
        check_candidates(found)
        return self._in_image(found, placement, (image.shape[0], image.shape[1]))

    def people(self, image: NDArray[np.uint8], image_id: int) -> PersonBoxes:
        """Return what ``find`` does, for the image of this id."""
        boxes, scores = self.find(image)
        return PersonBoxes(image_id, boxes, scores)

    def _in_image(
        self, found: Candidates, placement: Placement, size: Size
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        is_person = (found.classes == self.person) & (found.scores >= self.threshold)
        boxes, scores = found.boxes[is_person].astype(float), found.scores[is_person].astype(float)
        max_iou = 1.0 if self.layout.has_nms else MAX_IOU
        kept = suppress(boxes, scores, max_iou)
        corners = (boxes[kept].reshape(-1, 2, 2) - placement.offset) / placement.zoom
        corners = corners.clip(0, (size[1], size[0]))
        sides = corners[:, 1] - corners[:, 0]
        is_inside = (sides > 1).all(axis=1)
        xywh = np.concatenate([corners[:, 0], sides], axis=1)
        return xywh[is_inside], scores[kept][is_inside].clip(0, 1)


def fit(
    image: NDArray[np.uint8], size: Size, pixels: Pixels
) -> tuple[NDArray[np.float32], Placement]:
    """Scale and pad an RGB image (H, W, 3) to the detector's input (1, 3, h, w)."""
    sides = np.array([image.shape[1], image.shape[0]])  # x and y, as all below
    room = np.array([size[1], size[0]])
    scaled = np.clip(np.rint(sides * (room / sides).min()), 1, room).astype(int)
    offset = (room - scaled) // 2 if pixels.is_centered else np.zeros(2, int)
    padded = np.full((*size, 3), PADDING, np.uint8)
    stop = offset + scaled
    padded[offset[1] : stop[1], offset[0] : stop[0]] = cv2.resize(
        image, (int(scaled[0]), int(scaled[1])), interpolation=cv2.INTER_LINEAR
    )
    ordered = padded if pixels.is_rgb else padded[..., ::-1]
    mean, std = np.array(pixels.mean, np.float32), np.array(pixels.std, np.float32)
    normalized = (ordered.astype(np.float32) - mean) / std
    return normalized.transpose(2, 0, 1)[None], Placement(scaled / sides, offset.astype(float))


def open_detector(options: DetectorOptions, device: torch.device) -> Detector:
    """Open a detector, and decide by its outputs for a gray image which one it is.

    Raises:
        InputError: the file is no person detector of a known layout, or something about it
            remains open: its family, or which class is the person.
    """
    cuda = ("CUDAExecutionProvider", {"device_id": device.index or 0})
    providers = [*([cuda] if device.type == "cuda" else []), "CPUExecutionProvider"]
    session = open_session(options.path, "--detector", "--detector", providers)
    facts = session.get_modelmeta().custom_metadata_map
    task = facts.get("task")
    if task not in USABLE_TASKS:
        raise InputError(
            f"--detector must be a detector of people, got {options.path}, whose task is {task}"
        )
    size, dtype = _input_of(session, options.path, facts)
    names = _names_of(facts)
    num_names = len(names) if names else None
    gray: Array = np.full((1, 3, *size), PADDING / 255, dtype)
    outputs = dict(zip(_output_names(session), run(session, gray), strict=True))
    layout = recognize(outputs, size, num_names, task)
    if layout is None:
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items())
        raise InputError(
            f"--detector must be a person detector with outputs in a known layout, {KNOWN_LAYOUTS}"
            f"; got {options.path} with outputs {found} for an image of {size[0]} x {size[1]} "
            "pixels; export it again, or give its boxes by --boxes"
        )
    family = options.family or layout.family or _family_of(options.path)
    person = _person_class(options, names, layout.num_classes)
    name = f" ({names[person]})" if names else ""
    count = "" if layout.num_classes is None else f" of {layout.num_classes}"
    summary = (
        f"{options.path.name}: pixels as {family} has them, input {size[0]} x {size[1]}, "
        f"{layout.description}, class {person}{name}{count} is the person"
    )
    if task in ("pose", "segment"):
        summary += f"; only the boxes of its task {task} are used"
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        summary += "; runs on the CPU, since onnxruntime has no CUDA here (onnxruntime-gpu has)"
    pixels = FAMILIES[family]
    return Detector(session, size, dtype, pixels, layout, person, options.threshold, summary)


def _input_of(session: Any, path: Path, facts: Mapping[str, str]) -> tuple[Size, type]:
    """Return height and width of the input, and its type."""
    inputs = session.get_inputs()
    shape = inputs[0].shape
    fits = len(inputs) == 1 and len(shape) == 4 and inputs[0].type in TYPES
    if not (fits and _allows(shape[0], 1) and _allows(shape[1], 3)):
        taken = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(
            "--detector must take one image at a time, of floats (1, 3, height, width), got "
            f"{path} with inputs {taken}; export it again with batch 1"
        )
    sides = _literal(facts.get("imgsz"))
    wanted = sides if isinstance(sides, list) and len(sides) == 2 else [FREE_SIZE, FREE_SIZE]
    height, width = (
        own if isinstance(own, int) else int(free)
        for own, free in zip(shape[2:], wanted, strict=True)
    )
    return (height, width), TYPES[inputs[0].type]


def _allows(size: Any, number: int) -> bool:
    """Return whether an axis may have this size; a free size is a name or None."""
    return not isinstance(size, int) or size == number


def _output_names(session: Any) -> list[str]:
    return [output.name for output in session.get_outputs()]


def _names_of(facts: Mapping[str, str]) -> dict[int, str] | None:
    """Return the names of the classes that the YOLO projects write into their files."""
    names = _literal(facts.get("names"))
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        by_number = {int(number): str(name) for number, name in names.items()}
    except (AttributeError, ValueError):
        return None
    return by_number if sorted(by_number) == list(range(len(by_number))) and names else None


def _literal(text: str | None) -> Any:
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError):
        return None


def _family_of(path: Path) -> str:
    """Return the family by the names of the last layers."""
    content = path.read_bytes()
    found = [family for family, head in HEADS.items() if head in content]
    if len(found) != 1:
        raise InputError(
            f"--detector {path} outputs dets and labels, which RTMDet, YOLOX and YOLO have alike, "
            "and names no layers that show which it is; state it by --detector-family, one of "
            f"{', '.join(FAMILIES)}"
        )
    return found[0]


def _person_class(
    options: DetectorOptions, names: Mapping[int, str] | None, num_classes: int | None
) -> int:
    """Return the number of the class that is the person.

    Raises:
        InputError: the file shows several classes and no person among them.
    """
    if options.person is not None:
        if options.person < 0 or (num_classes is not None and options.person >= num_classes):
            count = "" if num_classes is None else f"{num_classes} "
            raise InputError(
                f"--detector-class must be one of the {count}classes of {options.path}, counted "
                f"from 0, got {options.person}"
            )
        return options.person
    has_words = any(not name.isdigit() for name in (names or {}).values())
    if num_classes == 1 or (not has_words and num_classes in (None, COCO_CLASSES)):
        return 0
    people = [number for number, name in (names or {}).items() if name.strip().lower() == PERSON]
    if len(people) != 1:
        known = ", ".join((names or {}).values()) or "no names"
        raise InputError(
            f"--detector must name one of its classes person, got {options.path} with "
            f"{num_classes} classes ({known[:200]}); state the person's by --detector-class"
        )
    return people[0]


def run(session: Any, image: NDArray[np.floating]) -> list[Array]:
    """Return the outputs for an image that fits the input, (1, 3, h, w)."""
    entry = session.get_inputs()[0]
    try:
        outputs = session.run(None, {entry.name: np.ascontiguousarray(image)})
        return [np.asarray(output, np.float32) for output in outputs]
    except Exception as error:  # the library has an exception for each cause
        raise InputError(
            f"--detector must run on an image of {image.shape[2]} x {image.shape[3]} pixels, got "
            f"an error ({' '.join(str(error).split())[:300]}); export it again"
        ) from None
