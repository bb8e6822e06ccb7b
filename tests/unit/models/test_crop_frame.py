"""A crop's frame: the official HRNet's and UDP's, and poses transformed between them."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.codec import CODECS, Dark, HeatmapCodec, Udp
from models.codecs.crop_frame import CropFrame
from models.pose_features import PoseFeatures, PoseNetwork
from models.skeleton import Skeleton
from study.cache.crop_store import CropStore, StoreSpec, make_crop_store, open_crop_store
from study.cache.teacher_store import open_teacher_store
from study.config.schema import AugmentConfig
from study.data.augmentation import cut_crops, draw_augmentation
from study.data.crops import (
    STORED_MARGIN,
    apply_affine,
    compose_affines,
    crop_to_image_affine,
    image_to_crop_affine,
    invert_affine,
    plain_affines,
    stored_frame,
    stored_to_crop_affine,
    transform_modes,
    transform_points,
    warp,
)
from study.data.people import People
from study.storage.paths import TARGETS
from study.teachers.adapters import HeatmapTeacher
from study.teachers.make import draw_views, store_targets
from study.teachers.online import OnlineTeacher
from study.training.batches import TrainingPeople, training_batches
from study.workers import Workers

SMALL, LARGE = (256, 192), (384, 288)
BOXES = np.array([[30.0, 20, 90, 140], [150.5, 60, 95, 40], [11, 7, 63.25, 84.5]])
FLIP = AugmentConfig(scale=0, rotation=0, flip=1, half_body=0, color=0, erase=0, occlude=0)
WILD = AugmentConfig(scale=0.35, rotation=40, flip=0.5, half_body=0.3, color=0, erase=0, occlude=0)


def udp_matrix(
    box: NDArray[np.float64], rotation: float, size: tuple[int, int]
) -> NDArray[np.float64]:
    """The unbiased affine as published: mmpose's get_udp_warp_matrix, which rotates the other way.

    ``scale`` is the box's size, widened to the crop's shape and by a quarter.
    """
    height, width = size
    x, y = box[:2] + box[2:] / 2
    scale = max(box[2], box[3] * width / height) * 1.25 * np.array([1, height / width])
    zoom_x, zoom_y = (width - 1) / scale[0], (height - 1) / scale[1]
    cosine, sine = math.cos(math.radians(-rotation)), math.sin(math.radians(-rotation))
    return np.array(
        [
            [cosine * zoom_x, -sine * zoom_x, zoom_x * (-x * cosine + y * sine + scale[0] / 2)],
            [sine * zoom_y, cosine * zoom_y, zoom_y * (-x * sine - y * cosine + scale[1] / 2)],
        ]
    )


def images_to_stored(size: tuple[int, int]) -> NDArray[np.float64]:
    return image_to_crop_affine(BOXES, stored_frame(size), margin=STORED_MARGIN)


def test_lengths_by_hand() -> None:
    official, udp = CropFrame((256, 192)), CropFrame((256, 192), align_corners=True)
    assert (official.span, official.center, official.zoom) == ((192, 256), (96, 128), (1, 1))
    assert (udp.span, udp.center) == ((191, 255), (95.5, 127.5))
    assert udp.zoom == (191 / 192, 255 / 256)


def test_only_udp_has_length_w_minus_1() -> None:
    frames = {name: codec((96, 64), (24, 16)).frame for name, codec in CODECS.items()}
    assert {name for name, frame in frames.items() if frame.align_corners} == {"udp"}
    assert {frame.size for frame in frames.values()} == {(96, 64)}


@pytest.mark.parametrize("rotation", [0, 30, -75])
def test_udp_affine_equals_the_published_formula(rotation: float) -> None:
    frame = CropFrame(SMALL, align_corners=True)
    affine = image_to_crop_affine(BOXES, frame, rotation=rotation)
    expected = np.stack([udp_matrix(box, rotation, SMALL) for box in BOXES])
    np.testing.assert_allclose(affine, expected, atol=1e-9)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("size", [SMALL, LARGE, (96, 160)])
def test_affines_via_the_stored_crop_equal_the_direct_one(
    name: str, size: tuple[int, int]
) -> None:
    frame = CODECS[name](size, (16, 16)).frame
    by_store = compose_affines(images_to_stored(size), stored_to_crop_affine(frame))
    np.testing.assert_allclose(by_store, image_to_crop_affine(BOXES, frame), atol=1e-9)
    back = crop_to_image_affine(frame, images_to_stored(size))
    np.testing.assert_allclose(
        compose_affines(by_store, back), np.eye(2, 3)[None].repeat(3, 0), atol=1e-9
    )


def test_official_frame_is_the_stored_crop_shifted_by_whole_pixels() -> None:
    for size in (SMALL, LARGE, (96, 64), (64, 64)):
        affine = stored_to_crop_affine(CropFrame(size))
        assert np.array_equal(affine[:, :2], np.eye(2))
        assert np.array_equal(affine[:, 2], [-size[1] / 4, -size[0] / 4])


def test_udp_pixels_from_the_stored_crop_equal_those_from_the_image() -> None:
    coarse = np.random.RandomState(0).randint(0, 256, (15, 20, 3), np.uint8)
    image = np.asarray(cv2.resize(coarse, (240, 180)), np.uint8)
    frame = CropFrame((96, 64), align_corners=True)
    stored = images_to_stored(frame.size)
    wide = np.stack([warp(image, affine, stored_frame(frame.size).size) for affine in stored])
    plain = cut_crops(wide, plain_affines(3, frame), frame, torch.device("cpu"))
    assert plain.shape == (3, 3, 96, 64)
    for crop, affine in zip(plain, image_to_crop_affine(BOXES, frame), strict=True):
        expected = torch.from_numpy(warp(image, affine, frame.size)).permute(2, 0, 1)
        # interpolated twice and rounded; neighbors differ by 9, so half a pixel would be 4
        assert (crop - expected).abs().mean() < 1


def test_mirrored_udp_crop_is_the_mirror_image_of_the_plain_one(five: Skeleton) -> None:
    frame = CropFrame((96, 64), align_corners=True)
    points = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(1)) * 60
    visible = torch.full((4, 5), 2)
    affine = draw_augmentation(points, visible, five, frame, FLIP, torch.Generator()).affine
    assert (torch.linalg.det(affine[..., :2]) < 0).all()
    plain, flipped = (
        transform_points(points, plain_affines(4, frame)),
        transform_points(points, affine),
    )
    torch.testing.assert_close(flipped[..., 0], 63 - plain[..., 0])
    torch.testing.assert_close(flipped[..., 1], plain[..., 1])


def joints_in_image(count: int) -> NDArray[np.float64]:
    """Draw joints well inside each box, (3, count, 2)."""
    places = np.random.RandomState(4).uniform(0.1, 0.9, (len(BOXES), count, 2))
    joints: NDArray[np.float64] = BOXES[:, None, :2] + places * BOXES[:, None, 2:]
    return joints


def modes_of_an_oracle(codec: HeatmapCodec, joints: NDArray[np.float64]) -> Tensor:
    """Encode the joints in the codec's crop of each box, and decode the modes."""
    in_crop = apply_affine(joints, image_to_crop_affine(BOXES, codec.frame))
    heatmaps, weights = codec.encode(
        torch.from_numpy(in_crop).float(), torch.ones(in_crop.shape[:2])
    )
    assert weights.all()
    return codec.decode_feature_modes(PoseFeatures(heatmaps, ()), 3)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (Dark(SMALL, (64, 48)), Udp(SMALL, (64, 48))),  # msra's frame, without its quarter cells
        (Udp(SMALL, (64, 48)), Dark(SMALL, (64, 48))),
        (Dark(LARGE, (96, 72)), Dark(SMALL, (64, 48))),
        (Udp(LARGE, (96, 72)), Dark(SMALL, (64, 48))),
        (Dark((256, 256), (64, 64)), Udp(SMALL, (64, 48))),
    ],
    ids=["msra-to-udp", "udp-to-msra", "384-to-256", "udp-384-to-256", "square-to-high"],
)
@pytest.mark.parametrize("augment", [FLIP, WILD], ids=["flip", "wild"])
def test_teachers_pose_matches_the_truth_in_the_students_crop(
    teacher: HeatmapCodec, student: HeatmapCodec, augment: AugmentConfig, five: Skeleton
) -> None:
    joints = joints_in_image(5)
    image_to_stored = images_to_stored(student.input_size)
    crop_to_image = crop_to_image_affine(teacher.frame, images_to_stored(teacher.input_size))
    to_store = torch.from_numpy(compose_affines(crop_to_image, image_to_stored)).float()
    modes = transform_modes(modes_of_an_oracle(teacher, joints), to_store)
    truth = torch.from_numpy(apply_affine(joints, image_to_stored)).float()
    visible = torch.full((len(BOXES), 5), 2)
    generator = torch.Generator().manual_seed(3)
    affine = draw_augmentation(truth, visible, five, student.frame, augment, generator).affine
    assert (torch.linalg.det(affine[..., :2]) < 0).any()
    away = transform_modes(modes, affine)[:, :, 0, :2] - transform_points(truth, affine)
    zoom = torch.linalg.det(affine[:, :2, :2]).abs().sqrt()[:, None]
    # the frames a pixel apart would be 0.5 px off or more, codecs themselves are 0.03 to 0.05
    assert (away.norm(dim=-1) / zoom).max() < 0.1


def test_udp_and_the_official_frame_differ_by_half_a_pixel() -> None:
    """Shows that the test above can fail."""
    joints = joints_in_image(5)
    official, udp = (
        apply_affine(joints, image_to_crop_affine(BOXES, CropFrame(SMALL, align_corners=corners)))
        for corners in (False, True)
    )
    assert 0.2 < np.abs(official - udp).mean() < 0.6


class Oracle(PoseNetwork):
    """Predicts heatmaps of the true joints of people in their order."""

    def __init__(self, codec: HeatmapCodec, keypoints_crop: Tensor) -> None:
        super().__init__()
        self.codec, self.answers, self.shown = codec, keypoints_crop, 0

    def forward(self, crops: Tensor) -> PoseFeatures:
        answers = self.answers[self.shown : self.shown + len(crops)]
        self.shown += len(crops)
        heatmaps, _ = self.codec.encode(answers, torch.ones(answers.shape[:2]))
        return PoseFeatures(heatmaps, (torch.ones(len(crops), 2, *heatmaps.shape[2:]),))


@pytest.fixture(scope="module")
def large_store(five_people: People, tmp_path_factory: pytest.TempPathFactory) -> CropStore:
    """Make a store of crops with joints so far inside that no blur reaches the edge."""
    return open_crop_store(
        make_crop_store(five_people, StoreSpec(SMALL, tmp_path_factory.mktemp("large")))
    )


@pytest.mark.parametrize("name", ["dark", "udp"])
@pytest.mark.parametrize("student_corners", [False, True])
def test_stored_targets_match_the_truth_in_every_batch(
    name: str,
    student_corners: bool,
    large_store: CropStore,
    five: Skeleton,
    workers: Workers,
    tmp_path: Path,
) -> None:
    codec = CODECS[name](SMALL, (64, 48))
    truth = torch.from_numpy(large_store.keypoints_stored.copy())
    in_crop = transform_points(truth, plain_affines(13, codec.frame))
    teacher = HeatmapTeacher(Oracle(codec, in_crop), codec)
    frame = CropFrame(SMALL, align_corners=student_corners)
    views = draw_views(large_store, five, frame, WILD, number=1, seed=0)
    online = OnlineTeacher(teacher, large_store, large_store)
    store_targets(online, views, five, workers, tmp_path / TARGETS)
    (batch,) = training_batches(
        TrainingPeople(large_store, five, open_teacher_store(tmp_path / TARGETS)),
        frame,
        WILD,
        [torch.arange(13)],
        torch.Generator().manual_seed(8),
        workers,
    )
    assert batch.teacher_modes is not None
    away = (batch.teacher_modes[:, :, 0, :2] - batch.keypoints_crop).norm(dim=-1)
    zoom = (batch.areas_crop / torch.from_numpy(large_store.areas.copy())).sqrt()[:, None]
    inside = ((in_crop > 24) & (in_crop < torch.tensor([167.0, 231.0]))).all(-1)
    inside &= inside[:, list(five.flip_order)]  # whichever side a mirrored joint comes from
    assert inside.sum() > 20
    assert (away / zoom)[inside].max() < 0.1


def test_composed_affines_apply_one_after_the_other() -> None:
    first, second = images_to_stored(SMALL), invert_affine(images_to_stored(LARGE))
    points = joints_in_image(4)
    expected = apply_affine(apply_affine(points, first), second)
    np.testing.assert_allclose(
        apply_affine(points, compose_affines(first, second)), expected, atol=1e-9
    )


def test_transformed_mode_keeps_height_and_width() -> None:
    affine = torch.tensor([[[2.0, 0.0, 5.0], [0.0, 2.0, 1.0]]])
    modes = torch.tensor([[[[1.0, 2.0, 0.7, 1.5], [0.0, 0.0, 0.3, 0.9]]]])
    expected = torch.tensor([[[[7.0, 5.0, 0.7, 1.5], [5.0, 1.0, 0.3, 0.9]]]])
    torch.testing.assert_close(transform_modes(modes, affine), expected)
