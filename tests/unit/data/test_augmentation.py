"""Augmentations of crops: the official draws, colors, patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from models.codecs.crop_frame import CropFrame
from models.skeleton import COCO, Skeleton
from study.config.schema import AugmentConfig
from study.data import augmentation
from study.data.augmentation import (
    cut_crops,
    draw_augmentation,
    jitter_color,
    no_augmentation,
    paste_patches,
)
from study.data.crops import plain_affines, transform_points

FRAME = CropFrame((96, 64))
CPU = torch.device("cpu")
STILL = AugmentConfig(scale=0, rotation=0, flip=0, half_body=0, color=0, erase=0, occlude=0)
OFFICIAL = AugmentConfig(
    scale=0.35, rotation=40, flip=0.5, half_body=0.3, color=0, erase=0, occlude=0
)
PATCHED = AugmentConfig(scale=0, rotation=0, flip=0, half_body=0, color=0, erase=0.4, occlude=0.3)


def draw(
    augment: AugmentConfig, count: int, seed: int = 0, labeled: int = 17
) -> tuple[Tensor, Tensor]:
    """Affines of ``count`` people with the first ``labeled`` COCO joints labeled, and whether
    each is mirrored."""
    generator = torch.Generator().manual_seed(seed)
    visibility = (torch.arange(17) < labeled).expand(count, 17) * 2
    drawn = draw_augmentation(standing(count), visibility, COCO, FRAME, augment, generator)
    return drawn.affine, (drawn.joints != torch.arange(17)).any(dim=1)


def standing(count: int) -> Tensor:
    """Joint j at (40 + j, 10 + 6 j) of the stored crop of SIZE, (144, 96)."""
    joints = torch.arange(17.0)
    return torch.stack([40 + joints, 10 + 6 * joints], -1).expand(count, 17, 2)


def zooms(affine: Tensor) -> Tensor:
    return torch.linalg.det(affine[..., :2]).abs().sqrt()


def angles(affine: Tensor, mirrored: Tensor) -> Tensor:
    """Degrees of the rotation before the mirror."""
    cosine = torch.where(mirrored, -affine[:, 0, 0], affine[:, 0, 0])
    return torch.rad2deg(torch.atan2(-affine[:, 1, 0], cosine))


def images(count: int) -> NDArray[np.uint8]:
    """Stored crops of smooth random pixels, (count, 144, 96, 3)."""
    noise = torch.rand(count, 3, 18, 12, generator=torch.Generator().manual_seed(6))
    smooth = torch.nn.functional.interpolate(noise, (144, 96), mode="bicubic").clamp(0, 1)
    return (255 * smooth).byte().permute(0, 2, 3, 1).numpy()


def official_draws(count: int) -> tuple[NDArray[np.float64], ...]:
    """Zoom, degrees, whether mirrored, whether halved, whether above, by the official rules."""
    rng = np.random.RandomState(1)
    halved = rng.rand(count) < 0.3
    above = rng.randn(count) < 0.5
    scale = np.clip(rng.randn(count) * 0.35 + 1, 0.65, 1.35)
    turned = np.clip(rng.randn(count) * 40, -80, 80)
    angle = np.where(rng.rand(count) <= 0.6, turned, 0)
    return scale, angle, rng.rand(count) <= 0.5, halved, above


def test_draws_are_distributed_as_the_official_ones() -> None:
    count = 20000
    affine, mirrored = draw(OFFICIAL, count)
    scale, angle, flips, halved, above = official_draws(count)
    # standing people: the upper half shows 60 px of width, the lower 30, the whole crop 64
    shown = np.where(halved, np.where(above, 60, 30), 64) * scale
    ours = (64 / zooms(affine)).double().numpy()
    # the statistic of two samples of one distribution is above 0.0195 once in a thousand times
    assert stats.ks_2samp(ours.round(2), shown.round(2)).statistic < 0.0195
    turned = angles(affine, mirrored).double().numpy().round(2)
    assert stats.ks_2samp(turned, angle.round(2)).statistic < 0.0195
    assert mirrored.float().mean().item() == pytest.approx(flips.mean(), abs=0.02)


def test_draws_are_uncorrelated() -> None:
    affine, mirrored = draw(OFFICIAL, 20000, labeled=8)
    drawn = np.stack([zooms(affine).log(), angles(affine, mirrored), mirrored.float()])
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("colored", [False, True])
def test_crops_from_bytes_equal_crops_by_grid_sample(colored: bool) -> None:
    stored = images(20)
    affine, _ = draw(OFFICIAL, 20)
    colors = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.8
    by_bytes = cut_crops(stored, affine, FRAME, CPU, colors if colored else None)
    sampled = augmentation._cut_on_device(torch.from_numpy(stored), affine, FRAME)
    if colored:
        sampled = jitter_color(sampled, colors)
    assert by_bytes.shape == sampled.shape == (20, 3, 96, 64)
    # an image half a pixel aside is 1.5 off in the mean; bytes are rounded, once or twice
    assert (by_bytes - sampled).abs().mean() < (0.6 if colored else 0.3)
    aside = cut_crops(stored, affine + torch.tensor([[0, 0, 0.5], [0, 0, 0]]), FRAME, CPU)
    assert (aside - by_bytes).abs().mean() > 0.9 or colored


def test_color_factors_of_1_change_nothing_and_values_stay_in_range() -> None:
    crops = torch.from_numpy(images(3)).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(jitter_color(crops, torch.ones(3, 2)), crops)
    changed = jitter_color(crops, torch.full((3, 2), 1.4))
    assert changed.min() >= 0 and changed.max() <= 255 and not torch.equal(changed, crops)


def test_color_jitter_by_hand() -> None:
    crop = torch.tensor([50.0, 150.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    # contrast 1.2, brightness 0.8: (100 -+ 60) * 0.8
    jittered = jitter_color(crop, torch.tensor([[1.2, 0.8]]))
    torch.testing.assert_close(jittered[0, 0, 0], torch.tensor([32.0, 128.0]))


def test_colors_lie_within_their_spread_and_are_drawn_only_where_wanted(five: Skeleton) -> None:
    def drawn(color: float) -> augmentation.Augmentation:
        settings = AugmentConfig(0, 0, 0, 0, color, 0, 0)
        generator = torch.Generator().manual_seed(0)
        points = torch.zeros(500, 5, 2)
        return draw_augmentation(points, torch.zeros(500, 5), five, FRAME, settings, generator)

    colors = drawn(0.2).colors
    assert colors is not None and drawn(0).colors is None and drawn(0).patches is None
    assert 0.8 <= colors.min() < 0.81 and 1.19 < colors.max() <= 1.2


def test_patches_have_their_frequency_and_size() -> None:
    generator = torch.Generator().manual_seed(0)
    visibility = torch.ones(5000, 17)
    drawn = draw_augmentation(standing(5000), visibility, COCO, FRAME, PATCHED, generator)
    assert drawn.patches is not None and drawn.patch_people is not None
    assert drawn.patch_colors is not None and 0 <= drawn.patch_colors.min()
    width, height = (drawn.patches[:, 2:] - drawn.patches[:, :2]).T
    area = width * height
    assert (area > 0).float().mean().item() == pytest.approx(0.3 + 0.7 * 0.4, abs=0.03)
    assert area.max() <= 0.15 + 1e-6 and drawn.patches.min() >= 0 and drawn.patches.max() <= 1
    people = drawn.patch_people
    assert (people >= 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (people != torch.arange(5000)).all() and people.max() < 5000


def test_patch_shows_the_filling_inside_and_the_crop_outside() -> None:
    crops = torch.zeros(2, 3, 8, 4)
    patches = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]])
    paste_patches(crops, patches, torch.full((2, 3, 1, 1), 9.0))
    assert crops[0, :, 4:, 1:3].eq(9).all() and crops[0].sum() == 9 * 3 * 4 * 2
    assert crops[1].eq(0).all()


def test_flip_is_its_own_inverse() -> None:
    mirror = AugmentConfig(scale=0, rotation=0, flip=1, half_body=0, color=0, erase=0, occlude=0)
    affine, mirrored = draw(mirror, 1)
    assert mirrored.all()
    stored = torch.randint(0, 256, (1, 144, 96, 3), generator=torch.Generator().manual_seed(2))
    stored = stored.byte()
    once = cut_crops(stored.numpy(), affine, FRAME, CPU)
    plain = cut_crops(stored.numpy(), plain_affines(1, FRAME), FRAME, CPU)
    torch.testing.assert_close(once.flip(-1), plain, atol=0.05, rtol=0)
    points = transform_points(standing(1), plain_affines(1, FRAME))
    flipped = transform_points(standing(1), affine)
    torch.testing.assert_close(flipped[..., 0], 63 - points[..., 0])  # x becomes w - 1 - x
    torch.testing.assert_close(flipped[..., 1], points[..., 1])
    order = torch.tensor(COCO.flip_order)
    assert order[order].tolist() == list(range(17))


def test_no_augmentation_is_the_plain_crop(five: Skeleton) -> None:
    plain = no_augmentation(3, five, FRAME)
    assert torch.equal(plain.affine, plain_affines(3, FRAME))
    assert plain.joints.tolist() == [list(range(5))] * 3


def test_without_augmentation_the_crop_is_the_plain_one() -> None:
    affine, mirrored = draw(STILL, 3)
    assert not mirrored.any()
    torch.testing.assert_close(affine, plain_affines(3, FRAME))


def test_scale_lies_within_one_spread() -> None:
    affine, _ = draw(OFFICIAL, 4000, labeled=8)
    shown = 1 / zooms(affine)
    assert 0.65 - 1e-5 < shown.min() < 0.66 and 1.34 < shown.max() < 1.35 + 1e-5
    # a normal cut at one spread: 16 % lie on either bound
    assert (shown < 0.6501).float().mean().item() == pytest.approx(0.159, abs=0.02)


def test_six_in_ten_are_rotated_by_at_most_two_spreads() -> None:
    angle = angles(*draw(OFFICIAL, 4000)).abs()
    assert (angle > 1e-3).float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert 79 < angle.max() < 80.001
    assert angle[angle > 1e-3].median().item() == pytest.approx(40 * 0.6745, abs=2)


def test_half_of_the_people_are_flipped() -> None:
    affine, mirrored = draw(OFFICIAL, 4000)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(torch.linalg.det(affine[..., :2]) < 0, mirrored)


@pytest.mark.parametrize(("labeled", "share"), [(8, 0.0), (9, 0.3), (17, 0.3)])
def test_half_body_crops_need_more_than_8_labeled_joints(labeled: int, share: float) -> None:
    halving = AugmentConfig(
        scale=0, rotation=0, flip=0, half_body=0.3, color=0, erase=0, occlude=0
    )
    affine, _ = draw(halving, 3000, labeled=labeled)
    moved = (affine - plain_affines(1, FRAME)).abs().amax((1, 2)) > 1e-3
    assert moved.float().mean().item() == pytest.approx(share, abs=0.03)


def test_half_body_shows_the_upper_or_the_lower_joints() -> None:
    halving = AugmentConfig(scale=0, rotation=0, flip=0, half_body=1, color=0, erase=0, occlude=0)
    affine, _ = draw(halving, 2000)
    carried = transform_points(standing(2000), affine)
    # upper: joints 0..10, 60 px high, so 60 * 2/3 * 1.5 = 60 of 64 px wide; lower: 11..16, 30 px
    is_upper = zooms(affine) < 1.5
    torch.testing.assert_close(
        zooms(affine)[is_upper], torch.tensor(64 / 60).expand(int(is_upper.sum()))
    )
    torch.testing.assert_close(
        zooms(affine)[~is_upper], torch.tensor(64 / 30).expand(int((~is_upper).sum()))
    )
    middle = torch.tensor([32.0, 48.0])
    torch.testing.assert_close(
        carried[is_upper][:, :11].mean(1), middle.expand(int(is_upper.sum()), 2)
    )
    torch.testing.assert_close(
        carried[~is_upper][:, 11:].mean(1), middle.expand(int((~is_upper).sum()), 2)
    )
    assert is_upper.float().mean().item() == pytest.approx(0.691, abs=0.03)


def test_half_body_takes_the_half_that_has_joints() -> None:
    halving = AugmentConfig(scale=0, rotation=0, flip=0, half_body=1, color=0, erase=0, occlude=0)
    affine, _ = draw(halving, 200, labeled=13)  # two joints below: too few for a crop
    assert (zooms(affine) < 1.5).all()


@pytest.mark.parametrize("upper", [(), tuple(range(17))], ids=["none", "all"])
def test_without_joints_of_both_halves_there_is_no_half_body(upper: tuple[int, ...]) -> None:
    halving = AugmentConfig(scale=0, rotation=0, flip=0, half_body=1, color=0, erase=0, occlude=0)
    skeleton = dataclasses.replace(COCO, upper_body=upper)
    generator, visibility = torch.Generator().manual_seed(0), torch.full((50, 17), 2)
    drawn = draw_augmentation(standing(50), visibility, skeleton, FRAME, halving, generator)
    torch.testing.assert_close(drawn.affine, plain_affines(50, FRAME))


def test_mirrored_crop_without_pairs_keeps_the_joints_labels() -> None:
    mirrored = AugmentConfig(scale=0, rotation=0, flip=1, half_body=0, color=0, erase=0, occlude=0)
    skeleton = dataclasses.replace(COCO, flip_pairs=((5, 6),))
    generator, visibility = torch.Generator().manual_seed(0), torch.full((3, 17), 2)
    drawn = draw_augmentation(standing(3), visibility, skeleton, FRAME, mirrored, generator)
    expected = list(range(17))
    expected[5], expected[6] = 6, 5
    assert drawn.joints.tolist() == [expected] * 3
    assert (torch.linalg.det(drawn.affine[..., :2]) < 0).all()


def test_the_same_generator_draws_the_same() -> None:
    first, second, other = (draw(OFFICIAL, 50, seed)[0] for seed in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_person_without_labels_is_augmented_without_nan(five: Skeleton) -> None:
    generator = torch.Generator().manual_seed(0)
    nobody = torch.zeros(20, 5)
    place = torch.zeros(20, 5, 2)
    drawn = draw_augmentation(place, nobody, five, FRAME, OFFICIAL, generator)
    assert drawn.affine.isfinite().all()
