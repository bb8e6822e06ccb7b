"""Affines from a person's image to the crop that a network sees, and back.

Every step is a 2x3 affine that maps pixel centers. The box, widened to the crop's aspect ratio
and by a quarter, is placed in the crop by the codec's ``CropFrame``. A *stored* crop is in the
official HRNet's frame for every codec. At the same scale it shows 1.5 times as much in each
direction, so that every frame's crops, rotated, scaled and shifted, can be cut from it.
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
from study.data.image_files import decode_image
from study.errors import InputError

BOX_PADDING = 1.25
"""Size of a crop over that of its box, as the official HRNet has it."""
STORED_MARGIN = 1.5
"""Size of a stored crop over that of a plain crop."""


def stored_size(input_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the stored crop for this input size (height, width), pixels."""
    height, width = input_size
    return round(height * STORED_MARGIN), round(width * STORED_MARGIN)


def stored_frame(input_size: tuple[int, int]) -> CropFrame:
    """Return the frame of the stored crop for this input size."""
    return CropFrame(stored_size(input_size))


def image_to_crop_affine(
    boxes: NDArray[np.float64],
    frame: CropFrame,
    *,
    margin: float = 1.0,
    scale: float = 1.0,
    rotation: float = 0.0,
) -> NDArray[np.float64]:
    """Return affines from image to crop pixels, (N, 2, 3).

    Args:
        boxes: xywh in image pixels, (N, 4).
        frame: frame of the crop.
        margin: size of the shown part over that of a plain crop.
        scale: factor of the box's size.
        rotation: angle of the crop about the box's center, degrees.
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
    """Return the inverse affine, (..., 2, 3)."""
    linear = np.linalg.inv(affine[..., :2])
    return np.concatenate([linear, -linear @ affine[..., 2:]], axis=-1)


def apply_affine(points: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Transform points (N, K, 2) by the affine of their person, (N, 2, 3)."""
    return np.einsum("nij,nkj->nki", affine[..., :2], points) + affine[:, None, :, 2]


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) RGB, turned upright by its EXIF tag.

    Raises:
        InputError: the file is empty, cut off, too large or no image.
    """
    image = decode_image(path.read_bytes())
    if isinstance(image, str):
        raise InputError(f"{path}: must be a complete image, {image}; replace the file")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def warp(
    image: NDArray[np.uint8], affine: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Cut a crop of this (height, width) by the affine; black outside the image."""
    height, width = size
    return np.asarray(cv2.warpAffine(image, affine, (width, height), flags=cv2.INTER_LINEAR))


def stored_to_crop_affine(frame: CropFrame) -> NDArray[np.float64]:
    """Return the affine from a stored crop to the plain crop without augmentation, (2, 3).

    It is the same for all people. In the official frame it is a shift by whole pixels.
    """
    linear = np.diag(frame.zoom)
    offset = frame.center - linear @ stored_frame(frame.size).center
    return np.concatenate([linear, offset[:, None]], axis=1)


def plain_affines(count: int, frame: CropFrame) -> Tensor:
    """Return affines from stored crops to plain crops, (count, 2, 3)."""
    return torch.from_numpy(stored_to_crop_affine(frame)).float().expand(count, 2, 3)


def crop_to_image_affine(
    frame: CropFrame, image_to_stored: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return affines from people's plain crops to their images, (N, 2, 3).

    Args:
        image_to_stored: affines of a store whose input size is the frame's, (N, 2, 3).
    """
    crop_to_stored = invert_affine(stored_to_crop_affine(frame))
    return compose_affines(crop_to_stored, invert_affine(image_to_stored))


def compose_affines(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the affine (..., 2, 3) that applies the first, then the second."""
    linear = second[..., :2] @ first[..., :2]
    offset = second[..., :2] @ first[..., 2:] + second[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def transform_points(points: Tensor, affine: Tensor) -> Tensor:
    """Transform points (B, ..., 2) by the affine of their person, (B, 2, 3)."""
    flat = points.reshape(len(points), -1, 2)
    moved = torch.einsum("bij,bkj->bki", affine[..., :2], flat) + affine[:, None, :, 2]
    return moved.reshape(points.shape)


def transform_modes(modes: Tensor, affine: Tensor) -> Tensor:
    """Transform x and y of modes (B, K, M, 4) by the affine of their person, (B, 2, 3).

    Height and width stay: the width is in units of the sigma of the codec that draws the modes.
    """
    return torch.cat((transform_points(modes[..., :2], affine), modes[..., 2:]), dim=-1)
