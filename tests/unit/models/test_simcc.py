"""SimCC: labels over bins and their decoding, against mmpose and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.build import build_model
from models.codecs.simcc import SimCC
from models.pose_features import PoseFeatures
from models.simcc_head import SimccHead
from models.skeleton import Skeleton

CODEC = SimCC((256, 192), (64, 48))
VISIBLE = torch.full((1, 1), 2)


def cases(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "reference/preprocess/codec_cases.npz") as arrays:
        return dict(arrays)


def with_bins(x: Tensor, y: Tensor) -> PoseFeatures:
    """Build a network's output with these probabilities, (B, K, bins)."""
    return PoseFeatures(torch.zeros(1, 1, 64, 48), (), ((x + 1e-12).log(), (y + 1e-12).log()))


def peaks(bins: int, spread: float, *places: tuple[float, float]) -> Tensor:
    """Sum Gaussians of unit area at (bin, share), as (1, 1, bins)."""
    total = torch.zeros(bins)
    for place, share in places:
        away = (torch.arange(bins) - place) / spread
        total += share * torch.exp(-0.5 * away**2) / (spread * math.sqrt(2 * math.pi))
    return total[None, None]


def test_labels_equal_mmpose_except_for_their_sum(shared: Path) -> None:
    arrays = cases(shared)
    labels, weights = CODEC.encode_bins(
        torch.tensor(arrays["keypoints"]), torch.tensor(arrays["visible"])
    )
    np.testing.assert_array_equal(weights.numpy(), arrays["simcc_gauss_weights"][:, 0])
    for name, label in zip("xy", labels, strict=True):
        reference = arrays[f"simcc_gauss_{name}"][:, 0]
        total = reference.sum(-1, keepdims=True)
        assert label.shape == (4, 17, reference.shape[-1])
        # its spreads are rounded, 4.9 for 4.899; a bin to the side would be 0.01 off
        np.testing.assert_allclose(
            label[:2].numpy(), reference / np.maximum(total, 1e-9), atol=5e-5
        )
        np.testing.assert_allclose(label.sum(-1), weights, atol=1e-5)


def test_round_trip_equals_mmpose(shared: Path) -> None:
    arrays = cases(shared)
    (x, y), weights = CODEC.encode_bins(
        torch.tensor(arrays["keypoints"]), torch.tensor(arrays["visible"])
    )
    keypoints, scores = CODEC.decode_features(with_bins(x, y))
    labeled = weights.numpy() > 0
    assert np.array_equal(keypoints.numpy()[labeled], arrays["simcc_gauss_roundtrip"][labeled])
    np.testing.assert_allclose(
        scores.numpy()[labeled], arrays["simcc_gauss_scores"][labeled], atol=1e-3
    )
    away = np.linalg.norm(keypoints.numpy() - arrays["keypoints"], axis=-1)[labeled]
    assert away.mean() == pytest.approx(0.1865, abs=1e-3)


def test_published_spreads() -> None:
    assert CODEC.spread == pytest.approx((4.9, 5.66), abs=5e-3)
    assert SimCC((384, 288), (96, 72)).spread == pytest.approx((6, 6.93), abs=5e-3)
    assert SimCC((256, 192), (64, 48), sigma=1).spread == pytest.approx((2.45, 2.83), abs=5e-3)
    assert CODEC.num_bins == (384, 512)


def test_unlabeled_and_far_joints_have_weight_and_label_0() -> None:
    keypoints = torch.tensor([[[50.0, 60], [math.nan, 0], [-7, 60], [-9, 60], [9e5, -9e5]]])
    visibility = torch.tensor([[0, 0, 1, 1, 1]])
    labels, weights = CODEC.encode_bins(keypoints, visibility)
    # a label's window is 3 * 4.9 bins, 7.35 px
    assert weights.tolist() == [[0, 0, 1, 0, 0]]
    for label in labels:
        torch.testing.assert_close(label.sum(-1), weights)


def test_height_is_the_lower_peak_relative_to_a_perfect_labels() -> None:
    spread_x, spread_y = CODEC.spread
    x = peaks(384, spread_x, (100, 0.8), (300, 0.2))
    y = peaks(512, 2 * spread_y, (200, 1))  # twice as wide: half as high
    keypoints, scores = CODEC.decode_features(with_bins(x, y))
    assert keypoints.tolist() == [[[50.0, 100.0]]]
    assert scores.item() == pytest.approx(0.5, abs=1e-3)


def test_sharper_peak_than_the_label_has_height_1() -> None:
    x, y = peaks(384, 1, (100, 1)), peaks(512, 1, (200, 1))
    assert CODEC.decode_features(with_bins(x, y))[1].item() == 1
    assert CODEC.decode_feature_modes(with_bins(x, y), 2)[0, 0, 0, 2] == 1


def test_modes_pair_the_peaks_of_both_axes() -> None:
    spread_x, spread_y = CODEC.spread
    x = peaks(384, spread_x, (100, 0.7), (300, 0.3))
    y = peaks(512, spread_y, (200, 0.6), (400, 0.4))
    modes = CODEC.decode_feature_modes(with_bins(x, y), 3)[0, 0]
    # the lower of both shares: 0.6, then 0.4 for (100, 400), then 0.3 for (300, 200)
    expected = torch.tensor([[50, 100, 0.6, 1], [50, 200, 0.4, 1], [150, 100, 0.3, 1]])
    torch.testing.assert_close(modes, expected, atol=2e-3, rtol=0)


def test_first_mode_is_where_decode_features_puts_the_joint() -> None:
    """Even for the flat bins of an untrained network."""
    torch.manual_seed(0)
    bins = (0.1 * torch.randn(3, 5, 384), 0.1 * torch.randn(3, 5, 512))
    features = PoseFeatures(torch.zeros(1), (), bins)
    keypoints, scores = CODEC.decode_features(features)
    modes = CODEC.decode_feature_modes(features, 3)
    assert torch.equal(modes[:, :, 0, :2], keypoints)
    assert torch.equal(modes[:, :, 0, 2], scores)
    assert (modes[:, :, :-1, 2] >= modes[:, :, 1:, 2]).all()


def test_one_peak_is_one_mode() -> None:
    (x, y), _ = CODEC.encode_bins(torch.tensor([[[80.0, 120.0]]]), VISIBLE)
    features = PoseFeatures(torch.zeros(1), (), ((x + 1e-30).log(), (y + 1e-30).log()))
    modes = CODEC.decode_feature_modes(features, 3)[0, 0]
    expected = torch.tensor([[80.0, 120, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]])
    torch.testing.assert_close(modes, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("width", [0.5, 1.5, 3.0])
def test_width_of_a_mode_is_decoded(width: float) -> None:
    spread_x, spread_y = CODEC.spread
    x = peaks(384, width * spread_x, (180, 1))
    y = peaks(512, width * spread_y, (250, 1))
    assert CODEC.decode_feature_modes(with_bins(x, y), 1)[0, 0, 0, 3].item() == pytest.approx(
        width, 1e-2
    )


def test_decoding_passes_no_gradient() -> None:
    bins = (torch.randn(1, 5, 384, requires_grad=True), torch.randn(1, 5, 512, requires_grad=True))
    for result in CODEC.decode_features(PoseFeatures(torch.zeros(1), (), bins)):
        assert not result.requires_grad


def test_bins_of_another_crop_are_refused() -> None:
    features = PoseFeatures(torch.zeros(1), (), (torch.zeros(1, 1, 512), torch.zeros(1, 1, 384)))
    with pytest.raises(ValueError, match=r"bins must be the codec's, got \(512, 384\)"):
        CODEC.decode_features(features)


def test_head_adds_bins_to_the_heatmaps(five: Skeleton) -> None:
    codec = SimCC((96, 64), (24, 16))
    plain = build_model("mobile_net", "tiny", five)
    network = build_model("mobile_net", "tiny", five, codec).eval()
    features = network.predict(torch.rand(2, 3, 96, 64) * 255)
    assert features.heatmaps.shape == (2, 5, 24, 16)
    assert features.bins is not None
    assert [tuple(part.shape) for part in features.bins] == [(2, 5, 128), (2, 5, 192)]
    added = set(network.state_dict()) - set(plain.state_dict())
    assert added == {
        f"simcc_head.{layer}.{kind}"
        for layer in ("joints", "x", "y")
        for kind in ("weight", "bias")
    }
    assert (
        plain.simcc_head is None and plain.eval().predict(torch.zeros(1, 3, 96, 64)).bins is None
    )


def test_head_distinguishes_every_cell_and_joint() -> None:
    torch.manual_seed(0)
    head = SimccHead(3, 5, (24, 16), (128, 192))
    features = torch.zeros(1, 3, 24, 16)
    nothing = head(features)
    features[0, 1, 20, 3] = 1
    x, y = head(features)
    expected = head.x.weight[:, 20 * 16 + 3] * head.joints.weight[2, 1, 0, 0]
    torch.testing.assert_close(x[0, 2] - nothing[0][0, 2], expected)
    assert x.shape == (1, 5, 128) and y.shape == (1, 5, 192)
