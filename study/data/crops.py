"""From a person in an image to the crop that a network sees, and back.

Every step is a 2x3 affine that maps pixel centers. The box, widened to the crop's shape and by a
quarter, lies in the crop as the codec's ``CropFrame`` says. A *stored* crop is in the official
HRNet's frame whatever the codec, and holds 1.5 times as much on each side at the same scale, so
that any frame's crops, rotated, shrunk and shifted, can be cut from it.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from study.errors import InputError

BOX_PADDING = 1.25
STORED_MARGIN = 1.5


def stored_size(input_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the stored crop of an input of this (height, width), px."""
    height, width = input_size
    return round(height * STORED_MARGIN), round(width * STORED_MARGIN)


def stored_frame(input_size: tuple[int, int]) -> CropFrame:
    """The stored crop's frame, STORED_MARGIN times as large as a crop of the input size."""
    return CropFrame(stored_size(input_size))


def image_to_crop_affine(
    boxes: NDArray[np.float64],
    frame: CropFrame,
    *,
    margin: float = 1.0,
    scale: float = 1.0,
    rotation: float = 0.0,
) -> NDArray[np.float64]:
    """Affines from image to crop pixels, (N, 2, 3), of boxes xywh in image pixels, (N, 4).

    Args:
        frame: the crop's.
        margin: how many times as much as a plain crop it shows on each side.
        scale: the box grows by it.
        rotation: of the crop's frame about the box's center, degrees.
    """
    height, width = frame.size
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    shown = np.maximum(boxes[:, 2], boxes[:, 3] * (width / height)) * BOX_PADDING * scale * margin
    zoom = (width / shown)[:, None] * frame.zoom  # (N, 2)
    sine, cosine = math.sin(math.radians(rotation)), math.cos(math.radians(rotation))
    turn = np.array([[cosine, sine], [-sine, cosine]])
    linear = zoom[:, :, None] * turn
    offset = frame.center - np.einsum("nij,nj->ni", linear, centers)
    return np.concatenate([linear, offset[:, :, None]], axis=2)


def invert_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The way back, (..., 2, 3)."""
    linear = np.linalg.inv(affine[..., :2])
    return np.concatenate([linear, -linear @ affine[..., 2:]], axis=-1)


def apply_affine(points: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (N, K, 2) carried by the affine of their person, (N, 2, 3)."""
    return np.einsum("nij,nkj->nki", affine[..., :2], points) + affine[:, None, :, 2]


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image as (H, W, 3) RGB.

    Raises:
        InputError: the file can't be decoded.
    """
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise InputError(f"{path}: must be an image that OpenCV can decode; replace the file")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def warp(
    image: NDArray[np.uint8], affine: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The crop of this (height, width) that the affine cuts; black beyond the image's border."""
    height, width = size
    return np.asarray(cv2.warpAffine(image, affine, (width, height), flags=cv2.INTER_LINEAR))


def stored_to_crop_affine(frame: CropFrame) -> NDArray[np.float64]:
    """The affine from any person's stored crop to its plain crop, without augmentation, (2, 3).

    In the official frame it is a shift by whole pixels.
    """
    linear = np.diag(frame.zoom)
    offset = frame.center - linear @ stored_frame(frame.size).center
    return np.concatenate([linear, offset[:, None]], axis=1)


def plain_affines(count: int, frame: CropFrame) -> Tensor:
    """Stored crops to plain crops, (count, 2, 3)."""
    return torch.from_numpy(stored_to_crop_affine(frame)).float().expand(count, 2, 3)


def crop_to_image_affine(
    frame: CropFrame, image_to_stored: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The affines from people's plain crops to their images, (N, 2, 3).

    Args:
        image_to_stored: those of a store whose input has the frame's size, (N, 2, 3).
    """
    crop_to_stored = invert_affine(stored_to_crop_affine(frame))
    return compose_affines(crop_to_stored, invert_affine(image_to_stored))


def compose_affines(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The affine (..., 2, 3) that does the first, then the second."""
    linear = second[..., :2] @ first[..., :2]
    offset = second[..., :2] @ first[..., 2:] + second[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def transform_points(points: Tensor, affine: Tensor) -> Tensor:
    """Points (B, ..., 2) carried by the affine of their person, (B, 2, 3)."""
    flat = points.reshape(len(points), -1, 2)
    moved = torch.einsum("bij,bkj->bki", affine[..., :2], flat) + affine[:, None, :, 2]
    return moved.reshape(points.shape)


def transform_modes(modes: Tensor, affine: Tensor) -> Tensor:
    """Modes (B, K, M, 4) of which x and y are carried by the affine of their person, (B, 2, 3).

    Height and width stay: the width is a multiple of the sigma of whichever codec draws them.
    """
    return torch.cat((transform_points(modes[..., :2], affine), modes[..., 2:]), dim=-1)
