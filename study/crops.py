"""From a person in a picture to the crop that a network sees, and back.

Every step is a 2x3 affine that maps pixel centres. The box, widened to the crop's shape and by a
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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.config import InputError
from study.schema import AugmentConfig

BOX_PADDING = 1.25
STORED_MARGIN = 1.5
HALF_BODY_PADDING = 1.5
ROTATED_SHARE = 0.6
MIN_HALF_BODY_JOINTS = 8
"""As the official HRNet: people with no more labelled joints are not cut in half."""


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
    """Affines from picture to crop pixels, (N, 2, 3), of boxes xywh in picture pixels, (N, 4).

    Args:
        frame: the crop's.
        margin: how many times as much as a plain crop it shows on each side.
        scale: the box grows by it.
        rotation: of the crop's frame about the box's centre, degrees.
    """
    height, width = frame.size
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    shown = np.maximum(boxes[:, 2], boxes[:, 3] * (width / height)) * BOX_PADDING * scale * margin
    zoom = (width / shown)[:, None] * frame.zoom  # (N, 2)
    sine, cosine = math.sin(math.radians(rotation)), math.cos(math.radians(rotation))
    turn = np.array([[cosine, sine], [-sine, cosine]])
    linear = zoom[:, :, None] * turn
    offset = frame.centre - np.einsum("nij,nj->ni", linear, centres)
    return np.concatenate([linear, offset[:, :, None]], axis=2)


def invert_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The way back, (..., 2, 3)."""
    linear = np.linalg.inv(affine[..., :2])
    return np.concatenate([linear, -linear @ affine[..., 2:]], axis=-1)


def apply_affine(points: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (N, K, 2) carried by the affine of their person, (N, 2, 3)."""
    return np.einsum("nij,nkj->nki", affine[..., :2], points) + affine[:, None, :, 2]


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The picture as (H, W, 3) RGB.

    Raises:
        InputError: the file can't be decoded.
    """
    picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise InputError(f"{path}: must be a picture that OpenCV can decode; replace the file")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def warp(
    picture: NDArray[np.uint8], affine: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The crop of this (height, width) that the affine cuts; black beyond the picture's border."""
    height, width = size
    return np.asarray(cv2.warpAffine(picture, affine, (width, height), flags=cv2.INTER_LINEAR))


def stored_to_crop_affine(frame: CropFrame) -> NDArray[np.float64]:
    """The affine from any person's stored crop to its plain crop, without augmentation, (2, 3).

    In the official frame it is a shift by whole pixels.
    """
    linear = np.diag(frame.zoom)
    offset = frame.centre - linear @ stored_frame(frame.size).centre
    return np.concatenate([linear, offset[:, None]], axis=1)


def plain_affines(count: int, frame: CropFrame) -> Tensor:
    """Stored crops to plain crops, (count, 2, 3)."""
    return torch.from_numpy(stored_to_crop_affine(frame)).float().expand(count, 2, 3)


def crop_to_image_affine(
    frame: CropFrame, image_to_stored: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The affines from people's plain crops to their pictures, (N, 2, 3).

    Args:
        image_to_stored: those of a store whose input has the frame's size, (N, 2, 3).
    """
    crop_to_stored = invert_affine(stored_to_crop_affine(frame))
    return chain_affines(crop_to_stored, invert_affine(image_to_stored))


def chain_affines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine (..., 2, 3) that does the first, then the second."""
    linear = second[..., :2] @ first[..., :2]
    offset = second[..., :2] @ first[..., 2:] + second[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def draw_affines(
    keypoints_stored: Tensor,
    visibility: Tensor,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Random affines from stored to augmented crop, (B, 2, 3), and which of them mirror, (B,).

    A mirrored person's joints still have to be put in ``skeleton.flip_order``. The draws are those
    of the official HRNet: scale, rotation, half body, flip.

    Args:
        keypoints_stored: in stored-crop pixels, (B, K, 2).
        visibility: COCO visibility, (B, K).
        frame: the augmented crop's.
    """
    count = len(keypoints_stored)
    height, width = frame.size

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    centres = torch.tensor(stored_frame(frame.size).centre).expand(count, 2)
    shown = torch.full((count,), float(width))
    half_centres, half_shown, can_halve = _half_bodies(
        keypoints_stored, visibility, skeleton, width / height, uniform() < 0.5
    )
    halved = can_halve & (uniform() < augment.half_body)
    centres = torch.where(halved[:, None], half_centres, centres)
    shown = torch.where(halved, half_shown, shown)
    spread = augment.scale
    shown = shown * (1 + normal() * spread).clamp(1 - spread, 1 + spread)
    turned = uniform() < ROTATED_SHARE
    angles = (normal() * augment.rotation).clamp(-2 * augment.rotation, 2 * augment.rotation)
    angles = torch.deg2rad(torch.where(turned, angles, 0.0))
    mirrored = uniform() < augment.flip

    sine, cosine = torch.sin(angles), torch.cos(angles)
    turn = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], 1)
    zoom = (width / shown)[:, None] * torch.tensor(frame.zoom)  # (B, 2)
    linear = zoom[:, :, None] * turn
    offset = torch.tensor(frame.centre) - torch.einsum("bij,bj->bi", linear, centres)
    affine = torch.cat([linear, offset[:, :, None]], dim=2)
    mirror = torch.tensor([[-1.0], [1.0]])  # x becomes w - 1 - x
    flipped = affine * mirror
    flipped[:, 0, 2] += width - 1
    return torch.where(mirrored[:, None, None], flipped, affine), mirrored


def _half_bodies(
    keypoints: Tensor, visibility: Tensor, skeleton: Skeleton, aspect: float, wants_upper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and shown width of a crop about half of each person, and whether there is one."""
    is_upper = torch.zeros(skeleton.num_joints, dtype=torch.bool)
    is_upper[list(skeleton.upper_body)] = True
    labelled = visibility > 0
    upper, lower = labelled & is_upper, labelled & ~is_upper
    takes_upper = wants_upper & (upper.sum(1) > 2) | (lower.sum(1) <= 2)
    chosen = torch.where(takes_upper[:, None], upper, lower)
    number = chosen.sum(1)
    total = torch.where(chosen[..., None], keypoints, 0.0).sum(1)
    centres = total / number.clamp(min=1)[:, None]
    low = torch.where(chosen[..., None], keypoints, math.inf).amin(1)
    high = torch.where(chosen[..., None], keypoints, -math.inf).amax(1)
    extent = torch.where((number > 1)[:, None], high - low, 1.0)
    shown = torch.maximum(extent[:, 0], extent[:, 1] * aspect) * HALF_BODY_PADDING
    can_halve = (labelled.sum(1) > MIN_HALF_BODY_JOINTS) & (number > 2) & (shown > 4)
    return centres, shown.clamp(min=4.0), can_halve


def carry(points: Tensor, affine: Tensor) -> Tensor:
    """Points (B, ..., 2) carried by the affine of their person, (B, 2, 3)."""
    flat = points.reshape(len(points), -1, 2)
    moved = torch.einsum("bij,bkj->bki", affine[..., :2], flat) + affine[:, None, :, 2]
    return moved.reshape(points.shape)


def carry_modes(modes: Tensor, affine: Tensor) -> Tensor:
    """Modes (B, K, M, 4) of which x and y are carried by the affine of their person, (B, 2, 3).

    Height and width stay: the width is a multiple of the sigma of whichever codec draws them.
    """
    return torch.cat((carry(modes[..., :2], affine), modes[..., 2:]), dim=-1)


def cut_crops(stored: Tensor, affine: Tensor, frame: CropFrame) -> Tensor:
    """Bilinear crops (B, 3, h, w) in 0..255, cut from stored crops (B, hs, ws, 3) uint8.

    Args:
        affine: stored to crop pixels, (B, 2, 3); beyond the stored crop there is black.
    """
    height, width = frame.size
    stored_height, stored_width = stored.shape[1:3]
    linear = torch.linalg.inv(affine[..., :2])
    offset = -linear @ affine[..., 2:]
    rows = torch.arange(height, dtype=torch.float32, device=stored.device)
    columns = torch.arange(width, dtype=torch.float32, device=stored.device)
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
    source = pixels.reshape(1, -1, 2) @ linear.mT + offset.mT
    span = torch.tensor([stored_width - 1, stored_height - 1], device=stored.device)
    grid = (source * 2 / span - 1).reshape(-1, height, width, 2)
    maps = stored.permute(0, 3, 1, 2).float()
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=True)


def jitter_colour(crops: Tensor, spread: float, draws: Tensor) -> Tensor:
    """Crops in 0..255 with contrast and brightness changed by up to ``spread`` each.

    Args:
        draws: uniform in 0..1, (2, B): contrast and brightness of each person.
    """
    contrast, brightness = (1 + (2 * draws - 1) * spread).to(crops.device)[..., None, None, None]
    mean = crops.mean(dim=(1, 2, 3), keepdim=True)
    return (((crops - mean) * contrast + mean) * brightness).clamp(0, 255)
