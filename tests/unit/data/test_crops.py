"""From image to crop: the official frame, stored crops, and joints that move with the pixels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import Skeleton
from study.config.schema import AugmentConfig
from study.data.augmentation import cut_crops, draw_augmentation
from study.data.crops import (
    STORED_MARGIN,
    apply_affine,
    image_to_crop_affine,
    invert_affine,
    plain_affines,
    read_image,
    stored_frame,
    stored_size,
    transform_points,
    warp,
)
from study.errors import InputError

OFFICIAL_SIZE = (256, 192)
OFFICIAL_FRAME = CropFrame(OFFICIAL_SIZE)
SIZE = (96, 64)
FRAME = CropFrame(SIZE)
CPU = torch.device("cpu")
OFFICIAL = AugmentConfig(
    scale=0.35, rotation=40.0, flip=0.5, half_body=0.3, color=0.0, erase=0, occlude=0
)


@pytest.fixture(scope="module")
def official(shared: Path) -> list[dict[str, Any]]:
    content = json.loads((shared / "reference/preprocess/official_crops.json").read_text())
    people: list[dict[str, Any]] = content["persons"]
    return people


def boxes_of(people: list[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([person["clean_bbox"] for person in people])


def of_five(
    count: int, augment: AugmentConfig, five: Skeleton, frame: CropFrame
) -> tuple[Tensor, Tensor, Tensor]:
    """Joints spread over the stored crop's middle, their affines, and who is mirrored."""
    generator = torch.Generator().manual_seed(11)
    points = torch.rand(count, 5, 2, generator=generator) * torch.tensor([40.0, 60.0])
    points += torch.tensor([28.0, 42.0])
    visibility = torch.full((count, 5), 2)
    drawn = draw_augmentation(points, visibility, five, frame, augment, generator)
    return points, drawn.affine, (drawn.joints != torch.arange(5)).any(dim=1)


def dots_at(points: Tensor, size: tuple[int, int]) -> Tensor:
    """One image (hs, ws, 3) per point (N, 2): black, with a soft dot there."""
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    away = (columns - points[:, 0, None, None]) ** 2 + (rows - points[:, 1, None, None]) ** 2
    dots = (255 * torch.exp(-away / (2 * 2.5**2))).round().to(torch.uint8)
    return dots[..., None].expand(-1, -1, -1, 3)


def noise(*shape: int) -> Tensor:
    """Random pixels, the same every time."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).byte()


def centroids(crops: Tensor) -> Tensor:
    """Center of mass of the first channel, x and y, (N, 2)."""
    mass = crops[:, 0]
    total = mass.sum((1, 2))
    x = (mass.sum(1) * torch.arange(mass.shape[2])).sum(-1) / total
    y = (mass.sum(2) * torch.arange(mass.shape[1])).sum(-1) / total
    return torch.stack([x, y], -1)


def test_affine_equals_the_official_one(official: list[dict[str, Any]]) -> None:
    affine = image_to_crop_affine(boxes_of(official), OFFICIAL_FRAME)
    expected = np.array([person["affine"] for person in official])
    np.testing.assert_allclose(affine, expected, atol=1e-3)
    np.testing.assert_allclose(affine[..., :2], expected[..., :2], atol=1e-6)


def test_inverse_affine_equals_the_official_one(official: list[dict[str, Any]]) -> None:
    inverse = invert_affine(image_to_crop_affine(boxes_of(official), OFFICIAL_FRAME))
    expected = np.array([person["affine_inverse"] for person in official])
    np.testing.assert_allclose(inverse, expected, atol=1e-3)


def test_rotated_and_scaled_affine_equals_the_official_one(
    official: list[dict[str, Any]],
) -> None:
    affine = image_to_crop_affine(boxes_of(official), OFFICIAL_FRAME, scale=1.2, rotation=30)
    expected = np.array([person["affine_rot30_scale1p2"] for person in official])
    np.testing.assert_allclose(affine, expected, atol=1e-3)


def test_joints_in_the_crop_equal_the_official_ones(
    official: list[dict[str, Any]], shared: Path
) -> None:
    affine = image_to_crop_affine(boxes_of(official), OFFICIAL_FRAME)
    for person, own in zip(official, affine, strict=True):
        name = f"annotations/person_keypoints_{person['set']}.json"
        content = json.loads((shared / "data/coco_tiny" / name).read_text())
        joints = next(a for a in content["annotations"] if a["id"] == person["ann_id"])
        points = np.array(joints["keypoints"], float).reshape(17, 3)
        seen = points[:, 2] > 0
        carried = apply_affine(points[None, :, :2], own[None])[0]
        np.testing.assert_allclose(
            carried[seen], np.array(person["joints_in_crop"])[seen], atol=1e-3
        )


def test_warped_crop_equals_the_official_one_but_for_opencv_versions(
    official: list[dict[str, Any]], shared: Path
) -> None:
    crops = np.load(shared / "reference/preprocess/official_crops.npz")
    compared = 0
    for person in official:
        name = f"crop_{person['set']}_{person['ann_id']}"
        if name not in crops:
            continue
        image = read_image(shared / "data/coco_tiny" / person["set"] / person["file_name"])
        affine = image_to_crop_affine(boxes_of([person]), OFFICIAL_FRAME)[0]
        difference = warp(image, affine, OFFICIAL_SIZE).astype(float) - crops[name]
        # OpenCV 4 and 5 differ by 0.15 on average; a shift by a tenth of a pixel by more than 0.5
        assert np.abs(difference).mean() < 0.5
        compared += 1
    assert compared == 4


@pytest.mark.parametrize("size", [OFFICIAL_SIZE, (96, 160), (64, 64)])
def test_plain_crop_of_a_stored_crop_equals_the_direct_warp(size: tuple[int, int]) -> None:
    coarse = np.random.RandomState(0).randint(0, 256, (15, 20, 3), np.uint8)
    image = np.asarray(cv2.resize(coarse, (240, 180)), np.uint8)
    boxes = np.array([[30.0, 20, 90, 140], [150, 60, 95, 40]])
    frame = CropFrame(size)
    direct = image_to_crop_affine(boxes, frame)
    stored = image_to_crop_affine(boxes, stored_frame(size), margin=STORED_MARGIN)
    wide = np.stack([warp(image, affine, stored_size(size)) for affine in stored])
    plain = cut_crops(wide, plain_affines(2, frame), frame, CPU)
    for crop, affine in zip(plain, direct, strict=True):
        expected = torch.from_numpy(warp(image, affine, size)).permute(2, 0, 1)
        assert (crop - expected).abs().max() < 1.01


def test_plain_crop_copies_the_stored_pixels() -> None:
    stored = noise(2, *stored_size(SIZE), 3)
    plain = cut_crops(stored.numpy(), plain_affines(2, FRAME), FRAME, CPU)
    expected = stored[:, 24:120, 16:80].permute(0, 3, 1, 2)  # (144, 96) without its margins
    torch.testing.assert_close(plain, expected.float(), atol=0.02, rtol=0)


def test_stored_crop_shows_half_as_much_again() -> None:
    assert stored_size((256, 192)) == (384, 288)
    box = np.array([[10.0, 20, 30, 40]])
    plain = image_to_crop_affine(box, FRAME)
    stored = image_to_crop_affine(box, stored_frame(SIZE), margin=STORED_MARGIN)
    np.testing.assert_allclose(stored[..., :2], plain[..., :2])
    np.testing.assert_allclose(stored[..., 2] - plain[..., 2], [[16, 24]])


def test_box_is_widened_to_the_crops_aspect_and_by_a_quarter() -> None:
    tall, flat = image_to_crop_affine(np.array([[0.0, 0, 10, 80], [0, 0, 80, 10]]), FRAME)
    assert tall[0, 0] == pytest.approx(96 / (80 * 1.25))  # the height fills the crop
    assert flat[0, 0] == pytest.approx(64 / (80 * 1.25))
    assert (tall[0] @ [5, 40, 1], tall[1] @ [5, 40, 1]) == pytest.approx((32, 48))


@pytest.mark.parametrize("frame", [FRAME, CropFrame(SIZE, align_corners=True)])
def test_joints_move_with_the_pixels_under_rotation_scale_and_flip(
    frame: CropFrame, five: Skeleton
) -> None:
    points, affine, mirrored = of_five(40, OFFICIAL, five, frame)
    assert mirrored.any() and not mirrored.all()
    carried = transform_points(points, affine)[:, 0]
    crops = cut_crops(dots_at(points[:, 0], stored_size(SIZE)).numpy(), affine, frame, CPU)
    inside = ((carried > 10) & (carried < torch.tensor([53.0, 85.0]))).all(-1)
    assert inside.sum() > 20
    # the mean error would be 0.5 px if the flip were about w/2 or the grid half a pixel off
    error = (centroids(crops) - carried)[inside]
    assert error.abs().max() < 0.1


def test_transform_keeps_the_dimensions_between() -> None:
    affine = torch.tensor([[[0.0, -2.0, 5.0], [2.0, 0.0, 1.0]]])
    modes = torch.tensor([[[[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]]]])  # (1, 1, 3, 2)
    expected = torch.tensor([[[[1.0, 3.0], [5.0, 1.0], [3.0, 7.0]]]])
    torch.testing.assert_close(transform_points(modes, affine), expected)


def test_outside_the_image_is_black() -> None:
    white = np.full((20, 20, 3), 255, np.uint8)
    affine = image_to_crop_affine(np.array([[0.0, 0, 20, 20]]), CropFrame((32, 32)))[0]
    crop = warp(white, affine, (32, 32))
    assert crop[16, 16].tolist() == [255] * 3 and crop[0, 0].tolist() == [0] * 3


def test_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg.*replace the file"):
        read_image(path)


def test_invert_affine_undoes_an_affine() -> None:
    affine = image_to_crop_affine(np.array([[3.0, 4, 50, 60]]), FRAME, rotation=25, scale=0.8)
    points = np.array([[[7.0, 9.0], [40.0, 12.0]]])
    back = apply_affine(apply_affine(points, affine), invert_affine(affine))
    np.testing.assert_allclose(back, points, atol=1e-9)
    assert math.isclose(np.linalg.det(affine[0, :, :2]), (64 / (50 * 1.25 * 0.8)) ** 2)
