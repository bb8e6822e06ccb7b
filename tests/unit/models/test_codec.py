"""Heatmap codecs against the official HRNet, mmpose and each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.codecs.codec import CODECS, Dark, HeatmapCodec, Msra, Udp

SIZE, MAPS = (256, 192), (64, 48)
ODD_SIZE, ODD_MAPS = (96, 64), (24, 16)  # the codec must not take height for width
UDP_OVER_MMPOSE = np.array([191 / 192, 255 / 256])
"""mmpose's UDP encodes with the crop's size - 1 but decodes with its size."""
VISIBLE = torch.full((1, 1), 2)


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> HeatmapCodec:
    return CODECS[request.param](SIZE, MAPS)


def people(shared: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (shared / "reference/preprocess/official_crops.json").read_text()
    )["persons"]
    return found


def cases(shared: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(shared / "reference/preprocess" / name) as arrays:
        return dict(arrays)


def encode_person(person: dict[str, Any]) -> tuple[Tensor, Tensor]:
    keypoints = torch.tensor(person["joints_in_crop"], dtype=torch.float64)[None]
    heatmaps, weights = Msra(SIZE, MAPS).encode(
        keypoints, torch.tensor(person["joints_vis"])[None]
    )
    return heatmaps[0], weights[0]


def crop_to_image(keypoints_crop: Tensor, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the official affine of an upright crop: scale is the box's size over 200."""
    factor = scale[:, None, :1] * 200 / SIZE[1]
    middle = np.array([SIZE[1] / 2, SIZE[0] / 2])
    moved: np.ndarray = (keypoints_crop.numpy() - middle) * factor + center[:, None]
    return moved


def at(codec: HeatmapCodec, *cells: tuple[float, float]) -> Tensor:
    """Convert places in cells, (N, 2), to crop pixels."""
    gaps = 1 if codec.align_corners else 0
    stride = [(SIZE[axis] - gaps) / (MAPS[axis] - gaps) for axis in (1, 0)]
    return torch.tensor(cells) * torch.tensor(stride)


def blobs(*modes: tuple[float, float, float]) -> Tensor:
    """Sum Gaussians of sigma 2 at (x, y, height), in cells, as (1, 1, H, W)."""
    rows = torch.arange(MAPS[0])[:, None]
    columns = torch.arange(MAPS[1])[None]
    total = torch.zeros(MAPS)
    for x, y, height in modes:
        total += height * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return total[None, None]


def test_msra_targets_equal_the_official_ones(shared: Path) -> None:
    maps = cases(shared, "official_crops.npz")
    compared = 0
    for person in people(shared):
        heatmaps, weights = encode_person(person)
        assert weights.tolist() == person["target_weight"]
        assert heatmaps.amax((1, 2)).tolist() == pytest.approx(person["target_peak"], abs=1e-6)
        assert heatmaps.sum((1, 2)).tolist() == pytest.approx(person["target_sum"], abs=1e-4)
        target = maps.get(f"target_{person['set']}_{person['ann_id']}")
        if target is not None:
            np.testing.assert_allclose(heatmaps.numpy(), target, atol=1e-6)
            compared += 1
    assert compared == 4


def test_msra_targets_peak_where_the_official_ones_do(shared: Path) -> None:
    for person in people(shared):
        heatmaps, _ = encode_person(person)
        cells = heatmaps.flatten(1).argmax(dim=1)
        peaks = torch.stack((cells % MAPS[1], cells // MAPS[1]), dim=1)
        peaks[heatmaps.amax((1, 2)) == 0] = -1
        assert peaks.tolist() == person["target_peak_xy"]


def test_msra_decoding_equals_the_official_one_on_the_image(shared: Path) -> None:
    arrays = cases(shared, "decode_cases.npz")
    keypoints, scores = Msra(SIZE, MAPS).decode(torch.tensor(arrays["heatmaps"]))
    np.testing.assert_array_equal(scores.numpy(), arrays["maxvals"][..., 0])
    image = crop_to_image(keypoints, arrays["center"], arrays["scale"])
    np.testing.assert_allclose(image, arrays["final_preds"], atol=1e-4)


def test_msra_decoding_is_within_a_quarter_cell_of_the_official_peak(shared: Path) -> None:
    arrays = cases(shared, "decode_cases.npz")
    keypoints, _ = Msra(SIZE, MAPS).decode(torch.tensor(arrays["heatmaps"]))
    shift = keypoints.numpy() / 4 - arrays["max_preds"]
    assert set(np.abs(shift).flatten()) <= {0.0, 0.25}


def test_dark_decoding_equals_mmpose(shared: Path) -> None:
    arrays = cases(shared, "decode_cases.npz")
    keypoints, scores = Dark(SIZE, MAPS).decode(torch.tensor(arrays["heatmaps"]))
    found = arrays["dark_scores"] > 0  # elsewhere mmpose gives -4, we give 0
    assert found.sum() == found.size - 2
    away = np.linalg.norm(keypoints.numpy() - arrays["dark_decode"], axis=-1)
    assert away[found].max() < 1e-3
    assert (keypoints.numpy()[~found] == 0).all()
    np.testing.assert_array_equal(scores.numpy()[found], arrays["dark_scores"][found])


def test_udp_decoding_equals_mmpose_in_a_crop_of_size_minus_1(shared: Path) -> None:
    arrays = cases(shared, "decode_cases.npz")
    keypoints, scores = Udp(SIZE, MAPS).decode(torch.tensor(arrays["heatmaps"]))
    found = arrays["udp_scores"] > 0  # elsewhere mmpose gives -4, we give 0
    assert found.sum() == found.size - 2
    away = np.linalg.norm(keypoints.numpy() - arrays["udp_decode"] * UDP_OVER_MMPOSE, axis=-1)
    assert away[found].max() < 1e-3
    np.testing.assert_array_equal(scores.numpy()[found], arrays["udp_scores"][found])


@pytest.mark.parametrize(("name", "mean_px"), [("msra", 1.579), ("dark", 0.0458), ("udp", 0.0289)])
def test_encodings_and_round_trips_equal_mmpose(shared: Path, name: str, mean_px: float) -> None:
    arrays = cases(shared, "codec_cases.npz")
    codec = CODECS[name](SIZE, MAPS)
    heatmaps, weights = codec.encode(
        torch.tensor(arrays["keypoints"]), torch.tensor(arrays["visible"])
    )
    np.testing.assert_allclose(heatmaps[:2].numpy(), arrays[f"{name}_heatmaps"], atol=1e-6)
    np.testing.assert_array_equal(weights.numpy(), arrays[f"{name}_weights"][:, 0])
    keypoints, _ = codec.decode(heatmaps)
    labeled = weights.numpy() > 0
    roundtrip = arrays[f"{name}_roundtrip"][labeled] * (UDP_OVER_MMPOSE if name == "udp" else 1)
    np.testing.assert_allclose(keypoints.numpy()[labeled], roundtrip, atol=1e-3)
    away = np.linalg.norm(keypoints.numpy() - arrays["keypoints"], axis=-1)[labeled]
    assert away.mean() == pytest.approx(mean_px, abs=1e-3)


def test_dark_finds_random_joints_within_a_twentieth_of_a_pixel() -> None:
    codec = Dark(ODD_SIZE, ODD_MAPS)
    torch.manual_seed(0)
    keypoints = 20 + torch.rand(4, 5, 2) * torch.tensor([24.0, 56.0])
    heatmaps, _ = codec.encode(keypoints, torch.ones(4, 5))
    found, scores = codec.decode(heatmaps)
    assert (found - keypoints).norm(dim=-1).mean() < 0.05
    assert ((scores > 0.93) & (scores <= 1)).all()


@pytest.mark.parametrize("name", sorted(CODECS))
def test_cell_i_is_at_pixel_stride_times_i(name: str) -> None:
    codec = CODECS[name]((96, 128), (24, 16))
    # Strides of 8 along x and 4 along y; in udp from center to center.
    stride_x, stride_y = (127 / 15, 95 / 23) if name == "udp" else (8.0, 4.0)
    keypoints = torch.tensor([[[stride_x * 5, stride_y * 13]]])
    heatmaps, _ = codec.encode(keypoints, VISIBLE)
    assert heatmaps[0, 0].argmax().item() == 13 * 16 + 5
    torch.testing.assert_close(codec.decode(heatmaps)[0], keypoints, atol=0.02, rtol=0)


def test_unlabeled_joints_have_weight_zero_and_an_empty_map(codec: HeatmapCodec) -> None:
    keypoints = torch.tensor([[[100.0, 100.0], [float("nan"), 0.0], [100.0, 100.0]]])
    heatmaps, weights = codec.encode(keypoints, torch.tensor([[0, 0, 1]], dtype=torch.uint8))
    assert weights.tolist() == [[0, 0, 1]]
    assert heatmaps[0, :2].abs().sum() == 0
    assert heatmaps[0, 2].max() == pytest.approx(1, abs=0.05)  # between cells lower than 1


@pytest.mark.parametrize(
    ("cell", "weight"),
    [(-9.0, 0), (-5.0, 1), (53.0, 1), (55.0, 0)],  # the window reaches 6 cells, the map has 48
)
def test_joint_counts_while_its_window_touches_the_map(
    codec: HeatmapCodec, cell: float, weight: int
) -> None:
    heatmaps, weights = codec.encode(torch.tensor([[[4 * cell, 80.0]]]), VISIBLE)
    assert weights.item() == weight
    assert (heatmaps.sum() > 0) == bool(weight)


def test_msra_is_zero_beyond_three_sigma() -> None:
    heatmaps, _ = Msra(SIZE, MAPS).encode(torch.tensor([[[80.0, 120.0]]]), VISIBLE)
    assert (heatmaps > 0).sum() == 13 * 13
    assert heatmaps[0, 0, 30, 26] == pytest.approx(np.exp(-36 / 8))
    assert heatmaps[0, 0, 30, 27] == 0


def test_udp_is_exact_within_three_sigma_of_the_nearest_cell() -> None:
    heatmaps, _ = Udp(SIZE, MAPS).encode(at(Udp(SIZE, MAPS), (20.4, 30.0))[None], VISIBLE)
    assert (heatmaps > 0).sum() == 13 * 13
    assert heatmaps[0, 0, 30, 26] == pytest.approx(np.exp(-(5.6**2) / 8), rel=1e-4)
    assert heatmaps[0, 0, 30, 14] == pytest.approx(np.exp(-(6.4**2) / 8), rel=1e-4)
    assert heatmaps[0, 0, 30, 27] == 0


def test_saddle_moves_no_udp_joint() -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(4, 17, *MAPS)
    cells = heatmaps.flatten(2).argmax(dim=2)
    peaks = torch.stack((cells % MAPS[1], cells // MAPS[1]), dim=2)
    keypoints, _ = Udp(SIZE, MAPS).decode(heatmaps)
    assert (keypoints / torch.tensor([191 / 47, 255 / 63]) - peaks).abs().max() <= 2 + 1e-4


def test_maps_without_positive_values_decode_to_zero(codec: HeatmapCodec) -> None:
    heatmaps = torch.stack((torch.zeros(MAPS), torch.full(MAPS, -0.5)))[None]
    keypoints, scores = codec.decode(heatmaps)
    assert keypoints.abs().sum() == 0
    assert scores.tolist() == [[0.0, -0.5]]
    assert torch.equal(
        codec.decode_modes(heatmaps, 3), torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 2, 3, 4)
    )


def test_noise_moves_a_dark_joint_by_two_cells_at_most() -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(4, 17, *MAPS)
    cells = heatmaps.flatten(2).argmax(dim=2)
    peaks = torch.stack((cells % MAPS[1], cells // MAPS[1]), dim=2)
    keypoints, _ = Dark(SIZE, MAPS).decode(heatmaps)
    assert (keypoints / 4 - peaks).abs().max() <= 2


def test_decoding_passes_no_gradient(codec: HeatmapCodec) -> None:
    heatmaps = blobs((20.0, 30.0, 1.0)).requires_grad_()
    keypoints, scores = codec.decode(heatmaps)
    assert not keypoints.requires_grad
    assert not scores.requires_grad


def test_batch_decodes_as_its_members_do(codec: HeatmapCodec) -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(3, 4, *MAPS)
    whole = codec.decode_modes(heatmaps, 3)
    for index in range(3):
        alone = codec.decode_modes(heatmaps[index : index + 1], 3)
        torch.testing.assert_close(whole[index : index + 1], alone)


def test_first_mode_is_where_decode_puts_the_joint(codec: HeatmapCodec) -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(2, 5, *MAPS) - 0.3
    keypoints, _ = codec.decode(heatmaps)
    torch.testing.assert_close(codec.decode_modes(heatmaps, 2)[:, :, 0, :2], keypoints)


def test_two_peaks_are_two_modes_in_order_of_height(codec: HeatmapCodec) -> None:
    modes = codec.decode_modes(blobs((12.0, 20.0, 0.5), (36.0, 44.0, 0.9)), 3)[0, 0]
    places = at(codec, (36.0, 44.0), (12.0, 20.0), (0.0, 0.0))
    expected = torch.tensor([[0.9, 1.0], [0.5, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(modes, torch.cat((places, expected), 1), atol=1e-3, rtol=0)


def test_modes_beyond_the_count_are_left_out(codec: HeatmapCodec) -> None:
    heatmaps = blobs((8.0, 10.0, 0.6), (40.0, 10.0, 0.9), (24.0, 50.0, 0.3))
    assert codec.decode_modes(heatmaps, 2)[0, 0, :, 2].tolist() == pytest.approx([0.9, 0.6], 1e-3)


def test_plateau_is_one_mode(codec: HeatmapCodec) -> None:
    heatmaps = torch.zeros(1, 1, *MAPS)
    heatmaps[0, 0, 30:32, 20:22] = 1.0
    modes = codec.decode_modes(heatmaps, 3)[0, 0]
    assert (modes[:, 2] > 0).tolist() == [True, False, False]


@pytest.mark.parametrize("width", [0.5, 0.8, 1.0, 1.5, 3.0])
def test_width_of_a_mode_survives_the_round_trip(codec: HeatmapCodec, width: float) -> None:
    modes = torch.tensor([[[[*at(codec, (24.0, 32.0))[0].tolist(), 0.7, width]]]])
    torch.testing.assert_close(codec.decode_modes(codec.render(modes), 1), modes)


def test_widths_stay_between_half_and_three_sigma(codec: HeatmapCodec) -> None:
    drawn = torch.tensor([[[[96.0, 128.0, 1.0, 0.1]], [[96.0, 128.0, 1.0, 9.0]]]])
    assert codec.decode_modes(codec.render(drawn), 1)[0, :, 0, 3].tolist() == [0.5, 3.0]


def test_rendered_modes_equal_the_decoded_heatmaps(codec: HeatmapCodec) -> None:
    torch.manual_seed(0)
    keypoints = 40 + torch.rand(3, 5, 2) * torch.tensor([112.0, 176.0])
    heatmaps, _ = codec.encode(keypoints, torch.ones(3, 5))
    again = codec.render(codec.decode_modes(heatmaps, 3))
    torch.testing.assert_close(again, heatmaps, atol=5e-3, rtol=0)


def test_render_takes_the_higher_of_two_modes(codec: HeatmapCodec) -> None:
    places = at(codec, (24.0, 32.0), (26.0, 32.0))
    rest = torch.tensor([[0.5, 1.0], [1.0, 1.0]])
    modes = torch.cat((places, rest), dim=1)[None, None]
    heatmaps = codec.render(modes)[0, 0]
    assert heatmaps[32, 24] == pytest.approx(np.exp(-4 / 8))  # the far one is the higher here
    assert heatmaps[32, 26] == 1


def test_mode_of_height_zero_renders_nothing(codec: HeatmapCodec) -> None:
    assert codec.render(torch.tensor([[[[96.0, 128.0, 0.0, 0.0]]]])).abs().sum() == 0


def test_modes_of_one_codec_make_targets_of_another() -> None:
    keypoints = torch.tensor([[[97.3, 130.9]]])
    modes = Dark(SIZE, MAPS).decode_modes(Dark(SIZE, MAPS).encode(keypoints, VISIBLE)[0], 3)
    target, _ = Msra(SIZE, MAPS).encode(keypoints, VISIBLE)
    torch.testing.assert_close(Msra(SIZE, MAPS).render(modes), target, atol=5e-3, rtol=0)


def test_heatmaps_of_the_wrong_size_are_refused(codec: HeatmapCodec) -> None:
    with pytest.raises(ValueError, match=r"codec's size.*\(48, 64\).*heatmap_size"):
        codec.decode(torch.zeros(1, 1, 48, 64))


@pytest.mark.parametrize("sizes", [((0, 64), (16, 16), 2.0), ((64, 64), (16, 16), 0.0)])
def test_impossible_sizes_are_refused(
    sizes: tuple[tuple[int, int], tuple[int, int], float],
) -> None:
    with pytest.raises(ValueError, match=r"at least 1 and a positive sigma"):
        Msra(*sizes)
