"""Peaks of heatmaps: which cells they are, how wide, and where below the cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.codecs.heatmap_peaks import (
    WIDTH_RANGE,
    cell_xy,
    dark_step,
    highest,
    is_peak,
    smoothed,
    udp_step,
    values_at,
    width_at,
)

HEIGHT, WIDTH = 12, 10


def gaussian(x: float, y: float, sigma: float) -> Tensor:
    """A Gaussian in double precision, (1, 1, HEIGHT, WIDTH), with its center in cells."""
    columns = torch.arange(WIDTH, dtype=torch.float64)
    rows = torch.arange(HEIGHT, dtype=torch.float64)[:, None]
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))[None, None]


def cell(column: int, row: int) -> Tensor:
    return torch.tensor([[[row * WIDTH + column]]])


def test_highest_cells_come_in_order_and_of_equal_ones_the_first() -> None:
    maps = torch.tensor([[0.2, 0.7, 0.1], [0.7, 0.9, 0.0]])[None, None]
    values, cells = highest(maps, 3)
    assert cells.tolist() == [[[4, 1, 3]]]
    torch.testing.assert_close(values, torch.tensor([[[0.9, 0.7, 0.7]]]))
    assert cell_xy(cells, 3).tolist() == [[[[1, 1], [1, 0], [0, 1]]]]


def test_values_beyond_the_edge_are_those_of_the_edge() -> None:
    maps = torch.arange(6.0).reshape(1, 1, 2, 3)
    corner = torch.tensor([[[5]]])
    assert values_at(maps, corner, right=2, down=3).item() == 5
    assert values_at(maps, corner, right=-1, down=-1).item() == 1
    assert values_at(maps, corner, right=-9, down=0).item() == 3


def test_a_plateau_of_two_cells_is_one_peak() -> None:
    maps = torch.zeros(1, 1, 4, 5)
    maps[0, 0, 1, 1:3] = 1.0
    maps[0, 0, 3, 4] = 0.5
    assert is_peak(maps)[0, 0].nonzero().tolist() == [[1, 1], [3, 4]]


@pytest.mark.parametrize("times", [0.6, 1.0, 2.5])
def test_width_is_the_gaussians_own_as_a_multiple_of_sigma(times: float) -> None:
    maps = gaussian(5, 6, sigma=1.5 * times)
    assert width_at(maps, cell(5, 6), sigma=1.5).item() == pytest.approx(times, rel=0.01)


def test_width_stays_in_its_range_and_is_one_in_a_corner() -> None:
    assert width_at(gaussian(5, 6, 20.0), cell(5, 6), sigma=1.5).item() == WIDTH_RANGE[1]
    assert width_at(gaussian(5, 6, 0.3), cell(5, 6), sigma=1.5).item() == WIDTH_RANGE[0]
    assert width_at(gaussian(0, 0, 3.0), cell(0, 0), sigma=1.5).item() == pytest.approx(1)


@pytest.mark.parametrize("step", [dark_step, udp_step])
def test_a_step_on_the_logs_of_a_gaussian_ends_at_its_center(step: object) -> None:
    assert callable(step)
    logs = gaussian(5.3, 5.6, sigma=2.0).log()
    found = step(logs, cell(5, 6))[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.3, -0.4], dtype=torch.float64))


def test_there_is_no_step_on_a_map_without_a_hill() -> None:
    valley = -gaussian(5.3, 5.6, sigma=2.0).log()
    assert dark_step(valley, cell(5, 6)).abs().max() == 0


def test_a_smoothed_map_keeps_its_maximum_and_a_zero_map_stays_zero() -> None:
    peak = torch.zeros(1, 2, HEIGHT, WIDTH)
    peak[0, 0, 6, 5] = 0.8
    blurred = smoothed(peak)
    assert blurred[0, 0, 6, 5].item() == pytest.approx(0.8) == blurred[0, 0].max().item()
    assert 0 < blurred[0, 0, 6, 6].item() < 0.8
    assert blurred[0, 1].abs().max() == 0
