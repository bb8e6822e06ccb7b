"""Augmentations, drawn for a batch and applied to a batch.

The geometry is drawn as by the official HRNet: scale, rotation, half body, flip. Color and
patches are additions, since a student of few images needs them. Everything is drawn for the global
batch from one generator, so that it is the same for any number of workers. Pixels are cut on the
device that trains; on a CPU OpenCV cuts them from bytes, several times faster than grid_sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.config.schema import AugmentConfig
from study.data.crops import plain_affines, stored_frame

HALF_BODY_PADDING = 1.5
"""Size of a half-body crop over that of the half's joints, as in the official HRNet."""
ROTATED_SHARE = 0.6
"""Share of people who are rotated, as in the official HRNet."""
MIN_HALF_BODY_JOINTS = 8
"""People need more labeled joints than this for a half-body crop, as in the official HRNet."""
UPPER_BELOW = 0.5
"""The upper half is shown if a *normal* draw is below this, as in the official HRNet: 69 %."""
GRAY = np.arange(256, dtype=np.uint8)[None]
"""All gray values, (1, 256)."""
PATCH_AREA = (0.02, 0.15)
"""Least and largest area of a patch, as a share of the crop."""
PATCH_ASPECT = 3.0
"""Largest ratio of a patch's sides, measured in shares of the crop."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One augmentation for each of B people."""

    affine: Tensor
    """From stored-crop pixels to crop pixels, (B, 2, 3)."""
    joints: Tensor
    """Index of the stored joint that each joint shows, (B, K); a flip swaps left and right."""
    colors: Tensor | None = None
    """Factors of contrast and brightness, (B, 2); None: colors stay unchanged."""
    patches: Tensor | None = None
    """Left, top, right, bottom of the hidden part, as shares of the crop, (B, 4); an empty patch
    hides nothing. None: there are no patches."""
    patch_colors: Tensor | None = None
    """Patch color, RGB in 0..255, (B, 3)."""
    patch_people: Tensor | None = None
    """Place in the drawn batch of the crop that fills the patch; -1: its color does, (B,)."""

    def take(self, places: Tensor) -> Augmentation:
        """Return those of the people at these places; ``patch_people`` is not renumbered."""
        taken = {
            field.name: value[places]
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **taken)

    def in_flip_order(self, values: NDArray[np.generic]) -> Tensor:
        """Reorder values per stored joint, (B, K, ...), to values per joint."""
        tensor = torch.from_numpy(np.asarray(values))
        return tensor[torch.arange(len(tensor))[:, None], self.joints]


def no_augmentation(count: int, skeleton: Skeleton, frame: CropFrame) -> Augmentation:
    """Return the augmentation that gives plain crops."""
    return Augmentation(
        affine=plain_affines(count, frame),
        joints=torch.arange(skeleton.num_joints).expand(count, -1),
    )


def draw_augmentation(
    keypoints_stored: Tensor,
    visibility: Tensor,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    generator: torch.Generator,
) -> Augmentation:
    """Draw one augmentation for each of B people.

    Args:
        keypoints_stored: in stored-crop pixels, (B, K, 2).
        visibility: COCO visibility, (B, K).
        frame: frame of the augmented crop.
    """
    affine = draw_affines(keypoints_stored, visibility, skeleton, frame, augment, generator)
    return add_flip_and_color(affine, skeleton, frame, augment, generator)


def add_flip_and_color(
    affine: Tensor,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    generator: torch.Generator,
) -> Augmentation:
    """Flip some of the affines (B, 2, 3) from stored to augmented crop; add colors and patches."""
    count = len(affine)
    mirrored = torch.rand(count, generator=generator) < augment.flip
    drawn = Augmentation(mirror(affine, mirrored, frame), flip_order_of(mirrored, skeleton))
    if augment.color:
        draws = torch.rand(count, 2, generator=generator)
        drawn = dataclasses.replace(drawn, colors=1 + (2 * draws - 1) * augment.color)
    return _with_patches(drawn, augment, generator)


def flip_order_of(mirrored: Tensor, skeleton: Skeleton) -> Tensor:
    """Return the index of the stored joint that each joint shows, (B, K), by who is mirrored."""
    order = torch.tensor(skeleton.flip_order)
    return torch.where(mirrored[:, None], order, torch.arange(skeleton.num_joints))


def _with_patches(
    drawn: Augmentation, augment: AugmentConfig, generator: torch.Generator
) -> Augmentation:
    """Draw rectangles of one color or of another person (Zhong et al., Random Erasing, 2020)."""
    if not (augment.erase or augment.occlude):
        return drawn
    count = len(drawn.affine)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    occluded = uniform() < augment.occlude
    has_patch = occluded | (uniform() < augment.erase)
    low, high = PATCH_AREA
    area = low + (high - low) * uniform()
    aspect = torch.exp((2 * uniform() - 1) * math.log(PATCH_ASPECT))
    half = torch.stack(((area * aspect).sqrt(), (area / aspect).sqrt()), dim=1) / 2
    center = uniform(2)
    patches = torch.cat((center - half, center + half), dim=1).clamp(0, 1)
    shift = torch.randint(1, max(count, 2), (count,), generator=generator)
    others = (torch.arange(count) + shift) % count
    return dataclasses.replace(
        drawn,
        patches=torch.where(has_patch[:, None], patches, 0.0),
        patch_colors=255 * uniform(3),
        patch_people=torch.where(occluded, others, -1),
    )


def draw_affines(
    keypoints_stored: Tensor,
    visibility: Tensor,
    skeleton: Skeleton,
    frame: CropFrame,
    augment: AugmentConfig,
    generator: torch.Generator,
) -> Tensor:
    """Draw affines from stored to augmented crop, (B, 2, 3), not mirrored.

    Scale, rotation and half body are drawn as by the official HRNet.

    Args:
        keypoints_stored: in stored-crop pixels, (B, K, 2).
        visibility: COCO visibility, (B, K).
        frame: frame of the augmented crop.
    """
    count = len(keypoints_stored)
    height, width = frame.size

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    centers = torch.tensor(stored_frame(frame.size).center).expand(count, 2)
    shown = torch.full((count,), float(width))
    half_centers, half_shown, can_halve = _half_bodies(
        keypoints_stored, visibility, skeleton, width / height, normal() < UPPER_BELOW
    )
    halved = can_halve & (uniform() < augment.half_body)
    centers = torch.where(halved[:, None], half_centers, centers)
    shown = torch.where(halved, half_shown, shown)
    spread = augment.scale
    shown = shown * (1 + normal() * spread).clamp(1 - spread, 1 + spread)
    turned = uniform() < ROTATED_SHARE
    angles = (normal() * augment.rotation).clamp(-2 * augment.rotation, 2 * augment.rotation)
    angles = torch.deg2rad(torch.where(turned, angles, 0.0))
    return affines_of(centers, shown, angles, frame)


def affines_of(centers: Tensor, shown: Tensor, angles: Tensor, frame: CropFrame) -> Tensor:
    """Return affines from stored to augmented crop, (B, 2, 3).

    Args:
        centers: point of the stored crop that becomes the crop's center, (B, 2).
        shown: stored-crop pixels across the crop's width, (B,).
        angles: angle of the crop about that point, radians, (B,).
    """
    width = frame.size[1]
    sine, cosine = torch.sin(angles), torch.cos(angles)
    turn = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], 1)
    zoom = (width / shown)[:, None] * torch.tensor(frame.zoom)  # (B, 2)
    linear = zoom[:, :, None] * turn
    offset = torch.tensor(frame.center) - torch.einsum("bij,bj->bi", linear, centers)
    return torch.cat([linear, offset[:, :, None]], dim=2)


def mirror(affine: Tensor, mirrored: Tensor, frame: CropFrame) -> Tensor:
    """Mirror some of the affines (B, 2, 3) to crop pixels: x becomes w - 1 - x."""
    flipped = affine * torch.tensor([[-1.0], [1.0]])
    flipped[:, 0, 2] += frame.size[1] - 1
    return torch.where(mirrored[:, None, None], flipped, affine)


def _half_bodies(
    keypoints: Tensor, visibility: Tensor, skeleton: Skeleton, aspect: float, wants_upper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return center and shown width of each person's half-body crop, and whether there is one.

    There is none if the skeleton's ``upper_body`` is empty, or holds all joints.
    """
    is_upper = torch.zeros(skeleton.num_joints, dtype=torch.bool)
    is_upper[list(skeleton.upper_body)] = True
    labeled = visibility > 0
    upper, lower = labeled & is_upper, labeled & ~is_upper
    takes_upper = wants_upper & (upper.sum(1) > 2) | (lower.sum(1) <= 2)
    chosen = torch.where(takes_upper[:, None], upper, lower)
    number = chosen.sum(1)
    total = torch.where(chosen[..., None], keypoints, 0.0).sum(1)
    centers = total / number.clamp(min=1)[:, None]
    low = torch.where(chosen[..., None], keypoints, math.inf).amin(1)
    high = torch.where(chosen[..., None], keypoints, -math.inf).amax(1)
    extent = torch.where((number > 1)[:, None], high - low, 1.0)
    shown = torch.maximum(extent[:, 0], extent[:, 1] * aspect) * HALF_BODY_PADDING
    can_halve = (labeled.sum(1) > MIN_HALF_BODY_JOINTS) & (number > 2) & (shown > 4)
    can_halve &= bool(is_upper.any() and not is_upper.all())
    return centers, shown.clamp(min=4.0), can_halve


def cut_crops(
    stored: Sequence[NDArray[np.uint8]],
    affine: Tensor,
    frame: CropFrame,
    device: torch.device,
    colors: Tensor | None = None,
) -> Tensor:
    """Cut crops (B, 3, h, w) in 0..255 from stored ones, bilinearly, on the device.

    Args:
        stored: B arrays (hs, ws, 3) RGB; black outside.
        affine: stored to crop pixels, (B, 2, 3).
        colors: factors of contrast and brightness, (B, 2); None: colors stay unchanged.
    """
    if device.type == "cpu":
        return _cut_on_cpu(stored, affine, frame, colors)
    images = torch.from_numpy(np.stack(stored))
    crops = _cut_on_device(images.to(device), affine.to(device), frame)
    return crops if colors is None else jitter_color(crops, colors.to(device))


def _cut_on_cpu(
    stored: Sequence[NDArray[np.uint8]], affine: Tensor, frame: CropFrame, colors: Tensor | None
) -> Tensor:
    """Cut crops in bytes: values are rounded after the warp, and again after the colors."""
    height, width = frame.size
    crops = np.empty((len(stored), height, width, 3), np.float32)
    # Warping four channels is faster than three, even with both conversions.
    wide = np.empty((*stored[0].shape[:2], 4), np.uint8)
    warped = np.empty((height, width, 4), np.uint8)
    crop = np.empty((height, width, 3), np.uint8)
    for place, (image, matrix) in enumerate(zip(stored, affine.double().numpy(), strict=True)):
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=wide)
        cv2.warpAffine(wide, matrix, (width, height), dst=warped, flags=cv2.INTER_LINEAR)
        cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, dst=crop)
        if colors is not None:
            cv2.LUT(crop, _color_table(crop, *colors[place].tolist()), dst=crop)
        crops[place] = crop  # converted here, while it is in the CPU's cache
    return torch.from_numpy(crops).permute(0, 3, 1, 2)


def _color_table(crop: NDArray[np.uint8], contrast: float, brightness: float) -> NDArray[np.uint8]:
    """Return the new value of each gray value of the crop (h, w, 3), (1, 256)."""
    mean = sum(cv2.mean(crop)[:3]) / 3
    shift = mean * (1 - contrast) * brightness
    return np.asarray(cv2.addWeighted(GRAY, contrast * brightness, GRAY, 0, shift), np.uint8)


def _cut_on_device(stored: Tensor, affine: Tensor, frame: CropFrame) -> Tensor:
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


def jitter_color(crops: Tensor, colors: Tensor) -> Tensor:
    """Change contrast and brightness of crops (B, 3, h, w) in 0..255 by factors (B, 2)."""
    contrast, brightness = colors.T[..., None, None, None]
    mean = crops.mean(dim=(1, 2, 3), keepdim=True)
    return (((crops - mean) * contrast + mean) * brightness).clamp(0, 255)


def paste_patches(crops: Tensor, patches: Tensor, fillings: Tensor) -> None:
    """Replace the crops' pixels (B, 3, h, w) under the patches by the fillings, in place.

    Args:
        patches: left, top, right, bottom as shares of the crop, (B, 4); empty patches hide
            nothing.
        fillings: (B, 3, h, w), or (B, 3, 1, 1) for one color.
    """
    height, width = crops.shape[-2:]
    edges = (patches * torch.tensor([width, height, width, height])).round().int().tolist()
    for crop, (left, top, right, bottom), filling in zip(
        crops, edges, fillings.expand_as(crops), strict=True
    ):
        crop[:, top:bottom, left:right] = filling[:, top:bottom, left:right]
