"""RefinedPose: a student, its codec and the refiner behind one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.codecs.codec import CODECS, Dark, HeatmapCodec, Msra
from models.codecs.simcc import SimCC
from models.igp_gcn import IgpGcn
from models.pose_features import PoseFeatures, PoseNetwork
from models.refined_pose import RefinedPose
from models.simcc_head import SimccHead
from models.skeleton import Skeleton

STICK_MAN = Skeleton(
    name="stick_man",
    joints=("head", "left_hand", "right_hand", "left_foot", "right_foot"),
    edges=((0, 1), (0, 2), (0, 3), (0, 4)),
    flip_pairs=((1, 2), (3, 4)),
    oks_sigmas=(0.03, 0.06, 0.06, 0.09, 0.09),
    upper_body=(0, 1, 2),
)
CROP = (96, 64)
CHANNELS = (7, 6, 5)


class StubStudent(PoseNetwork):
    """One convolution per output, at strides 16, 8, 4."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 5, 5, stride=4, padding=2)
        self.features = nn.ModuleList(
            nn.Conv2d(3, channels, 3, stride=stride, padding=1)
            for channels, stride in zip(CHANNELS, (16, 8, 4), strict=True)
        )

    def forward(self, crops: Tensor) -> PoseFeatures:
        return PoseFeatures(self.maps(crops), tuple(layer(crops) for layer in self.features))


def student_of(codec: HeatmapCodec) -> StubStudent:
    student = StubStudent()
    if isinstance(codec, SimCC):
        student.simcc_head = SimccHead(CHANNELS[-1], 5, codec.heatmap_size, codec.num_bins)
    return student


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> HeatmapCodec:
    return CODECS[request.param](CROP, (24, 16))


@pytest.fixture
def crops() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, *CROP)


def build(codec: HeatmapCodec, is_refined: bool) -> RefinedPose:
    torch.manual_seed(0)
    student = student_of(codec)
    refiner = IgpGcn(STICK_MAN, CHANNELS, width=8, depth=1) if is_refined else None
    return RefinedPose(student, codec, refiner).eval()


def test_pose_without_refiner_is_the_students(codec: HeatmapCodec, crops: Tensor) -> None:
    model = build(codec, is_refined=False)
    keypoints, scores = model(crops)
    expected_keypoints, expected_scores = codec.decode_features(model.student.predict(crops))
    assert torch.equal(keypoints, expected_keypoints)
    assert torch.equal(scores, expected_scores)


def test_untrained_refiner_changes_nothing(codec: HeatmapCodec, crops: Tensor) -> None:
    refined, plain = build(codec, is_refined=True)(crops), build(codec, is_refined=False)(crops)
    assert torch.equal(refined[0], plain[0])
    assert torch.equal(refined[1], plain[1])


def test_result_is_the_last_level_with_the_students_scores(
    codec: HeatmapCodec, crops: Tensor
) -> None:
    model = build(codec, is_refined=True)
    assert model.refiner is not None
    for level in range(3):
        nn.init.constant_(model.refiner.get_parameter(f"levels.{level}.head.bias"), 0.1)
    features = model.student.predict(crops)
    start, expected_scores = codec.decode_features(features)
    levels = model.refiner(features.pyramid, start, expected_scores, CROP)
    keypoints, scores = model(crops)
    assert torch.equal(keypoints, levels[-1])
    assert not torch.equal(keypoints, levels[0])
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("candidates", [1, 3])
def test_untrained_refiner_returns_the_start_to_the_bit(
    candidates: int, codec: HeatmapCodec, crops: Tensor
) -> None:
    model = build(codec, is_refined=True)
    model.refiner = IgpGcn(STICK_MAN, CHANNELS, width=8, depth=1, candidates=candidates).eval()
    start = torch.rand(3, 5, 2) * 60, torch.rand(3, 5) * 0.9 + 0.1
    keypoints, scores = model(crops, start)
    assert torch.equal(keypoints, start[0])
    assert torch.equal(scores, start[1])


def test_joint_that_is_not_given_starts_from_the_students_peak(
    codec: HeatmapCodec, crops: Tensor
) -> None:
    model = build(codec, is_refined=True)
    start = torch.rand(3, 5, 2) * 60, torch.full((3, 5), 0.5)
    start[1][1, 2] = 0
    (keypoints, scores), own = model(crops, start), model(crops)
    is_own = start[1] == 0
    assert torch.equal(keypoints[is_own], own[0][is_own])
    assert torch.equal(scores[is_own], own[1][is_own])
    assert torch.equal(keypoints[~is_own], start[0][~is_own])


def test_given_pose_needs_a_refiner(crops: Tensor) -> None:
    model = build(Dark(CROP, (24, 16)), is_refined=False)
    with pytest.raises(ValueError, match=r"needs a refiner.*refine\.epochs"):
        model(crops, (torch.zeros(3, 5, 2), torch.ones(3, 5)))


def test_crops_of_another_size_are_refused() -> None:
    model = build(Msra(CROP, (24, 16)), is_refined=False)
    with pytest.raises(ValueError, match=r"input size.*\(64, 96\).*height, width"):
        model(torch.zeros(1, 3, 64, 96))


@pytest.mark.slow
def test_estimator_exports_as_one_graph_for_any_batch(crops: Tensor) -> None:
    model = build(Dark(CROP, (24, 16)), is_refined=True)
    shapes = {"crops": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (crops,), dynamic_shapes=shapes)
    for batch in (crops, crops[:2]):
        keypoints, scores = program.module()(batch)
        torch.testing.assert_close(keypoints, model(batch)[0])
        torch.testing.assert_close(scores, model(batch)[1])
