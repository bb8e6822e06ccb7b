"""The flip test: a network's output for the mirrored crop, flipped back and averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codecs.codec import CODECS, HeatmapCodec, Msra
from models.codecs.simcc import SimCC
from models.pose_features import PoseFeatures, PoseNetwork
from models.refined_pose import RefinedPose
from models.skeleton import COCO, Skeleton

SIZE, MAPS = (256, 192), (64, 48)


def decode_cases(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "reference/preprocess/decode_cases.npz") as arrays:
        return dict(arrays)


def output_for(codec: HeatmapCodec, keypoints_crop: Tensor) -> PoseFeatures:
    """Return the output of a network that knows these joints."""
    visible = torch.ones(keypoints_crop.shape[:2])
    heatmaps, _ = codec.encode(keypoints_crop, visible)
    bins = None
    if isinstance(codec, SimCC):
        (x, y), _ = codec.encode_bins(keypoints_crop, visible)
        bins = ((x + 1e-12).log(), (y + 1e-12).log())
    return PoseFeatures(heatmaps, (), bins)


def mirrored(keypoints_crop: Tensor, skeleton: Skeleton) -> Tensor:
    """Return the joints of the mirrored crop: x becomes w - 1 - x, and the sides swap."""
    flipped = keypoints_crop[:, list(skeleton.flip_order)].clone()
    flipped[..., 0] = SIZE[1] - 1 - flipped[..., 0]
    return flipped


def joints(count: int) -> Tensor:
    """Draw joints at whole pixels, which SimCC's bins represent exactly."""
    generator = torch.Generator().manual_seed(2)
    return 40 + (torch.rand(4, count, 2, generator=generator) * torch.tensor([110, 170])).round()


def test_msra_flips_back_as_the_official_code_does(shared: Path) -> None:
    arrays = decode_cases(shared)
    heatmaps = torch.tensor(arrays["heatmaps"]).float()
    back = Msra(SIZE, MAPS).flip_back(PoseFeatures(heatmaps, ()), COCO.flip_order).heatmaps
    official = torch.tensor(arrays["flip_back_head"]).float()  # before the shift
    assert torch.equal(back[:1, :4, :, 1:], official[..., :-1])
    assert torch.equal(back[:1, :4, :, 0], official[..., 0])


def test_msra_average_has_the_official_keypoints(shared: Path) -> None:
    arrays = decode_cases(shared)
    codec = Msra(SIZE, MAPS)
    features = PoseFeatures(torch.tensor(arrays["heatmaps"]).float(), ())
    mean = features.averaged_with(codec.flip_back(features, COCO.flip_order))
    keypoints, scores = codec.decode_features(mean)
    np.testing.assert_allclose(scores, arrays["maxvals_flip_shift_avg"][..., 0], atol=1e-6)
    factor = arrays["scale"][:, None, :1] * 200 / SIZE[1]
    image = (keypoints.numpy() - [96, 128]) * factor + arrays["center"][:, None]
    np.testing.assert_allclose(image, arrays["final_preds_flip_shift_avg"], atol=1e-3)


@pytest.mark.parametrize(("name", "bias"), [("udp", 0), ("simcc", 0), ("msra", 1), ("dark", 1)])
def test_perfect_output_for_a_mirrored_crop_flips_back_to_its_place(
    name: str, bias: int, five: Skeleton
) -> None:
    """Except for one pixel: the official shift is a whole cell, where 3 of 4 pixels are exact."""
    codec = CODECS[name](SIZE, MAPS)
    truth = joints(5)
    back = codec.flip_back(output_for(codec, mirrored(truth, five)), five.flip_order)
    found, _ = codec.decode_features(back)
    tolerance = 2.9 if name == "msra" else 0.2  # it decodes whole and quarter cells
    assert ((found - truth - torch.tensor([bias, 0])).norm(dim=-1) < tolerance).all()
    assert ((found - truth)[..., 0].mean() - bias).abs() < (0.6 if name == "msra" else 0.02)


@pytest.mark.parametrize("name", ["udp", "simcc"])
def test_exact_flip_keeps_a_perfect_output(name: str, five: Skeleton) -> None:
    codec = CODECS[name](SIZE, MAPS)
    truth = joints(5)
    features = output_for(codec, truth)
    back = codec.flip_back(output_for(codec, mirrored(truth, five)), five.flip_order)
    mean = features.averaged_with(back)
    for average, alone in zip(
        codec.decode_features(mean), codec.decode_features(features), strict=True
    ):
        torch.testing.assert_close(average, alone, atol=2e-3, rtol=0)
    if name == "udp":
        torch.testing.assert_close(mean.heatmaps, features.heatmaps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_flip_swaps_left_and_right_joints(name: str, five: Skeleton) -> None:
    codec = CODECS[name](SIZE, MAPS)
    truth = joints(5)
    truth[:, :, 1] = torch.tensor([40.0, 80.0, 120.0, 160.0, 200.0])
    back = codec.flip_back(output_for(codec, mirrored(truth, five)), five.flip_order)
    torch.testing.assert_close(
        codec.decode_features(back)[0][..., 1], truth[..., 1], atol=2, rtol=0
    )


class Brightness(PoseNetwork):
    """Predicts every joint at the brightest pixel of the crop; its pyramid is the crop."""

    def __init__(self, codec: HeatmapCodec) -> None:
        super().__init__()
        self.codec, self.calls = codec, 0

    def forward(self, crops: Tensor) -> PoseFeatures:
        self.calls += 1
        cells = crops.mean(1).flatten(1).argmax(1)
        places = torch.stack((cells % SIZE[1], cells // SIZE[1]), -1).float()
        return output_for(self.codec, places[:, None].expand(-1, 5, -1))._replace(pyramid=(crops,))


@pytest.mark.parametrize("name", ["udp", "simcc"])
def test_flip_test_runs_the_student_twice_and_keeps_the_crops_pyramid(
    name: str, five: Skeleton
) -> None:
    codec = CODECS[name](SIZE, MAPS)
    student = Brightness(codec)
    crops = torch.zeros(2, 3, *SIZE)
    crops[0, :, 100, 60] = 255
    crops[1, :, 80, 130] = 255
    keypoints, scores = RefinedPose(student, codec, None, five.flip_order)(crops)
    assert student.calls == 2
    expected = torch.tensor([[60.0, 100], [130, 80]])[:, None].expand(2, 5, 2)
    torch.testing.assert_close(keypoints, expected, atol=0.05, rtol=0)
    assert (scores > 0.9).all()
    features = RefinedPose(student, codec, None, five.flip_order).predict(crops)
    torch.testing.assert_close(features.pyramid[0], student.pixels.normalize(crops))


def test_student_runs_once_without_a_flip_test(five: Skeleton) -> None:
    codec = CODECS["udp"](SIZE, MAPS)
    student = Brightness(codec)
    RefinedPose(student, codec, None)(torch.rand(1, 3, *SIZE))
    assert student.calls == 1


def test_average_covers_heatmaps_and_bins() -> None:
    one = PoseFeatures(torch.zeros(1), (torch.ones(1),), (torch.zeros(2), torch.ones(2)))
    other = PoseFeatures(torch.ones(1), (torch.zeros(1),), (torch.ones(2), torch.zeros(2)))
    mean = one.averaged_with(other)
    assert mean.bins is not None
    assert mean.heatmaps.item() == 0.5 and mean.pyramid[0].item() == 1
    assert [part.tolist() for part in mean.bins] == [[0.5, 0.5], [0.5, 0.5]]
